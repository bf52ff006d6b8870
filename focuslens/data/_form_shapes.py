"""Shapes of the fields of known data sets, by which their rows are told from rows with columns of the user's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn, TypeGuard, cast

from focuslens.data._cells import decoded, listed_names
from focuslens.data._rows import Row

__all__ = ["are_articles", "cell_of", "check_hotpotqa", "check_kilt", "check_rgb", "check_squad", "required", "text_of"]


def required(row: Mapping[str, Any], name: str) -> Any:
    """Value of a field.

    Raises:
        ValueError: If the field is missing.
    """
    if row.get(name) is None:
        raise ValueError(f"the field {name!r} is missing; there are {listed_names(row)}")
    return row[name]


def text_of(row: Row, name: str) -> str:
    """Text of a field.

    Raises:
        ValueError: If the field is missing, or is no text, or an empty one.
    """
    value = required(row, name)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"the field {name!r} is {value!r:.60}; it must be a text that is not empty")
    return value


def cell_of(row: Row, name: str) -> Any:
    """Value of a field, which may be a list or an object in JSON.

    Raises:
        ValueError: If the field is missing, or is a list that cannot be read.
    """
    try:
        return decoded(required(row, name))
    except ValueError as error:
        raise ValueError(str(error) if repr(name) in str(error) else f"the field {name!r}: {error}") from error


def check_hotpotqa(row: Row) -> None:
    """Check that ``context`` has pairs of title and sentences, and that ``supporting_facts`` names titles.

    Raises:
        ValueError: If they are of another shape. The message names the field.
    """
    context, facts = cell_of(row, "context"), cell_of(row, "supporting_facts")
    if isinstance(context, Mapping):
        columned = cast("Mapping[str, Any]", context)
        titles, texts = columned.get("title"), columned.get("sentences")
        if not (_are_texts(titles) and _is_list(texts) and len(titles) == len(texts) and all(map(_is_text, texts))):
            _refuse("context", context, "an object with as many lists of sentences as titles")
    else:
        _check_pairs("context", context, "a title and a list of sentences", _is_text)
    if isinstance(facts, Mapping):
        if not _are_texts(cast("Mapping[str, Any]", facts).get("title")):
            _refuse("supporting_facts", facts, "an object with a list of titles, 'title'")
    else:
        _check_pairs("supporting_facts", facts, "a title and the number of a sentence", _is_number)


def _check_pairs(name: str, value: Any, wanted: str, second_fits: Any) -> None:
    if not _is_list(value):
        _refuse(name, value, f"a list of pairs of {wanted}")
    for i, entry in enumerate(value):
        fits = _is_list(entry) and len(entry) == 2 and isinstance(entry[0], str) and second_fits(entry[1])
        if not fits:
            _refuse(f"{name}[{i}]", entry, f"a pair of {wanted}")


def check_squad(row: Row) -> None:
    """Check that ``context`` is a text, and that ``answers`` has texts with their places in it.

    Raises:
        ValueError: If they are of another shape. The message names the field.
    """
    context, answers = cell_of(row, "context"), cell_of(row, "answers")
    if not isinstance(context, str):
        _refuse("context", context, "a text, the one paragraph with the answer")
    if _is_list(answers):
        fits = all(isinstance(answer, Mapping) and _is_placed(cast("Mapping[str, Any]", answer)) for answer in answers)
    else:
        fits = isinstance(answers, Mapping) and _is_placed(cast("Mapping[str, Any]", answers))
    if not fits:
        _refuse("answers", answers, "an object with 'text' and 'answer_start', or a list of such objects")


def _is_placed(answers: Mapping[str, Any]) -> bool:
    return "text" in answers and "answer_start" in answers


def are_articles(row: Row) -> bool:
    """Whether a row is an article of SQuAD's original files, whose paragraphs have questions (``qas``)."""
    paragraphs = row.get("paragraphs")
    return _is_list(paragraphs) and bool(paragraphs) and all(map(_has_questions, paragraphs))


def _has_questions(paragraph: Any) -> bool:
    return isinstance(paragraph, Mapping) and _is_list(cast("Mapping[str, Any]", paragraph).get("qas"))


def check_kilt(row: Row) -> None:
    """Check that ``output`` is a list of objects with an answer, or with the pages that contain it.

    Raises:
        ValueError: If it is of another shape. The message names the field.
    """
    outputs = cell_of(row, "output")
    wanted = "an object with 'answer' or 'provenance'"
    if not _is_list(outputs):
        _refuse("output", outputs, f"a list, each entry {wanted}")
    for i, output in enumerate(outputs):
        if not isinstance(output, Mapping) or not ("answer" in output or "provenance" in output):
            _refuse(f"output[{i}]", output, wanted)
        pages = cast("Mapping[str, Any]", output).get("provenance")
        if pages is not None and not (_is_list(pages) and all(isinstance(page, Mapping) for page in pages)):
            _refuse(f"output[{i}]['provenance']", pages, "a list of objects, one for each page")
        for page in cast("Sequence[Mapping[str, Any]]", pages or ()):
            if not isinstance(page.get("meta"), Mapping | None):
                _refuse(f"output[{i}]['provenance'] 'meta'", page["meta"], "an object")


def check_rgb(row: Row) -> None:
    """Check that ``positive`` and ``negative`` are lists of texts, or have one list of texts for each fact.

    Raises:
        ValueError: If they are of another shape. The message names the field.
    """
    required(row, "answer")
    for name in ("positive", "negative"):
        value = cell_of(row, name)
        if not _is_list(value) or not all(isinstance(entry, str) or _are_texts(entry) for entry in value):
            _refuse(name, value, "a list of texts, or of one list of texts for each fact")


def _is_list(value: Any) -> TypeGuard[Sequence[Any]]:
    return isinstance(value, list | tuple)


def _are_texts(value: Any) -> TypeGuard[Sequence[str]]:
    return _is_list(value) and all(isinstance(entry, str) for entry in value)


def _is_text(value: Any) -> bool:
    """Whether a paragraph is a text, or a list of sentences."""
    return isinstance(value, str) or _are_texts(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _refuse(name: str, value: Any, wanted: str) -> NoReturn:
    raise ValueError(f"the field {name!r} is {value!r:.60}; it must be {wanted}")
