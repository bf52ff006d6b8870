"""The answer metric against hand-computed cases of the SQuAD rules."""

from __future__ import annotations

import string

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from focuslens.prompts.answers import answered_right, normalize_answer, require_samples, sub_exact_match
from focuslens.prompts.sample import Document, MultiDocSample


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The Eiffel Tower!", "eiffel tower"),
        ("  a  cat,   an owl \n and the dog\t", "cat owl and dog"),
        ("U.S.A.", "usa"),  # removed punctuation leaves no space
        ("Jean-Paul's", "jeanpauls"),
        ("A.", ""),  # punctuation is removed first, and the remaining "a" is an article
        ("t.h.e", ""),
        ("Athena theatre banana", "athena theatre banana"),  # articles are whole words
        ("the-an", "thean"),
        ("“the” dash — stays", "“ ” dash — stays"),  # the article is removed, but non-ASCII punctuation stays
        ("İstanbul".lower(), "i̇stanbul"),
        ("!!!", ""),
        ("The", ""),
        ("", ""),
        ("1.5%", "15"),
        ("non\u00a0breaking", "non breaking"),
    ],
)
def test_normalize_answer_follows_the_squad_steps(text: str, expected: str) -> None:
    assert normalize_answer(text) == expected


@given(st.text(alphabet=string.printable))
def test_normalize_answer_leaves_nothing_to_remove(text: str) -> None:
    words = normalize_answer(text).split(" ")
    assert not set("".join(words)) & set(string.punctuation + string.whitespace + string.ascii_uppercase)
    assert not {"a", "an", "the"} & set(words)
    assert words == [""] or "" not in words


@given(st.text())
def test_normalize_answer_twice_is_once(text: str) -> None:
    once = normalize_answer(text)
    assert normalize_answer(once) == once


@pytest.mark.parametrize(
    ("prediction", "answers", "expected"),
    [
        ("It was Wilhelm Conrad Röntgen, in 1901.", ["Wilhelm Conrad Röntgen"], True),
        ("It was wilhelm  conrad RÖNTGEN", ["Nobody", "The Wilhelm Conrad Röntgen."], True),
        ("Röntgen", ["Wilhelm Conrad Röntgen"], False),  # the prediction must contain the answer, not the reverse
        ("a party", ["art"], True),  # matches characters, not words
        ("In the United States", ["united states of america", "U.S."], False),
        ("the U.S. of A.", ["US"], True),
        ("new the york", ["New York"], True),  # normalization of the prediction joins the words
        ("", ["Paris"], False),
        ("!!!", ["Paris"], False),
    ],
)
def test_sub_exact_match_by_hand(prediction: str, answers: list[str], expected: bool) -> None:
    assert sub_exact_match(prediction, answers) is expected


@given(st.text(), st.text(), st.text(min_size=1))
def test_an_answer_set_apart_in_the_prediction_matches(before: str, after: str, answer: str) -> None:
    assume(normalize_answer(answer))
    assert sub_exact_match(f"{before} {answer} {after}", [answer])


@pytest.mark.parametrize("empty", ["", "The", "!!!", " a. ", "*"])
def test_an_answer_that_normalises_to_nothing_is_refused_by_name(empty: str) -> None:
    with pytest.raises(ValueError, match="is empty after normalisation") as caught:
        sub_exact_match("anything", ["Paris", empty])
    assert repr(empty) in str(caught.value)
    with pytest.raises(ValueError, match="is empty after normalisation"):
        sub_exact_match("Paris", ["Paris", empty])  # also if an earlier answer matches


def test_one_string_for_answers_is_refused() -> None:
    with pytest.raises(TypeError, match="'Paris'"):
        sub_exact_match("P", "Paris")


def test_no_answers_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        sub_exact_match("Paris", [])


def test_samples_are_checked_before_anything_is_run() -> None:
    samples = [MultiDocSample(f"{one}?", (one,), (Document("t", f"It is {one}."),), 0) for one in ("red", "blue")]
    assert require_samples(iter(samples)) == samples
    assert answered_right(["It is red.", "It is red."], samples) == (True, False)
    with pytest.raises(ValueError, match="there are no samples to score"):
        require_samples(iter([]))
    with pytest.raises(ValueError, match="the answer 'The' is empty after normalisation"):
        require_samples([*samples, MultiDocSample("?", ("The",), (Document("t", "x"),), 0)])
