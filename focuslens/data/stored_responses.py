"""Responses that one already has, in a column of a data file or in a file of their own, and the samples they answer."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias, cast

from focuslens.data._cells import whole
from focuslens.data._columns import cell_of_row, usual_names
from focuslens.data._passages import listed_names
from focuslens.data._rows import Row, Rows, open_rows
from focuslens.data._views import SampleViews
from focuslens.prompts.sample import MultiDocSample

__all__ = ["StoredResponse", "matched_responses", "responses_of_column", "responses_of_file"]

StoredResponse: TypeAlias = str | list[int]
"""A response: its text, or its token ids."""

_IDS = ("sample_id", *usual_names("id"))
"""Names of columns that may hold the id of a sample, or the id of its question."""

_QUESTIONS = ("question", "query", "question_text")
"""Names of columns that hold a question. In ``input``, another usual name, many logs have the whole prompt."""

_TOKENS, _RESPONSE = "tokens", "response"


def responses_of_column(column: str, samples: Sequence[MultiDocSample]) -> list[StoredResponse]:
    """Responses to samples from a column of their own file. Each is from the very row that its sample was loaded from.

    Raises:
        ValueError: If a row has no such column, or no response in it. The message names the file and the line. Also if
            the samples are from no file.
    """
    if not isinstance(samples, SampleViews):
        raise ValueError(f"the samples are from no file, so that they have no column {column!r}")
    return [_of_row(samples.row(i), column, samples.where(i)) for i in range(len(samples))]


def responses_of_file(
    path: str | Path, samples: Sequence[MultiDocSample], columns: Mapping[str, str | Sequence[str]] | None = None
) -> list[StoredResponse]:
    """Responses to samples from a file of responses, in the formats of :func:`load_samples`.

    Each row has a ``response`` (a text) or ``tokens`` (a list of token ids), and an id or a question, by which
    :func:`matched_responses` finds it. A JSON object from ids to responses is read too. If the file is that of the
    samples, each response is from the row of its sample.

    Args:
        path: The file.
        samples: The samples.
        columns: Columns of the samples' file that are named, by part.

    Raises:
        ValueError: If the file has another form, or as for :func:`matched_responses`.
    """
    path = Path(path)
    if isinstance(samples, SampleViews) and samples.path is not None and path.exists() and path.samefile(samples.path):
        return responses_of_column(_response_column(samples.row(0), path), samples)
    table = open_rows(path, keyed=_listed)
    names = dict.fromkeys(name for row in _read(table) for name in row)
    return matched_responses(table, _response_column(names, path), samples, columns)


def matched_responses(
    table: Rows,
    column: str,
    samples: Sequence[MultiDocSample],
    columns: Mapping[str, str | Sequence[str]] | None = None,
) -> list[StoredResponse]:
    """Response of the row of each sample.

    The row of a sample is the one with the sample's id or, if no row has it, the one with the id of its question: in
    the column that the samples' own file has the ids in or, if the rows have no such column, in one with a usual name.
    If no row has an id of the sample, the row is the one with the sample's question.

    Raises:
        ValueError: If a sample has no row, or rows with different responses, or its row has no response, or has the
            sample's id and another question.
    """
    found = _Responses(table, _read(table), column, columns or {})
    return [found.of(sample, _own_row(samples, i)) for i, sample in enumerate(samples)]


def _read(table: Rows) -> list[Row]:
    """All rows. The message about a broken row names the file and the line."""
    rows: list[Row] = []
    for index in range(table.count):
        try:
            rows.append(table.read(index))
        except ValueError as error:
            raise ValueError(f"{table.where(index)}: {error}") from error
    return rows


def _own_row(samples: Sequence[MultiDocSample], index: int) -> Row:
    """Row that a sample was loaded from; empty if it is from no file."""
    return samples.row(index) if isinstance(samples, SampleViews) else {}


def _response_column(names: Any, path: Path) -> str:
    column = next((name for name in (_RESPONSE, _TOKENS) if name in names), None)
    if column is None:
        raise ValueError(f"{path} has no column 'response' and none 'tokens'; there are {listed_names(names)}")
    return column


def _listed(content: Row) -> list[Row]:
    """Rows of a JSON object from ids to responses."""
    return [{"id": name, _RESPONSE: value} for name, value in content.items()]


def _of_row(row: Row, column: str, where: str) -> StoredResponse:
    """Text or token ids of a row. In a CSV file, a list of tokens is in JSON."""
    try:
        value = cell_of_row(row, column)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    is_tokens = column.rpartition(".")[2] == _TOKENS
    if isinstance(value, str) and is_tokens:
        with suppress(ValueError):
            value = json.loads(value)
    if isinstance(value, list) and all(type(token) is int for token in cast("list[Any]", value)):
        return cast("list[int]", value)
    if not isinstance(value, str) or is_tokens:
        raise ValueError(f"{where}: {column} is {value!r:.60}; a response is a text, or a list of token ids")
    return value


def _text(row: Row, name: str) -> str | None:
    """Text of a cell; ``None`` if there is none."""
    try:
        value = whole(cell_of_row(row, name))
    except ValueError:
        return None
    return str(value).strip() or None if isinstance(value, str | int) and not isinstance(value, bool) else None


def _words(text: str) -> str:
    """Question without differences in white space, case, and a question mark at its end, which loaders may add."""
    return " ".join(text.split()).casefold().rstrip("? ")


@dataclass(frozen=True)
class _Responses:
    """Rows with responses.

    Attributes:
        table: The rows, with their places.
        rows: The rows.
        column: Column of the responses.
        named: Columns of the samples' own file that are named, by part.
    """

    table: Rows
    rows: Sequence[Row]
    column: str
    named: Mapping[str, str | Sequence[str]]
    _indices: dict[tuple[str, bool], dict[str, list[int]]] = field(default_factory=dict[Any, Any], init=False)

    def of(self, sample: MultiDocSample, own: Row) -> StoredResponse:
        """Response to a sample, given the row that it was loaded from."""
        places = self._by_id(sample, own)
        if places:
            self._check_question(places, sample, own)
        places = places or self._by_question(sample, own)
        if not places:
            raise ValueError(
                f"{self.table.name} has no row with the id {sample.id!r} or {sample.question_id!r}, and none with the "
                f"question {sample.question!r:.100}; each sample needs a row with its response"
            )
        given = [_of_row(self.rows[place], self.column, self.table.where(place)) for place in places]
        if any(one != given[0] for one in given):
            raise ValueError(
                f"{self.table.name} has {len(given)} rows with different responses for sample {sample.id!r}; give each "
                "row the sample's id in a column 'id', or put the responses into the rows of the data "
                "(--response-column)"
            )
        return given[0]

    def _by_id(self, sample: MultiDocSample, own: Row) -> list[int]:
        columns = [name for name in self._ids() if self._has(name)]
        exact = [place for name in columns for place in self._places(name, sample.id)]
        if exact:
            return exact
        same = self._own_column("id", own, lambda text: text == sample.question_id.strip())
        if same is not None and self._has(same):
            return self._places(same, sample.question_id)
        found: dict[str, list[int]] = {}
        for name in columns:
            # A column of the data with the same name can hold other ids than those that the samples have.
            for text in (sample.question_id, _text(own, name)):
                places = [] if text is None else self._places(name, text)
                if places:
                    found[text or ""] = [*found.get(text or "", []), *places]
        self._check_meaning(found, same, sample)
        return next(iter(found.values()), [])

    def _ids(self) -> list[str]:
        """Columns that can hold ids. A column with responses holds none."""
        given = self.named.get("id")
        names = [given, *_IDS] if isinstance(given, str) else [*_IDS]
        return [name for name in dict.fromkeys(names) if name != self.column]

    def _check_meaning(self, found: Mapping[str, list[int]], same: str | None, sample: MultiDocSample) -> None:
        if len({tuple(places) for places in found.values()}) > 1:
            first, second = list(found)[:2]
            renamed = "" if same is None else f"name the column of ids {same!r} here too, or "
            raise ValueError(
                f"{self.table.name} has a row with the id {first!r} and another with {second!r}, and the data have "
                f"both in the row of the question {sample.question!r:.80}; {renamed}name the column of the data that "
                "holds these ids: --columns id=..."
            )

    def _by_question(self, sample: MultiDocSample, own: Row) -> list[int]:
        places = [
            place
            for name in self._questions(sample, own)
            for place in self._places(name, _words(sample.question), is_question=True)
        ]
        same = self._own_column("id", own, lambda text: text == sample.question_id.strip())
        # A row with the id of another sample answers that one, even if the questions are equal.
        return [place for place in dict.fromkeys(places) if same is None or _text(self.rows[place], same) is None]

    def _questions(self, sample: MultiDocSample, own: Row) -> list[str]:
        """Columns in which to look for the question: those with usual names or, without any, all others."""
        names = [*filter(None, [self._question_column(sample, own)]), *usual_names("question")]
        present = [name for name in dict.fromkeys(names) if self._has(name) and name != self.column]
        others = dict.fromkeys(name for row in self.rows for name in row if name != self.column)
        return present or list(others)

    def _question_column(self, sample: MultiDocSample, own: Row) -> str | None:
        """Column with the question, if it is beyond doubt: the one of the data, or one with a plain name."""
        same = self._own_column("question", own, lambda text: _words(text) == _words(sample.question))
        names = [*filter(None, [same]), *_QUESTIONS]
        return next((name for name in names if self._has(name) and name != self.column), None)

    def _check_question(self, places: Sequence[int], sample: MultiDocSample, own: Row) -> None:
        name = self._question_column(sample, own)
        for place in places if name is not None else ():
            asked = _text(self.rows[place], name or "")
            if asked is not None and _words(asked) != _words(sample.question):
                raise ValueError(
                    f"{self.table.where(place)}: the row has an id of sample {sample.id!r}, whose question is "
                    f"{sample.question!r:.100}, and another question, {asked!r:.100}; give the rows the ids of the "
                    "samples that they answer (--columns id=... names the column of ids in the data)"
                )

    def _own_column(self, part: str, own: Row, fits: Callable[[str], bool]) -> str | None:
        """Column of the samples' own file that a part of a sample is from."""
        given = self.named.get(part)
        names = usual_names(part) if given is None else (given,)
        texts = ((name, _text(own, name)) for name in names if isinstance(name, str))
        return next((name for name, text in texts if text is not None and fits(text)), None)

    def _has(self, name: str) -> bool:
        return bool(self._index(name, is_question=False))

    def _places(self, name: str, text: str, *, is_question: bool = False) -> list[int]:
        return self._index(name, is_question=is_question).get(text, [])

    def _index(self, name: str, *, is_question: bool) -> dict[str, list[int]]:
        """Rows by the text in a column."""
        if (name, is_question) not in self._indices:
            index: dict[str, list[int]] = {}
            for place, row in enumerate(self.rows):
                text = _text(row, name)
                if text is not None:
                    index.setdefault(_words(text) if is_question else text, []).append(place)
            self._indices[name, is_question] = index
        return self._indices[name, is_question]
