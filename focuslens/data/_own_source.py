"""A table of the user: its validation, and the samples of its rows."""

from __future__ import annotations

import warnings
from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from focuslens.data._columns import Columns, Fields
from focuslens.data._dropped import warn_of_dropped
from focuslens.data._forms import FormName, checked_form, expanded, form_of
from focuslens.data._rows import digest_of_rows, open_rows
from focuslens.prompts.answers import normalize_answer
from focuslens.prompts.sample import MultiDocSample
from focuslens.prompts.template import PromptTemplate
from focuslens.util.progress import track

__all__ = ["OwnForm", "OwnSource"]


@dataclass(frozen=True)
class OwnForm:
    """Way to read the samples of a user's table.

    Attributes:
        form: Form of the table; ``None`` to recognise it.
        columns: Columns of the parts of a sample.
        num_documents: Largest number of documents per sample; ``None`` for all.
        seed: Random seed of the order of documents, in the form ``rgb``.
    """

    form: FormName | None = None
    columns: Columns = field(default_factory=Columns)
    num_documents: int | None = None
    seed: int = 42

    def describe(self) -> dict[str, Any]:
        """The form as JSON values, from which :meth:`of` rebuilds it."""
        return {
            "form": self.form,
            "columns": self.columns.describe(),
            **({} if self.num_documents is None else {"most_documents": self.num_documents}),
        }

    @classmethod
    def of(cls, description: Mapping[str, Any], seed: int) -> OwnForm:
        """Rebuild a form from its description.

        Raises:
            KeyError: If an entry is missing.
            ValueError: If an entry is invalid.
        """
        columns = Columns.of(description["columns"])
        return cls(checked_form(description["form"]), columns, description.get("most_documents"), seed)


class OwnSource:
    """Validated table, whose rows are converted to samples on access."""

    def __init__(self, source: Any, own: OwnForm, template: PromptTemplate | None, limit: int | None) -> None:
        # An article of SQuAD's original files has many questions, of which the limit counts each.
        rows = expanded(open_rows(source, limit=None if _may_nest(source) else limit))
        self.rows = rows if limit is None or rows.count <= limit else replace(rows, count=limit)
        try:
            self.form = form_of(self.rows, own.form, own.columns)
        except ValueError as error:
            raise self._refusal(0, error) from error
        self.own, self.template, self.limit = replace(own, form=self.form.name), template, limit
        self.dropped: list[tuple[int, str]] = []
        self.lacking: list[int] = []
        # For each row, the index of the first row with the same question.
        self.first_rows = array("Q")
        self._names: dict[int, str] = {}
        self._scan()

    def _scan(self) -> None:
        questions: dict[str, int] = {}
        ids: set[str] = set()
        for index in track(range(self.rows.count), "checking rows", unit="row"):
            fields, sample = self._checked(index)
            if sample.id in ids:
                gold = "+".join(map(str, sample.gold_indices)) or "None"
                self._names[index] = f"{gold}/{index}"
                sample = replace(sample, name=self._names[index])
            ids.add(sample.id)
            self.first_rows.append(questions.setdefault(sample.question_id, index))
            self.dropped += [(index + 1, answer) for answer in fields.answers if answer not in sample.answers]
            if fields.lacking:
                self.lacking.append(index)
        self._warn()

    def _warn(self) -> None:
        if self.dropped and self.rows.path is not None:
            warn_of_dropped(self.rows.path, self.dropped)
        elif self.dropped:
            warnings.warn(
                f"{self.rows.name}: dropped {len(self.dropped)} accepted answer(s), empty after normalisation (first: "
                f"{self.dropped[0][1]!r}, row {self.dropped[0][0]}); their questions have other answers",
                stacklevel=5,
            )
        if self.lacking:
            warnings.warn(
                f"{self.rows.where(self.lacking[0])}: a relevant document is not among the documents of the row, as in "
                f"{len(self.lacking)} of {self.rows.count} rows; only those that are among them count as relevant",
                stacklevel=5,
            )

    def _checked(self, index: int) -> tuple[Fields, MultiDocSample]:
        """Content of a row, and its sample without a name of its own."""
        try:
            fields = self.form.read(self.rows.read(index), self.own.columns, f"{self.own.seed}/{index}")
            return fields, self._sample_of(_cut(fields, self.own.num_documents))
        except (TypeError, ValueError) as error:
            raise self._refusal(index, error) from error

    def _sample_of(self, fields: Fields) -> MultiDocSample:
        return MultiDocSample(
            fields.question,
            _usable(fields.answers),
            tuple(passage.document for passage in fields.passages),
            None,
            fields.question_id,
            gold_indices=fields.relevant,
            template=self.template,
            messages=fields.messages,
        )

    def _refusal(self, index: int, error: Exception) -> ValueError:
        return ValueError(f"{self.rows.where(index)}: {error}")

    def sample(self, index: int) -> MultiDocSample:
        """Sample of a row."""
        _, sample = self._checked(index)
        return replace(sample, name=self._names[index]) if index in self._names else sample

    @cached_property
    def sha256(self) -> str:
        """SHA-256 digest of the file as stored on disk, or of the rows of another source."""
        return digest_of_rows(self.rows)


def _may_nest(source: Any) -> bool:
    return isinstance(source, str | Path) and str(source).lower().removesuffix(".gz").endswith(".json")


def _usable(answers: tuple[str, ...]) -> tuple[str, ...]:
    usable = tuple(answer for answer in answers if normalize_answer(answer))
    if answers and not usable:
        raise ValueError(
            f"no usable answer in {list(answers)}: an answer that is nothing but punctuation, articles and spaces "
            "normalises to nothing, which every prediction contains; give at least one other, or none at all. "
            "columns={'answers': None} (--columns answers=) leaves all answers unread"
        )
    return usable


def _cut(fields: Fields, most: int | None) -> Fields:
    """The relevant documents and the first others, as many as there may be, in their order."""
    if most is None or len(fields.passages) <= most:
        return fields
    if len(fields.relevant) > most:
        raise ValueError(
            f"{len(fields.relevant)} documents are relevant, but num_documents is {most}; give at least "
            f"{len(fields.relevant)}"
        )
    others = [i for i in range(len(fields.passages)) if i not in fields.relevant]
    chosen = sorted([*fields.relevant, *others[: most - len(fields.relevant)]])
    return replace(
        fields,
        passages=tuple(fields.passages[i] for i in chosen),
        relevant=tuple(chosen.index(i) for i in fields.relevant),
    )
