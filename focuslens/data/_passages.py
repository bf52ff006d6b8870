"""Documents, answers and relevant documents in the cells of a user's table."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, cast

from focuslens.data._cells import decoded, listed_names, text_of_number, value_at, whole
from focuslens.prompts.sample import Document

__all__ = [
    "FLAG_NAMES",
    "DocumentFields",
    "Passage",
    "RelevantKind",
    "answers_of",
    "flagged",
    "joined",
    "passages_of",
    "relevant_of",
]

TEXT_NAMES = (
    "text",
    "content",
    "contents",
    "body",
    "passage",
    "passage_text",
    "paragraph_text",
    "page_content",
    "document",
    "context",
    "snippet",
    "chunk",
    "sentences",
)
TITLE_NAMES = ("title", "heading", "page_title", "wikipedia_title")
ID_NAMES = ("id", "_id", "doc_id", "docid", "document_id", "pid", "passage_id", "chunk_id", "wikipedia_id", "idx")
FLAG_NAMES = ("is_supporting", "isgold", "is_gold", "is_selected", "is_relevant", "relevant", "gold")
"""Usual names of the fields of a document: its text, its title, its ids, and whether it is relevant."""

_INDEX = re.compile(r"(\d+)(?:\.0)?")
"""An index as a text. pandas writes a column of indices with gaps as floats: ``0.0``."""

RelevantKind: TypeAlias = Literal["index", "flag", "id", "title", "text"]
"""Way in which a value names a relevant document."""


@dataclass(frozen=True)
class DocumentFields:
    """Names of the fields of documents that are dicts; ``None`` for the usual names, empty for a field not to read."""

    text: str | None = None
    title: str | None = None
    id: str | None = None


@dataclass(frozen=True)
class Passage:
    """A document, and the values that can name it.

    Attributes:
        document: The document.
        ids: Its ids.
        fields: The fields of a document that is a dict.
    """

    document: Document
    ids: frozenset[str] = frozenset()
    fields: Mapping[str, Any] = field(default_factory=dict[str, Any], compare=False)


def joined(sentences: Sequence[Any], where: str) -> str:
    """Sentences as one text, with a space between them where there is none. One text is one sentence."""
    sentences = [sentences] if isinstance(sentences, str) else sentences
    text = ""
    for i, sentence in enumerate(sentences):
        if not isinstance(sentence, str):
            raise ValueError(f"{where}[{i}] is {sentence!r:.60}; it must be a sentence")
        gap = "" if not text or text[-1:].isspace() or sentence[:1].isspace() else " "
        text += gap + sentence
    return text.strip()


def passages_of(value: Any, names: DocumentFields) -> list[Passage]:
    """Documents in a cell: texts, dicts, pairs of title and text, or lists of titles and of texts.

    Raises:
        ValueError: If the value has no documents, or is of another form.
    """
    value = decoded(value)
    if value is None or value == "" or (isinstance(value, Sequence | Mapping) and not value):
        raise ValueError("there are no documents; a sample needs at least one")
    if isinstance(value, str):
        return [_passage(value, names, "documents")]
    if isinstance(value, Mapping):
        entries = _entries(cast("Mapping[str, Any]", value), names)
        return [_passage(entry, names, f"documents[{i}]") for i, entry in enumerate(entries)]
    if not isinstance(value, list | tuple):
        raise ValueError(f"the documents are {value!r:.60}; they must be a list of texts or of dicts")
    return [_passage(entry, names, f"documents[{i}]") for i, entry in enumerate(cast("list[Any]", value))]


def _entries(columns: Mapping[str, Any], names: DocumentFields) -> list[Any]:
    """Documents of one object: of lists of titles and texts, as the hub has them, or the object itself."""
    text = _field(columns, names.text, TEXT_NAMES, "text", "documents")
    lists = {name: value for name, value in columns.items() if isinstance(value, list | tuple)}
    if text not in lists or (text == "sentences" and all(isinstance(item, str) for item in lists[text])):
        return [columns]
    lengths = {name: len(values) for name, values in lists.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"the documents have lists of unequal lengths: {lengths}")
    return [{name: values[i] for name, values in lists.items()} for i in range(lengths[text])]


def _field(
    fields: Mapping[str, Any], given: str | None, usual: Sequence[str], what: str, where: str, *, required: bool = True
) -> str | None:
    """Name of a field of a document; ``None`` if it has none, or none to read.

    Raises:
        ValueError: If the named field is missing, or several fields have usual names, or a required one has none.
    """
    if given is not None:
        if given and not _has(fields, given):
            raise ValueError(f"{where} has no field {given!r}; there are {listed_names(fields)}")
        return given or None
    present = [name for name in usual if fields.get(name) is not None]
    if len(present) > 1:
        raise ValueError(
            f"{where} has several fields that can be its {what}: {listed_names(present)}; name one of them: "
            f"columns={{{what!r}: {present[0]!r}}}"
        )
    if not present and required:
        raise ValueError(
            f"{where} has no field with a usual name for its {what}; there are {listed_names(fields)}: name one of "
            f"them, as in columns={{{what!r}: ...}}"
        )
    return present[0] if present else None


def _passage(entry: Any, names: DocumentFields, where: str) -> Passage:
    ids, fields = frozenset[str](), cast("Mapping[str, Any]", {})
    if isinstance(entry, str):
        title, text = "", entry
    elif isinstance(entry, Mapping):
        fields = cast("Mapping[str, Any]", entry)
        title, text, ids = _of_fields(fields, names, where)
    elif isinstance(entry, list | tuple) and len(entry) == 2 and isinstance(entry[0], str):  # pyright: ignore[reportUnknownArgumentType]
        pair = cast("list[Any]", entry)
        title, text = pair[0], _text(pair[1], where)
    else:
        raise ValueError(f"{where} is {entry!r:.60}; a document is a text, a dict, or a pair of title and text")
    try:
        return Passage(Document(title, text), ids, fields)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error


def _has(fields: Mapping[str, Any], name: str) -> bool:
    try:
        value_at(fields, name)
    except KeyError:
        return False
    return True


def _of_fields(fields: Mapping[str, Any], names: DocumentFields, where: str) -> tuple[str, str, frozenset[str]]:
    title_name = _field(fields, names.title, TITLE_NAMES, "title", where, required=False)
    title = (None if title_name is None else value_at(fields, title_name)) or ""
    if not isinstance(title, str):
        raise ValueError(f"{where}[{title_name!r}] is {title!r:.60}; a title is a text")
    text_name = _field(fields, names.text, TEXT_NAMES, "text", where, required=not title)
    text = None if text_name is None else value_at(fields, text_name)
    id_names = [name for name in ID_NAMES if name in fields]
    if names.id is not None:
        given = _field(fields, names.id, (), "document_id", where)
        id_names = [] if given is None else [given]
    ids = [value_at(fields, name) for name in id_names]
    shown = "" if text is None else _text(text, f"{where}[{text_name!r}]")
    return title, shown, frozenset(text_of_number(value) for value in ids if value is not None)


def _text(value: Any, where: str) -> str:
    if isinstance(value, list | tuple):
        return joined(cast("list[Any]", value), where)
    if not isinstance(value, str):
        raise ValueError(f"{where} is {value!r:.60}; it must be a text, or a list of sentences")
    return value


# Answers


def answers_of(value: Any) -> tuple[str, ...]:
    """Accepted answers in a cell, without repetitions: a text, a list of texts, or SQuAD's object with ``text``.

    Raises:
        ValueError: If the value is of another form.
    """
    value = decoded(value)
    if value is None or value == "":
        return ()
    if isinstance(value, Mapping):
        fields = cast("Mapping[str, Any]", value)
        name = next((name for name in ("text", "answer", "aliases", "value") if name in fields), None)
        if name is None:
            raise ValueError(f"the answers have the fields {listed_names(fields)}; give texts, or a field 'text'")
        return answers_of(fields[name])
    if isinstance(value, list | tuple):
        nested = (answers_of(item) for item in cast("list[Any]", value))
        return tuple(dict.fromkeys(answer for answers in nested for answer in answers))
    if isinstance(value, str) or (isinstance(value, int | float) and not isinstance(value, bool)):
        return (text_of_number(value),)
    raise ValueError(f"the answer {value!r:.60} is a {type(value).__name__}; an answer is a text")


# Relevant documents


def flagged(passages: Sequence[Passage], name: str) -> tuple[int, ...] | None:
    """Indices of the documents whose field ``name`` is true; ``None`` if no document has such a field.

    Raises:
        ValueError: If a value of the field is neither true nor false, or if only some documents have the field.
    """
    having = [_has(passage.fields, name) for passage in passages]
    if not any(having):
        return None
    if not all(having):
        raise ValueError(
            f"the field {name!r} marks some documents, and document {having.index(False)} has no such field; every "
            "document must have it, true or false"
        )
    flags = [value_at(passage.fields, name) for passage in passages]
    wrong = next((flag for flag in flags if flag not in (0, 1)), None)
    if wrong is not None or None in flags:
        raise ValueError(f"the field {name!r} of a document is {wrong!r:.40}; it must be true or false")
    return tuple(i for i, flag in enumerate(flags) if flag)


def relevant_of(value: Any, passages: Sequence[Passage], kind: RelevantKind | None = None) -> tuple[int, ...]:
    """Indices of the documents that a value names, in prompt order.

    The value is an index, an id, a title or a text, a list of them, or one boolean per document, as a number or a text
    too, such as ``0,1,0``.

    Args:
        value: The value; ``None`` or an empty value if no relevant document is known.
        passages: The documents.
        kind: The kind of the value; ``None`` to infer it.

    Raises:
        ValueError: If the value names no document, or could mean different documents.
    """
    value = decoded(value)
    if value is None or value == "" or (isinstance(value, Sequence) and not value):
        return ()
    listed = list(cast("Sequence[Any]", value)) if isinstance(value, list | tuple) else _separated(value)
    values = [whole(item) for item in listed]
    flags = _flags(_marks(values, passages, kind), len(passages), kind)
    if flags is not None:
        return tuple(i for i, flag in enumerate(flags) if flag)
    indices = {index for item in values for index in _matches(item, passages, kind)}
    return tuple(sorted(indices))


def _separated(value: Any) -> list[Any]:
    """Numbers in a text, such as ``0,2`` or ``0;2``, or the value itself."""
    if isinstance(value, str):
        for separator in (",", ";", "|"):
            parts = [part.strip() for part in value.split(separator)]
            if len(parts) > 1 and all(map(_INDEX.fullmatch, parts)):
                return list(parts)
    return [value]


_MARKS: Mapping[str, Any] = {"0": 0, "1": 1, "true": True, "false": False}
"""Texts that mark a document."""


def _marks(values: list[Any], passages: Sequence[Passage], kind: RelevantKind | None) -> list[Any]:
    """The values, with texts that can be marks as marks: ``1`` and ``0``, unless they are ids or titles of documents.

    If the values are flags, ``true`` and ``false`` are marks too.
    """
    texts = [value.strip().lower() for value in values if isinstance(value, str)]
    marks = _MARKS if kind == "flag" else {"0": 0, "1": 1}
    if kind not in (None, "flag") or len(texts) < len(values) or not marks.keys() >= set(texts):
        return values
    named = {name for passage in passages for name in (*passage.ids, passage.document.title.strip())}
    if kind is None and named & set(texts):
        return values
    return [marks[text] for text in texts]


def _flags(values: Sequence[Any], count: int, kind: RelevantKind | None) -> list[bool] | None:
    """One flag per document, if the values are such flags."""
    wanted = f"there must be one true or false for each of the {count} documents"
    if kind == "flag" or (kind is None and all(isinstance(value, bool) for value in values)):
        if len(values) != count or any(value not in (0, 1) for value in values):
            raise ValueError(f"the relevant documents are marked by {list(values)!r:.60}; {wanted}")
        return [bool(value) for value in values]
    numbers = [value for value in values if isinstance(value, int) and not isinstance(value, bool)]
    if kind is not None or len(numbers) < len(values) or len(values) != count or not set(numbers) <= {0, 1}:
        return None
    if len(values) == 1 and numbers == [0]:
        return None  # a list of one index
    # Each index once, or one index again and again.
    if count > 1 and len(set(numbers)) in (1, len(numbers)):
        raise ValueError(
            f"the relevant documents are {numbers}, which can be indices or one mark per document; "
            f"{_naming('index', 'flag')}"
        )
    return [bool(number) for number in numbers]


def _matches(item: Any, passages: Sequence[Passage], kind: RelevantKind | None) -> set[int]:
    """Indices of the documents that one value names.

    Raises:
        ValueError: If there is no such document, or if the value can mean different documents.
    """
    text = item.strip() if isinstance(item, str) else str(item)
    by_kind: dict[RelevantKind, set[int]] = {"index": _as_index(item, len(passages))}
    by_kind["id"] = {i for i, passage in enumerate(passages) if text in passage.ids}
    if isinstance(item, str):
        by_kind["title"] = {i for i, p in enumerate(passages) if p.document.title.strip() == text != ""}
        by_kind["text"] = {i for i, p in enumerate(passages) if p.document.text.strip() == text}
    meanings = {name: matches for name, matches in by_kind.items() if matches and kind in (None, name)}
    if not meanings:
        known = sorted({value for passage in passages for value in passage.ids})[:8]
        titles = [passage.document.title for passage in passages if passage.document.title.strip()][:8]
        raise ValueError(
            f"no document is {'' if kind is None else f'by its {kind} '}{item!r:.80}; there are the indices 0 to "
            f"{len(passages) - 1}, the ids {listed_names(known)} and the titles {listed_names(titles)}"
        )
    different = {frozenset(matches) for matches in meanings.values()}
    if len(different) > 1:
        first, second = list(meanings)[:2]
        raise ValueError(
            f"the relevant document {item!r:.60} can be meant by its {first} or by its {second}; "
            f"{_naming(first, second)}"
        )
    return next(iter(meanings.values()))


def _naming(first: str, second: str) -> str:
    return (
        f"give the column the name 'relevant_{first}' or 'relevant_{second}', or name it for that part: "
        f"columns={{'relevant_{first}': ...}}"
    )


def _as_index(item: Any, count: int) -> set[int]:
    """The value as an index of a document; empty if it is none."""
    if isinstance(item, str) and (match := _INDEX.fullmatch(item.strip())):
        number = int(match[1])
    elif isinstance(item, int) and not isinstance(item, bool):
        number = item
    else:
        return set()
    return {number} if 0 <= number < count else set()
