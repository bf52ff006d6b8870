"""Parsing and validation of the lines of a lost-in-the-middle file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias, TypeVar, cast

from focuslens.prompts.answers import normalize_answer
from focuslens.prompts.sample import Document
from focuslens.util.checks import checked_text

__all__ = ["Kind", "Record", "detect_kind", "parse_object", "parse_record"]

Kind: TypeAlias = Literal["retrieval", "placed", "oracle"]
"""Kind of a lost-in-the-middle file. The field ``ctxs`` of each record contains retrieved passages without the gold
passage (``retrieval``), the gold passage among other passages (``placed``), or only the gold passage (``oracle``)."""

Fields: TypeAlias = Mapping[str, object]

T = TypeVar("T")

_KINDS: Mapping[type, str] = {str: "a string", bool: "true or false", list: "a list", dict: "a JSON object"}


@dataclass(frozen=True)
class Record:
    """One question with its accepted answers and its passages.

    Args:
        question: The question.
        answers: The accepted answers that are not empty after normalisation.
        dropped: The accepted answers that are empty after normalisation. They cannot be used, because every prediction
            contains the empty string.
        gold: The passage that answers the question.
        distractors: The passages that can serve as distractors, in file order. Empty for an oracle file.
        gold_index: Index of the gold passage in ``ctxs``; -1 for retrieval results, which do not mark a gold passage.
    """

    question: str
    answers: tuple[str, ...]
    dropped: tuple[str, ...]
    gold: Document
    distractors: tuple[Document, ...]
    gold_index: int


def parse_object(line: bytes) -> Fields:
    """Parse one line as a JSON object.

    Raises:
        ValueError: If the line is not a JSON object.
    """
    try:
        value: object = json.loads(line)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"broken JSON ({error}); every line must hold one JSON object") from error
    return _fields(value, "the line")


def detect_kind(fields: Fields) -> Kind:
    """Infer the kind of a file from its first record.

    If no passage has the field ``isgold``, the file contains retrieval results. Otherwise, a record with one passage
    means an oracle file, and a record with several passages means a placed file.
    """
    passages = _passages(fields)
    if not any("isgold" in passage for passage in passages):
        return "retrieval"
    return "oracle" if len(passages) == 1 else "placed"


def parse_record(fields: Fields, kind: Kind) -> Record:
    """Convert the fields of one line to a :class:`Record`.

    Raises:
        ValueError: If a field is missing, empty or of the wrong type, if the record does not have exactly one gold
            passage, if a record of an oracle file has several passages, or if every answer is empty after
            normalisation. The message describes the invalid field.
    """
    question = _get(fields, "question", str)
    if not question.strip():
        raise ValueError("the field 'question' is empty; it must be the text of the question")
    answers, dropped = _answers(fields)
    passages = _passages(fields)
    documents = [_document(passage, f"ctxs[{i}]") for i, passage in enumerate(passages)]
    if kind == "retrieval":
        wrong = [not _get(passage, "hasanswer", bool, f"ctxs[{i}]") for i, passage in enumerate(passages)]
        distractors = tuple(document for document, usable in zip(documents, wrong, strict=True) if usable)
        return Record(question, answers, dropped, _annotated_gold(fields), distractors, -1)
    if kind == "oracle" and len(passages) > 1:
        raise ValueError(
            f"{len(passages)} passages in 'ctxs', but the file's first line has one; this line must have one too"
        )
    place = _gold_index(passages)
    gold = documents.pop(place)
    return Record(question, answers, dropped, gold, tuple(documents), place)


def _answers(fields: Fields) -> tuple[tuple[str, ...], tuple[str, ...]]:
    values = cast("list[object]", _get(fields, "answers", list))
    for i, value in enumerate(values):
        if not isinstance(value, str):
            raise ValueError(f"answers[{i}] is {_short(value)}; it must be a string")
        checked_text(value, f"answers[{i}]")
    answers = cast("list[str]", values)
    usable = tuple(answer for answer in answers if normalize_answer(answer))
    if not usable:
        raise ValueError(
            f"no usable answer in {answers}: an answer that is nothing but punctuation, articles and spaces "
            "normalises to nothing, which every prediction contains; give at least one other"
        )
    return usable, tuple(answer for answer in answers if answer not in usable)


def _passages(fields: Fields) -> list[Fields]:
    values = cast("list[object]", _get(fields, "ctxs", list))
    if not values:
        raise ValueError("the field 'ctxs' is empty; it must hold at least one passage")
    return [_fields(value, f"ctxs[{i}]") for i, value in enumerate(values)]


def _document(passage: Fields, where: str) -> Document:
    return _titled(passage, _get(passage, "text", str, where), where)


def _titled(fields: Fields, text: str, where: str) -> Document:
    """Document with a text and the title in ``fields``, which can be missing, ``null`` or empty.

    Raises:
        ValueError: If there is no title but a field of almost the same name, whose titles would be lost.
    """
    similar = [name for name in fields if "title" not in fields and "title" in name.lower()]
    if similar:
        raise ValueError(f"{where} has the field {similar[0]!r} and no 'title'; name the field of titles 'title'")
    title = "" if fields.get("title") is None else _get(fields, "title", str, where)
    try:
        return Document(title, text)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _annotated_gold(fields: Fields) -> Document:
    where = "nq_annotated_gold"
    try:
        annotation = cast("Fields", _get(fields, where, dict))
        return _titled(annotation, _get(annotation, "chunked_long_answer", str, where), where)
    except ValueError as error:
        raise ValueError(f"no gold passage: {error}") from error


def _gold_index(passages: list[Fields]) -> int:
    gold = [i for i, passage in enumerate(passages) if _get(passage, "isgold", bool, f"ctxs[{i}]")]
    if not gold:
        raise ValueError("no gold passage: 'isgold' is false for all of 'ctxs'; it must be true for exactly one")
    if len(gold) > 1:
        raise ValueError(f"more than one gold passage: 'isgold' is true for ctxs {gold}; it must be true for one only")
    return gold[0]


def _get(fields: Fields, name: str, kind: type[T], where: str = "") -> T:
    inside = f" in {where}" if where else ""
    if name not in fields:
        raise ValueError(f"the field {name!r} is missing{inside}; there are {', '.join(map(repr, fields)) or 'none'}")
    value = fields[name]
    if not isinstance(value, kind):
        raise ValueError(f"the field {name!r}{inside} is {_short(value)}; it must be {_KINDS[kind]}")
    if isinstance(value, str):
        checked_text(value, f"the field {name!r}{inside}")
    return value


def _fields(value: object, where: str) -> Fields:
    if not isinstance(value, dict):
        raise ValueError(f"{where} is {_short(value)}; it must be {_KINDS[dict]}")
    return cast("Fields", value)


def _short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
