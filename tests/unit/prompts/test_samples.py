"""Samples check their fields when they are made, and say which field is wrong."""

from __future__ import annotations

import pickle
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import focuslens as fl
from focuslens.prompts.answers import answered_right, require_answers

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


@pytest.mark.parametrize(("title", "text"), [("", ""), (" ", "\n")])
def test_a_document_without_a_title_and_a_text_is_refused(title: str, text: str) -> None:
    with pytest.raises(ValueError, match="a document has neither a title nor a text"):
        fl.Document(title, text)


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


THREE = (*GOOD, fl.Document("c", "three"))


def test_several_gold_documents() -> None:
    sample = sample_with(documents=THREE, gold_index=None, gold_indices=[2, np.int64(0)])
    assert (sample.gold_index, sample.gold_indices) == (2, (2, 0))
    assert sample.id.endswith("@2+0")
    assert sample.prompt().part("relevant") == ("(Title: a) one", "(Title: c) three")
    assert sample.prompt("gold").part("document") == ("(Title: a) one", "(Title: c) three")
    assert sample.prompt("negative").part("document") == ("(Title: b) two",)
    assert "gold_indices=(2, 0)" in repr(sample)
    assert "documents 3 and 1 are relevant" in sample._repr_html_()
    assert sample_with(gold_index=1).gold_indices == (1,)
    assert sample_with(gold_index=None).gold_indices == ()
    assert sample_with(gold_index=1, gold_indices=(1,)) == sample_with(gold_index=1)
    every = sample_with(gold_index=0, gold_indices=(0, 1))
    with pytest.raises(ValueError, match="the gold documents are all there are, so nothing is left for the 'negative'"):
        every.prompt("negative")


def test_replace_changes_the_gold_documents() -> None:
    sample = sample_with(documents=THREE, gold_index=0, gold_indices=(0, 2))
    assert replace(sample, question="r?").gold_indices == (0, 2)
    assert replace(sample, gold_index=1).gold_indices == (1,)
    assert replace(sample, gold_index=None).gold_indices == ()
    assert replace(sample, gold_index=None, gold_indices=(1, 2)).gold_index == 1
    assert pickle.loads(pickle.dumps(sample)) == sample
    assert replace(pickle.loads(pickle.dumps(sample)), gold_index=1).gold_indices == (1,)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"gold_indices": (0, 2)}, ValueError, "gold_indices is 2, but there are 2 documents: it must be 0 to 1"),
        ({"gold_indices": (0, 0)}, ValueError, r"gold_indices is \(0, 0\), which names a document twice"),
        (
            {"gold_indices": (1,)},
            ValueError,
            r"gold_index is 0, but the first of gold_indices \(1,\) is 1; give gold_ind",
        ),
        ({"gold_indices": "01"}, TypeError, "gold_indices is '01'; it must be a sequence of integers"),
        ({"gold_indices": (True,)}, TypeError, r"gold_indices\[0\] is True, a bool"),
        ({"template": "x"}, TypeError, "template is 'x', a str; it must be a PromptTemplate, or None"),
        ({"messages": ["hello"]}, TypeError, r"messages\[0\] is 'hello', without a 'role'"),
    ],
)
def test_other_fields_are_checked(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        sample_with(**changes)


def test_a_sample_without_answers_is_refused_by_name_where_answers_are_needed() -> None:
    samples = [sample_with(), sample_with(answers=(), question_id="none")]
    assert samples[1].answers == ()
    assert answered_right(["x", "x"], samples) == (True, False)
    require_answers(samples[:1], "an evaluation")
    with pytest.raises(
        ValueError, match=r"sample 'none@0' has no accepted answers \(1 of 2 samples\), and an evaluation"
    ):
        require_answers(samples, "an evaluation")
