"""Parsing and checking of one line of a lost-in-the-middle file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias, TypeVar, cast

from focuslens.prompts.answers import normalize_answer
from focuslens.prompts.prompt import Document

__all__ = ["Kind", "Record", "detect_kind", "parse_object", "parse_record"]

Kind: TypeAlias = Literal["retrieval", "placed", "oracle"]
"""Kind of a file. Its records hold retrieved passages without the gold passage (``retrieval``), several passages with
the gold passage among them (``placed``), or the gold passage alone (``oracle``)."""

Fields: TypeAlias = Mapping[str, object]

T = TypeVar("T")

_KINDS: Mapping[type, str] = {str: "a string", bool: "true or false", list: "a list", dict: "a JSON object"}


@dataclass(frozen=True)
class Record:
    """One question with its passages.

    Args:
        question: The question.
        answers: The accepted answers that do not normalise to the empty string.
        dropped: The accepted answers that normalise to the empty string, which every prediction contains.
        gold: The passage that answers the question.
        distractors: The passages that can be distractors, in the order of the file; none in an oracle file.
        gold_index: Index of the gold passage in ``ctxs``; -1 if ``ctxs`` lacks it, as in retrieval results.
    """

    question: str
    answers: tuple[str, ...]
    dropped: tuple[str, ...]
    gold: Document
    distractors: tuple[Document, ...]
    gold_index: int


def parse_object(line: bytes) -> Fields:
    """Parse the JSON object on one line.

    Raises:
        ValueError: If the line does not hold a JSON object.
    """
    try:
        value: object = json.loads(line)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        problem = "the line is blank" if not line.strip() else f"broken JSON ({error})"
        raise ValueError(f"{problem}; every line must hold one JSON object") from error
    return _fields(value, "the line")


def detect_kind(fields: Fields) -> Kind:
    """Kind of a record's file. Retrieval results have no ``isgold``, and an oracle file has one passage per record."""
    passages = _passages(fields)
    if not any("isgold" in passage for passage in passages):
        return "retrieval"
    return "oracle" if len(passages) == 1 else "placed"


def parse_record(fields: Fields, kind: Kind) -> Record:
    """Read the question, the answers and the passages of one record.

    Raises:
        ValueError: If a field is missing or of the wrong type, if there is not exactly one gold passage, or if no
            answer is usable. The message names the field.
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
        raise ValueError(f"{len(passages)} passages in 'ctxs', but the file's first line has one; it must be one here")
    place = _gold_index(passages)
    gold = documents.pop(place)
    return Record(question, answers, dropped, gold, tuple(documents), place)


def _answers(fields: Fields) -> tuple[tuple[str, ...], tuple[str, ...]]:
    values = cast("list[object]", _get(fields, "answers", list))
    for i, value in enumerate(values):
        if not isinstance(value, str):
            raise ValueError(f"answers[{i}] is {_short(value)}; it must be a string")
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
    return Document(_get(passage, "title", str, where), _get(passage, "text", str, where))


def _annotated_gold(fields: Fields) -> Document:
    where = "nq_annotated_gold"
    try:
        annotation = cast("Fields", _get(fields, where, dict))
        return Document(_get(annotation, "title", str, where), _get(annotation, "chunked_long_answer", str, where))
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
    return value


def _fields(value: object, where: str) -> Fields:
    if not isinstance(value, dict):
        raise ValueError(f"{where} is {_short(value)}; it must be {_KINDS[dict]}")
    return cast("Fields", value)


def _short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
