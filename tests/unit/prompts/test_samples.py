"""Samples check their fields when they are made, and say which field is wrong."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import focuslens as fl

GOOD = (fl.Document("a", "one"), fl.Document("b", "two"))
SAMPLE: dict[str, Any] = {"question": "q?", "answers": ("x",), "documents": GOOD, "gold_index": 0}


def sample_with(**changes: Any) -> fl.MultiDocSample:
    fields: dict[str, Any] = {**SAMPLE, **changes}
    return fl.MultiDocSample(**fields)


pytestmark = pytest.mark.usefixtures("unchecked")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"question": None}, "question is None, a NoneType; it must be a string"),
        ({"answers": (None,)}, r"answers\[0\] is None, a NoneType; it must be a string"),
        ({"answers": ("x", 1932)}, r"answers\[1\] is 1932, a int; it must be a string"),
        ({"answers": None}, "answers is the NoneType None; it must be a sequence"),
        ({"documents": "abc"}, "documents is the str 'abc'; it must be a sequence, such as a list"),
        ({"documents": ["a", "b"]}, r"documents\[0\] is a str; it must be a Document: Document\(title, text\)"),
        ({"documents": [{"title": "a", "text": "b"}]}, r"documents\[0\] is a dict; it must be a Document"),
        ({"documents": {"title": "a"}}, "documents is the dict .*; it must be a sequence"),
        ({"gold_index": 1.0}, "gold_index is 1.0, a float; it must be an integer"),
        ({"gold_index": [0, 1]}, r"gold_index is \[0, 1\], a list; it must be an integer"),
        ({"name": 3}, "name is 3, a int; it must be a string"),
    ],
)
def test_a_field_of_another_type_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        sample_with(**changes)


@pytest.mark.parametrize("title", [float("nan"), None, 7])
def test_a_document_needs_strings(title: Any) -> None:
    with pytest.raises(TypeError, match="title is "):
        fl.Document(title, "text")
    with pytest.raises(TypeError, match="text is "):
        fl.Document("title", title)


@pytest.mark.parametrize("question", ["", "  \n"])
def test_an_empty_question_is_refused(question: str) -> None:
    with pytest.raises(ValueError, match="question is empty"):
        sample_with(question=question)


def test_half_of_a_surrogate_pair_is_refused_where_it_is_given() -> None:
    broken = "a cut emoji \ud83d"
    message = r"contains half of a surrogate pair at character 12 \('\\ud83d'\)"
    with pytest.raises(ValueError, match=f"text {message}"):
        fl.Document("a", broken)
    with pytest.raises(ValueError, match=f"question {message}"):
        sample_with(question=broken)
    with pytest.raises(ValueError, match=rf"answers\[1\] {message}"):
        sample_with(answers=["x", broken])


def test_integers_of_numpy_make_the_same_sample() -> None:
    sample = sample_with(gold_index=np.int64(1))
    assert type(sample.gold_index) is int
    assert sample == sample_with(gold_index=1)
    assert sample.id == sample_with(gold_index=1).id
