"""Exact wording of the prompts, and the character ranges of their parts."""

from __future__ import annotations

import copy
import pickle
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from focuslens import Document, MultiDocSample, Prompt

SAMPLE = MultiDocSample(
    question="who is it?",
    answers=("Nobody",),
    documents=(Document("One", "First."), Document("Zwölf Ü", "naïve 東京 🦊."), Document("", "Third")),
    gold_index=1,
    question_id="q7",
)

INSTRUCTION = (
    "Write a high-quality answer for the given question using only the provided search results "
    "(some of which might be irrelevant)."
)

LONG = f"""{INSTRUCTION}

Document [1](Title: One) First.
Document [2](Title: Zwölf Ü) naïve 東京 🦊.
Document [3] Third

Question: who is it?
Answer:"""

GOLD = f"""{INSTRUCTION}

Document [2](Title: Zwölf Ü) naïve 東京 🦊.

Question: who is it?
Answer:"""

NEGATIVE = f"""{INSTRUCTION}

Document [1](Title: One) First.
Document [3] Third

Question: who is it?
Answer:"""

ONE, TWO, THREE = "(Title: One) First.", "(Title: Zwölf Ü) naïve 東京 🦊.", "Third"


@pytest.mark.parametrize(("case", "text"), [("long", LONG), ("gold", GOLD), ("negative", NEGATIVE)])
def test_the_text_of_each_case(case: Any, text: str) -> None:
    assert SAMPLE.prompt(case) == text


def test_the_long_prompt_is_the_default() -> None:
    assert SAMPLE.prompt() == LONG


@pytest.mark.parametrize(
    ("case", "parts"),
    [
        ("long", {"document": (ONE, TWO, THREE), "relevant": (TWO,), "irrelevant": (ONE, THREE)}),
        ("gold", {"document": (TWO,), "relevant": (TWO,), "irrelevant": ()}),
        ("negative", {"document": (ONE, THREE), "relevant": (), "irrelevant": (ONE, THREE)}),
    ],
)
def test_spans_slice_the_parts_out_of_the_text(case: Any, parts: dict[str, tuple[str, ...]]) -> None:
    prompt = SAMPLE.prompt(case)
    expected = {"instruction": (INSTRUCTION,), "question": ("who is it?",), **parts}
    assert {name: prompt.part(name) for name in prompt.spans} == expected
    assert {name: tuple(str(prompt)[a:b] for a, b in ranges) for name, ranges in prompt.spans.items()} == expected


@pytest.mark.parametrize("title", ["", " ", "\n"])
def test_a_document_without_a_title_is_its_text_after_the_number(title: str) -> None:
    documents = (Document(title, "First."), Document("Two", ""), Document(title, "(Title: x) Third."))
    prompt = MultiDocSample("q?", ("a",), documents, 0).prompt()
    lines = "Document [1] First.\nDocument [2](Title: Two) \nDocument [3] (Title: x) Third."
    assert prompt == f"{INSTRUCTION}\n\n{lines}\n\nQuestion: q?\nAnswer:"
    assert prompt.part("document") == ("First.", "(Title: Two) ", "(Title: x) Third.")
    assert str(documents[0]) == "First."


@pytest.mark.parametrize("name", ["llama", "qwen2", "llama_chat"])
def test_tokens_of_documents_without_titles_are_theirs_alone(name: str, load_model: Any) -> None:
    encoder = load_model(name).encoder
    texts = ("red roofs.", "blue seas.", "green hills.")
    sample = MultiDocSample("which?", ("a",), tuple(Document("", text) for text in texts), 1)
    prompt = encoder.encode(sample.prompt())
    decoded = [encoder.tokenizer.decode(prompt.tokens[start:end]) for start, end in prompt.spans["document"]]
    assert [text.removeprefix(" ") for text in decoded] == list(texts)
    assert prompt.spans["relevant"] == prompt.spans["document"][1:2]


_TEXTS = st.text(min_size=1, max_size=12)


@settings(max_examples=40)
@given(
    st.lists(st.tuples(_TEXTS | st.sampled_from(["", " "]), _TEXTS), min_size=2, max_size=5).filter(
        lambda documents: all((title + text).strip() for title, text in documents)
    ),
    _TEXTS,
    st.data(),
)
def test_any_text_has_exact_spans(documents: list[tuple[str, str]], question: str, data: st.DataObject) -> None:
    gold = data.draw(st.integers(0, len(documents) - 1))
    shown = tuple(Document(title, text) for title, text in documents)
    sample = MultiDocSample(question=question, answers=("a",), documents=shown, gold_index=gold)
    texts = [f"(Title: {title}) {text}" if title.strip() else text for title, text in documents]
    prompt = sample.prompt("long")
    assert prompt.part("document") == tuple(texts)
    assert prompt.part("relevant") == (texts[gold],)
    assert prompt.part("irrelevant") == tuple(texts[:gold] + texts[gold + 1 :])
    assert prompt.part("question") == (question,)
    numbers_shown = {"gold": [gold], "negative": [i for i in range(len(texts)) if i != gold]}
    for case, numbers in numbers_shown.items():
        shorter = sample.prompt(cast("Any", case))
        for (start, end), number in zip(shorter.spans["document"], numbers, strict=True):
            space = "" if documents[number][0].strip() else " "
            assert shorter[:start].endswith(f"Document [{number + 1}]{space}")
            assert shorter[start:end] == texts[number]


def test_a_prompt_is_an_ordinary_string() -> None:
    prompt = Prompt("tell me", {"what": [(5, 7)]})
    assert isinstance(prompt, str)
    assert prompt == "tell me"
    assert hash(prompt) == hash("tell me")
    assert prompt.upper() == "TELL ME"
    assert type(str(prompt)) is str
    assert type(prompt.text) is str
    assert f"{prompt}!" == "tell me!"


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_prompt_survives_pickling_with_its_spans(protocol: int) -> None:
    prompt = SAMPLE.prompt("long")
    again = pickle.loads(pickle.dumps(prompt, protocol))
    assert type(again) is Prompt
    assert (again, again.spans) == (LONG, prompt.spans)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_a_prompt_survives_copying_with_its_spans(copied: Any) -> None:
    again = copied(SAMPLE.prompt("gold"))
    assert type(again) is Prompt
    assert (again, again.part("relevant")) == (GOLD, (TWO,))


@pytest.mark.parametrize("span", [(0, 0), (3, 2), (-1, 2), (0, 5), (4, 5), (5, 4)])
def test_a_span_outside_the_text_is_refused(span: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=rf"'x' = \({span[0]}, {span[1]}\) does not lie in a text of 4 characters"):
        Prompt("four", {"x": [(0, 1), span]})


def test_spans_reach_to_the_ends_of_the_text() -> None:
    assert Prompt("four", {"x": [(0, 4), (3, 4)]}).part("x") == ("four", "r")
    assert Prompt("four").spans == {}


def test_an_unknown_part_is_refused_with_those_there_are() -> None:
    with pytest.raises(KeyError, match=r"no span 'z'; it has \['x', 'y'\]"):
        Prompt("four", {"y": [(0, 1)], "x": [(1, 2)]}).part("z")


def test_a_document_prints_as_it_stands_in_the_prompt() -> None:
    assert str(Document(title="Title", text="Text.")) == "(Title: Title) Text."


def test_a_sample_is_named_by_question_and_gold_position() -> None:
    assert SAMPLE.id == "q7@1"
    assert MultiDocSample("q", ("a",), SAMPLE.documents, None, "q8").id == "q8@None"


@pytest.mark.usefixtures("unchecked")
def test_lists_become_tuples() -> None:
    sample = MultiDocSample("q", cast("Any", ["a"]), cast("Any", [Document("t", "x")]), 0)
    assert sample.answers == ("a",)
    assert sample.documents == (Document("t", "x"),)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"answers": "Paris"}, TypeError, "answers is the str 'Paris'"),
        ({"documents": ()}, ValueError, "'q' has no documents"),
        ({"gold_index": 1}, ValueError, "gold_index is 1, but there are 1 documents: it must be 0 to 0, or None"),
        ({"gold_index": -1}, ValueError, "gold_index is -1"),
        (
            {"gold_index": [0, 1]},
            TypeError,
            r"gold_index is \[0, 1\], a list; it must be an integer, the position of one",
        ),
        ({"gold_index": True}, TypeError, "gold_index is True, a bool; it must be an integer"),
        ({"gold_index": 0.0}, TypeError, "gold_index is 0.0, a float; it must be an integer"),
        ({"gold_index": "0"}, TypeError, "gold_index is '0', a str; it must be an integer"),
    ],
)
def test_a_sample_that_makes_no_sense_is_refused(change: dict[str, Any], error: type[Exception], message: str) -> None:
    given: dict[str, Any] = {"question": "q", "answers": ("a",), "documents": (Document("t", "x"),), "gold_index": 0}
    with pytest.raises(error, match=message):
        MultiDocSample(**{**given, **change})


@pytest.mark.usefixtures("unchecked")
def test_cases_that_a_sample_does_not_have_are_refused() -> None:
    without_gold = MultiDocSample("q", ("a",), SAMPLE.documents, None)
    assert without_gold.prompt("long").part("irrelevant") == (ONE, TWO, THREE)
    for case in ("gold", "negative"):
        with pytest.raises(ValueError, match=f"no gold document, so it has no '{case}' prompt"):
            without_gold.prompt(case)
    with pytest.raises(ValueError, match="nothing is left for the 'negative' prompt"):
        MultiDocSample("q", ("a",), (Document("t", "x"),), 0).prompt("negative")
    with pytest.raises(ValueError, match="case is 'short'; it must be one of long, gold, negative"):
        SAMPLE.prompt(cast("Any", "short"))
