"""Names of the columns of a user's table, and the fields of one row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias, cast, get_args

from focuslens.data._cells import decoded, listed_names, text_of_number, value_at
from focuslens.data._passages import (
    FLAG_NAMES,
    DocumentFields,
    Passage,
    RelevantKind,
    answers_of,
    flagged,
    passages_of,
    relevant_of,
)
from focuslens.data._rows import Row
from focuslens.prompts.sample import Document

__all__ = [
    "KEYS",
    "Columns",
    "Fields",
    "Names",
    "cell_of_row",
    "fields_of_row",
    "question_id_of",
    "usual_columns",
    "usual_names",
]

Names: TypeAlias = Mapping[str, str | Sequence[str] | None]
"""Names of columns, by part; ``None`` for a part that is not read."""

_KINDS: Mapping[str, RelevantKind] = {
    "gold_index": "index",
    "gold_indices": "index",
    **{f"relevant_{kind}": kind for kind in get_args(RelevantKind)},
}
"""Columns whose names say how they name the relevant documents."""

_USUAL: Mapping[str, tuple[str, ...]] = {
    "question": ("question", "query", "input", "question_text"),
    "documents": ("documents", "contexts", "passages", "ctxs", "docs", "paragraphs", "retrieved_contexts", "context"),
    "answers": ("answers", "answer", "ground_truths", "ground_truth", "reference_answer"),
    "relevant": ("relevant", *_KINDS),
    "id": ("question_id", "qid", "query_id", "id", "_id"),
}
"""Usual names of columns. For an id, the first that there is counts."""


def usual_names(part: str) -> tuple[str, ...]:
    """Usual names of the columns of a part of a sample, such as ``question``."""
    return _USUAL.get(part, ())


_RELEVANT = tuple(f"relevant_{kind}" for kind in get_args(RelevantKind))
_OF_DOCUMENTS = ("text", "title", "document_id")
KEYS = ("question", "documents", "answers", "relevant", *_RELEVANT, "id", "titles", "messages", *_OF_DOCUMENTS)
"""Parts of a sample that a column can be named for."""

_NEEDED = ("question", "documents", "text")
"""Parts that are always read."""

_SEVERAL = ("documents", "answers", "titles")
"""Parts that can be in several columns."""


def usual_columns(row: Row, part: str) -> list[str]:
    """Columns of a row whose names are usual for a part."""
    return [name for name in _USUAL.get(part, ()) if name in row]


@dataclass(frozen=True)
class Fields:
    """Content of one row.

    Attributes:
        question: The question.
        answers: The accepted answers; empty if there are none.
        passages: The documents, in prompt order.
        relevant: Indices of the relevant documents; empty if none is known.
        question_id: Id of the question; empty if there is none.
        messages: Earlier messages of the chat.
        lacking: Whether the row names a relevant document that is not among its documents.
    """

    question: str
    answers: tuple[str, ...]
    passages: tuple[Passage, ...]
    relevant: tuple[int, ...] = ()
    question_id: str = ""
    messages: tuple[Mapping[str, Any], ...] = ()
    lacking: bool = False


@dataclass(frozen=True)
class Columns:
    """Columns of the parts of a sample, as the user names them.

    Attributes:
        names: Names of columns, by part. Parts that are not named are in columns with usual names.
        unread: Parts that are not read, even if a column has a usual name.
    """

    names: Mapping[str, str | tuple[str, ...]] = field(default_factory=dict[str, Any])
    unread: tuple[str, ...] = ()

    @classmethod
    def of(cls, given: Names | None) -> Columns:
        """Columns from the user's argument, in which ``None`` stands for a part that is not read.

        Raises:
            TypeError: If the argument is not a mapping of texts, or of lists of texts.
            ValueError: If a part is unknown, is named twice, or is needed and not to be read.
        """
        if given is None:
            return cls()
        if not isinstance(given, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"columns is {given!r:.60}; it must map parts to names, such as {{'question': 'query'}}")
        names: dict[str, str | tuple[str, ...]] = {}
        for part, value in given.items():
            if part not in KEYS:
                raise ValueError(f"columns names the part {part!r}; there are {', '.join(KEYS)}")
            if value is None:
                if part in _NEEDED:
                    raise ValueError(
                        f"columns[{part!r}] is None, which leaves the {part} unread, but a sample needs its {part}; "
                        "name a column, or leave the part out"
                    )
                continue
            listed = (value,) if isinstance(value, str) else tuple(value)
            if not listed or not all(isinstance(name, str) and name for name in listed):  # pyright: ignore[reportUnnecessaryIsInstance]
                raise TypeError(f"columns[{part!r}] is {value!r}; it must be the name of a column, or a list of names")
            if len(listed) > 1 and part not in _SEVERAL:
                raise ValueError(
                    f"columns[{part!r}] names {len(listed)} columns; only {', '.join(_SEVERAL)} can have several"
                )
            names[part] = value if isinstance(value, str) else listed
        twice = [part for part in ("relevant", *_RELEVANT) if part in given]
        if len(twice) > 1:
            raise ValueError(
                f"columns names {twice[0]!r} and {twice[1]!r}; one of them says which documents are relevant"
            )
        return cls(names, tuple(part for part, value in given.items() if value is None))

    def describe(self) -> dict[str, Any]:
        """The names as JSON values."""
        named = {part: name if isinstance(name, str) else list(name) for part, name in self.names.items()}
        return {**named, **dict.fromkeys(self.unread)}

    @property
    def parts(self) -> tuple[str, ...]:
        """Parts about which the user says something."""
        return (*self.names, *self.unread)

    @property
    def document_fields(self) -> DocumentFields:
        """Names of the fields of documents that are dicts."""
        text, title, identity = (
            "" if part in self.unread else cast("str | None", self.names.get(part)) for part in _OF_DOCUMENTS
        )
        return DocumentFields(text, title, identity)

    def cells(self, row: Row, part: str) -> dict[str, Any] | None:
        """Cells of a part, by column; ``None`` if the part is not read, or not named and no column has a usual name.

        Raises:
            ValueError: If a named column is missing, or several columns have usual names.
        """
        if part in self.unread:
            return None
        given = self.names.get(part)
        if given is None:
            present = usual_columns(row, part)
            if len(present) > 1 and part != "id":
                raise ValueError(
                    f"the columns {listed_names(present)} can all be the {part}; name one of them: "
                    f"columns={{{part!r}: {present[0]!r}}}"
                )
            return {present[0]: row[present[0]]} if present else None
        if isinstance(given, str):
            # A column may have a plus sign in its name.
            given = tuple(given.split("+")) if part in _SEVERAL and given not in row else (given,)
        return {name: cell_of_row(row, name) for name in given}


def cell_of_row(row: Row, name: str) -> Any:
    """Cell of a column. A name with dots, such as ``answers.text``, leads into objects.

    Raises:
        ValueError: If there is no such column.
    """
    try:
        return value_at(row, name)
    except KeyError:
        raise ValueError(f"there is no column {name!r}; there are {listed_names(row)}") from None


def fields_of_row(row: Row, columns: Columns) -> Fields:
    """Content of a row whose columns are named, or have usual names.

    Raises:
        ValueError: If a column is missing, or a cell has another form.
    """
    question = _question(row, columns)
    passages, places = _documents(row, columns)
    answers = columns.cells(row, "answers") or {}
    return Fields(
        question,
        tuple(dict.fromkeys(answer for cell in answers.values() for answer in answers_of(cell))),
        passages,
        _relevant(row, columns, passages, places),
        question_id_of(row, columns),
        _messages(row, columns),
    )


def _question(row: Row, columns: Columns) -> str:
    cells = columns.cells(row, "question")
    if cells is None:
        raise ValueError(
            f"no column has a usual name for the question; there are {listed_names(row)}: name one of them, as in "
            "columns={'question': ...}"
        )
    ((name, value),) = cells.items()
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"the question in column {name!r} is {value!r:.60}; it must be a text that is not empty")
    return value


def question_id_of(row: Row, columns: Columns) -> str:
    """Id of the question of a row; empty if there is none."""
    cells = columns.cells(row, "id") or {}
    value = next(iter(cells.values()), None)
    return "" if value is None else text_of_number(value)


def _documents(row: Row, columns: Columns) -> tuple[tuple[Passage, ...], list[int]]:
    """Documents of a row, and the number of the column of each; the number of the document in a single column."""
    cells = columns.cells(row, "documents")
    if cells is None:
        raise ValueError(
            f"no column has a usual name for the documents; there are {listed_names(row)}: name one or several of "
            "them, as in columns={'documents': ...}"
        )
    names = columns.document_fields
    if len(cells) == 1:
        passages = passages_of(next(iter(cells.values())), names)
        places = list(range(len(passages)))
    else:
        passages, places = _in_columns(cells, names)
    return tuple(_titled(row, columns, passages, places)), places


def _in_columns(cells: Mapping[str, Any], names: DocumentFields) -> tuple[list[Passage], list[int]]:
    """One document per column. An empty cell is no document."""
    passages: list[Passage] = []
    places: list[int] = []
    for place, (name, cell) in enumerate(cells.items()):
        if cell is None or (isinstance(cell, str) and not cell.strip()):
            continue
        listed = passages_of(cell, names)
        if len(listed) != 1:
            raise ValueError(f"the column {name!r} has {len(listed)} documents; of several columns, each has one")
        passages.append(Passage(listed[0].document, listed[0].ids | {name}, listed[0].fields))
        places.append(place)
    if not passages:
        raise ValueError(f"the columns {listed_names(cells)} are all empty; a sample needs at least one document")
    return passages, places


def _titled(row: Row, columns: Columns, passages: Sequence[Passage], places: Sequence[int]) -> list[Passage]:
    """Documents with the titles of the columns ``titles``, if they are named."""
    cells = columns.cells(row, "titles")
    if cells is None:
        return list(passages)
    values = list(cells.values()) if len(cells) > 1 else decoded(next(iter(cells.values())))
    titles = [values] if isinstance(values, str) or values is None else list(values)
    if len(cells) > 1:
        titles = [titles[place] if place < len(titles) else None for place in places]
    if len(titles) != len(passages):
        raise ValueError(f"there are {len(titles)} titles for {len(passages)} documents; give one per document")
    return [
        Passage(Document("" if title is None else title, passage.document.text), passage.ids, passage.fields)
        for title, passage in zip(titles, passages, strict=True)
    ]


def _relevant(row: Row, columns: Columns, passages: Sequence[Passage], places: Sequence[int]) -> tuple[int, ...]:
    part = next((part for part in _RELEVANT if part in columns.parts), "relevant")
    if part in columns.unread:
        return ()
    name = columns.names.get(part)
    # A name that is no column can be a field of the documents.
    if isinstance(name, str) and name not in row:
        marked = flagged(passages, name)
        if marked is not None:
            return marked
    cells = columns.cells(row, part)
    if cells is None:
        present = [name for name in FLAG_NAMES if any(name in passage.fields for passage in passages)]
        if len(present) > 1:
            raise ValueError(
                f"the fields {listed_names(present)} of the documents can all mark the relevant ones; name one of "
                f"them: columns={{'relevant': {present[0]!r}}}"
            )
        return (flagged(passages, present[0]) or ()) if present else ()
    ((column, value),) = cells.items()
    kind = _KINDS.get(part) or _KINDS.get(column)
    if list(places) == list(range(len(passages))):
        return relevant_of(value, passages, kind)
    # Indices count the columns of documents, of which some are empty here.
    by_place = dict(zip(places, passages, strict=True))
    spread = [by_place.get(place, _NO_DOCUMENT) for place in range(max(places) + 1)]
    indices = relevant_of(value, spread, kind)
    missing = [index for index in indices if index not in by_place]
    if missing:
        raise ValueError(f"document {missing[0]} is relevant, but its column is empty in this row")
    return tuple(list(places).index(index) for index in indices)


_NO_DOCUMENT = Passage(Document("", "\N{WORD JOINER}"))
"""Place of an empty column among the documents."""


def _messages(row: Row, columns: Columns) -> tuple[Mapping[str, Any], ...]:
    cells = columns.cells(row, "messages")
    if cells is None:
        return ()
    value = decoded(next(iter(cells.values())))
    return () if value is None or value == "" else tuple(value)
