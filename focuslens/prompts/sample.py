"""Samples of multi-document question answering: a question, its accepted answers, and the documents in the prompt."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from html import escape
from typing import Any, Literal, TypeAlias, cast, get_args

from focuslens.prompts.prompt import Prompt
from focuslens.prompts.template import document_text, multidoc_prompt
from focuslens.util.checks import checked_integer, checked_text
from focuslens.util.html import Markup, card, details, shorten, table

__all__ = ["Case", "Document", "MultiDocSample", "prompts_digest"]

Case: TypeAlias = Literal["long", "gold", "negative"]
"""Documents in a prompt: all documents (``long``), only the gold document (``gold``), or only the irrelevant documents
(``negative``)."""


@dataclass(frozen=True)
class Document:
    """A document in a prompt: the title and the text of one search result."""

    title: str
    text: str

    def __post_init__(self) -> None:
        checked_text(self.title, "title")
        checked_text(self.text, "text")

    def __str__(self) -> str:
        return document_text(self.title, self.text)


@dataclass(frozen=True)
class MultiDocSample:
    """A question, its accepted answers, and the documents in the prompt.

    Args:
        question: The question, as written in the prompt.
        answers: The accepted answers. A response is correct if it contains at least one accepted answer.
        documents: The documents, in prompt order.
        gold_index: Index of the document that answers the question, counted from 0; ``None`` if no document answers
            the question.
        question_id: Identifier of the question. All samples of one question have the same ``question_id``, so that
            splits keep these samples together. The default is a digest of the question's text.
        name: Name that distinguishes this sample from other samples of the same question. If ``name`` is empty,
            ``gold_index`` is used instead.

    Raises:
        TypeError: If a field has another type, for example because a table has no value for it.
        ValueError: If there are no answers or no documents, if the question is empty, if a text cannot be encoded, or
            if ``gold_index`` is out of range.
    """

    question: str
    answers: tuple[str, ...]
    documents: tuple[Document, ...]
    gold_index: int | None
    question_id: str = ""
    name: str = ""

    def __post_init__(self) -> None:
        checked_text(self.question, "question", may_be_empty=False)
        checked_text(self.question_id, "question_id")
        checked_text(self.name, "name")
        for field in ("answers", "documents"):
            object.__setattr__(self, field, _sequence(getattr(self, field), field))
        for i, answer in enumerate(self.answers):
            checked_text(answer, f"answers[{i}]")
        for i, document in enumerate(self.documents):
            if not isinstance(cast("Any", document), Document):
                raise TypeError(
                    f"documents[{i}] is a {type(document).__name__}; it must be a Document: Document(title, text)"
                )
        if self.gold_index is not None:
            wanted = "an integer, the position of one document from 0, or None"
            object.__setattr__(self, "gold_index", checked_integer(self.gold_index, "gold_index", wanted))
        if not self.answers:
            raise ValueError(f"the question {self.question!r} has no answers; give at least one")
        if not self.documents:
            raise ValueError(f"the question {self.question!r} has no documents; give at least one")
        if not self.question_id:
            object.__setattr__(self, "question_id", hashlib.sha256(self.question.encode()).hexdigest()[:16])
        if self.gold_index is not None and not 0 <= self.gold_index < len(self.documents):
            raise ValueError(
                f"gold_index is {self.gold_index}, but there are {len(self.documents)} documents: "
                f"it must be 0 to {len(self.documents) - 1}, or None"
            )

    def __repr__(self) -> str:
        return (
            f"MultiDocSample(question={self.question!r}, answers={self.answers!r}, {len(self.documents)} documents, "
            f"gold_index={self.gold_index}, id={self.id!r})"
        )

    def _repr_html_(self) -> str:
        rows = [
            (i + 1, "★" if i == self.gold_index else "", document.title, shorten(document.text, 240))
            for i, document in enumerate(self.documents)
        ]
        where = "no relevant document" if self.gold_index is None else f"document {self.gold_index + 1} is relevant"
        answers = f"<div>accepted: {escape('; '.join(self.answers))}</div>"
        shown = table(("", "relevant", "title", "text"), rows)
        return card(self.question, Markup(answers), details(f"{len(self.documents)} documents, {where}", shown))

    @property
    def id(self) -> str:
        """Id, unique within a file: ``question_id@name``, or ``question_id@gold_index`` if ``name`` is empty."""
        return f"{self.question_id}@{self.name or self.gold_index}"

    def prompt(self, case: Case = "long") -> Prompt:
        """Create the prompt for one case. Each document keeps its number from the long prompt.

        Raises:
            ValueError: If ``case`` is unknown, if ``case`` is ``gold`` or ``negative`` and the sample has no gold
                document, or if ``case`` is ``negative`` and the gold document is the only document.
        """
        documents = {index: str(self.documents[index]) for index in self._shown(case)}
        return multidoc_prompt(self.question, documents, self.gold_index)

    def _shown(self, case: Case) -> list[int]:
        if case not in get_args(Case):
            raise ValueError(f"case is {case!r}; it must be one of {', '.join(get_args(Case))}")
        indices = range(len(self.documents))
        if case == "long":
            return list(indices)
        if self.gold_index is None:
            raise ValueError(f"the question {self.question!r} has no gold document, so it has no {case!r} prompt")
        shown = [i for i in indices if (i == self.gold_index) == (case == "gold")]
        if not shown:
            raise ValueError("the gold document is the only one, so nothing is left for the 'negative' prompt")
        return shown


def _sequence(values: Any, name: str) -> tuple[Any, ...]:
    """Values as a tuple. A string is refused, because its characters would be taken for values."""
    if isinstance(values, str | bytes | Mapping) or not isinstance(values, Iterable):
        raise TypeError(f"{name} is the {type(values).__name__} {values!r}; it must be a sequence, such as a list")
    return tuple(cast("Iterable[Any]", values))


def prompts_digest(samples: Iterable[MultiDocSample], case: Case = "long") -> str:
    """SHA-256 digest of the samples' ids, answers, prompts and relevant documents, which identifies the samples."""
    digest = hashlib.sha256()
    for sample in samples:
        # The id of a sample without a name contains the index of the relevant document.
        relevant = [sample.gold_index] if sample.name else []
        digest.update(json.dumps([sample.id, sample.answers, str(sample.prompt(case)), *relevant]).encode())
    return digest.hexdigest()
