"""Needle-in-a-haystack prompts: the needle's position, the length of the haystack, and the span of the needle."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import focuslens as fl
from focuslens import Needle, NeedleSample, Prompt
from focuslens.data.needles import _planted
from tests.support.paths import SHARED_DATA

DATA = SHARED_DATA / "haystack"

NEEDLE = Needle("who?", "The cat sat.", "cat sat")
HAYSTACK = "a b c. d e f. g h i! j k l? m n o."
LINE = {"needle": "The cat sat.", "question": "who?", "real_needle": "cat sat"}


@pytest.fixture(scope="module")
def words() -> Any:
    """A tokenizer whose tokens are words separated by spaces."""
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")


def book(prompt: Prompt) -> str:
    return prompt.text.split("<book>")[1].split("</book>")[0]


# --- position of the needle -------------------------------------------------------------------------------------------


def test_the_wording(words: Any) -> None:
    (sample,) = fl.needle_samples(words, HAYSTACK, [NEEDLE], [9], [0.5])
    assert sample.prompt == (
        "<book>a b c. The cat sat. d e f.</book>\nBased on the content of the book, Question: who?\nAnswer:"
    )
    assert sample.prompt.spans == {"needle": ((13, 25),), "question": ((84, 88),), "answer": ((17, 24),)}
    assert [sample.prompt.part(name) for name in ("needle", "question", "answer")] == [
        ("The cat sat.",),
        ("who?",),
        ("cat sat",),
    ]
    assert (sample.reference, sample.length, sample.depth, sample.id) == ("cat sat", 9, 0.5, "needle-0@9/0.5")


@pytest.mark.parametrize(
    ("length", "depth", "expected"),
    [
        (12, 0, "The cat sat. a b c. d e f. g h i!"),
        (12, 0.3, "The cat sat. a b c. d e f. g h i!"),  # after 2 of 9 tokens: no sentence ends before the depth
        (12, 0.34, "a b c. The cat sat. d e f. g h i!"),  # after 3 of 9 tokens: the first sentence ends at the depth
        (12, 0.66, "a b c. The cat sat. d e f. g h i!"),  # after 5 of 9 tokens
        (12, 0.67, "a b c. d e f. The cat sat. g h i!"),  # after 6 of 9 tokens
        (12, 0.99, "a b c. d e f. The cat sat. g h i!"),  # after 8 of 9 tokens
        (12, 1, "a b c. d e f. g h i! The cat sat."),
        (11, 1, "a b c. d e f. g h The cat sat."),  # at the end, although the haystack is cut inside a sentence
        (18, 0.9, "a b c. d e f. g h i! j k l? The cat sat. m n o."),
        (4, 0.5, "The cat sat. a"),
    ],
)
def test_the_needle_follows_the_last_sentence_before_its_depth(
    length: int, depth: float, expected: str, words: Any
) -> None:
    (sample,) = fl.needle_samples(words, HAYSTACK, [NEEDLE], [length], [depth])
    assert book(sample.prompt) == expected
    assert len(expected.split()) == length
    assert sample.prompt.part("needle") == ("The cat sat.",)


def test_what_ends_a_sentence(words: Any) -> None:
    haystack = 'pi is 3.14 or so "really." (yes.) e.g.so 5 6'
    (sample,) = fl.needle_samples(words, haystack, [NEEDLE], [13], [0.99])
    assert book(sample.prompt) == 'pi is 3.14 or so "really." (yes.) The cat sat. e.g.so 5 6'
    (sample,) = fl.needle_samples(words, haystack, [NEEDLE], [13], [0.6])
    assert book(sample.prompt) == 'pi is 3.14 or so "really." The cat sat. (yes.) e.g.so 5 6'


def test_needles_lengths_and_depths_are_swept(words: Any) -> None:
    other = Needle("where?", "On a mat.", "a mat")
    samples = fl.needle_samples(words, HAYSTACK, [NEEDLE, other], [6, 12], [0, 1])
    assert [(one.reference, one.length, one.depth) for one in samples] == [
        (needle.answer, length, depth) for needle in (NEEDLE, other) for length in (6, 12) for depth in (0, 1)
    ]
    assert len({one.id for one in samples}) == 8
    assert samples[-1].prompt.part("needle") == ("On a mat.",)


def test_a_space_parts_needle_and_haystack_only_where_none_is(words: Any) -> None:
    haystack = "one two.\n\nthree four.\nfive"
    books = [book(one.prompt) for one in fl.needle_samples(words, haystack, [NEEDLE], [8], [0.4, 0.8, 1])]
    assert books == [
        "one two. The cat sat.\n\nthree four.\nfive",
        "one two.\n\nthree four. The cat sat.\nfive",
        "one two.\n\nthree four.\nfive The cat sat.",
    ]


def test_the_answer_is_found_whatever_its_case() -> None:
    assert Needle("?", "He left because it rained.", "Because it rained").answer_span == (8, 25)
    assert Needle("?", "It (rained) a lot.", "(rained)").answer_span == (3, 11)
    assert Needle("?", "It rained.", "It poured").answer_span is None


def test_an_answer_in_other_words_has_no_part(words: Any) -> None:
    (sample,) = fl.needle_samples(words, HAYSTACK, [Needle("?", "It rained.", "It poured")], [9], [0])
    assert set(sample.prompt.spans) == {"needle", "question"}


TEXT = st.lists(
    st.text("abé.!? \n", min_size=1, max_size=12).map(lambda text: text.replace(" .", "x.")), min_size=4, max_size=30
).map(" ".join)


@given(text=TEXT, share=st.floats(0, 1), depth=st.floats(0, 1))
def test_the_haystack_is_cut_and_parted_but_never_changed(text: str, share: float, depth: float) -> None:
    tokenizer = _bytes()
    there = len(tokenizer(text)["input_ids"])
    needle = Needle("é?", "é is here.", "is")
    taken = len(tokenizer(" " + needle.text)["input_ids"])
    kept = 1 + int(share * (there - 1))
    (sample,) = fl.needle_samples(tokenizer, text, [needle], [kept + taken], [depth])
    ((start, end),) = sample.prompt.spans["needle"]
    before, after = sample.prompt[len("<book>") : start], sample.prompt[end:].split("</book>")[0]
    assert sample.prompt[start:end] == needle.text
    variants = [left + right for left in (before, before[:-1]) for right in (after, after[1:])]
    cut = next(variant for variant in variants if text.startswith(variant) and abs(_n(variant) - kept) <= 1)
    assert _n(before) <= kept * depth + 2
    if depth < 1 and before:
        assert re.search(r"[.!?] ?$", before)
    if depth == 1:
        assert before in (cut, cut + " ")


def _n(text: str) -> int:
    return len(_bytes()(text)["input_ids"])


def _bytes() -> Any:
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(sorted(alphabet))}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


# --- with real tokenizers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "qwen3", "llama_chat"])
def test_the_tokens_of_the_needle_are_known(name: str, load_model: Any) -> None:
    model = load_model(name)
    needle = Needle("where is the café?", "The café Zoë is by the river.", "by the river")
    haystack = "A naïve baker met a queen. The tower was silver! " * 6
    for tokenizer in (model, model.encoder, model.tokenizer):
        samples = fl.needle_samples(tokenizer, haystack, [needle], [70, 100], [0, 0.5, 1])
        for sample in samples:
            encoded = model.encode(sample.prompt)
            for part, text in (("needle", needle.text), ("answer", needle.answer)):
                ((start, end),) = encoded.spans[part]
                found = model.tokenizer.decode(encoded.tokens[start:end])
                assert text in found
                assert found.strip(" >.") == text.strip(".")
            there = len(model.tokenizer(book(sample.prompt), add_special_tokens=False)["input_ids"])
            assert abs(there - sample.length) <= 3


@pytest.mark.skipif(not (DATA / "needles.jsonl").is_file(), reason=f"{DATA} is not there; set FOCUSLENS_DATA")
def test_the_authors_own_files(words: Any) -> None:
    needles, haystack = fl.load_needles(DATA / "needles.jsonl"), fl.load_haystack(DATA)
    assert len(needles) == 3
    assert needles[1].question == "What is the best thing to do in Beijing ?"
    samples = fl.needle_samples(words, haystack, needles, [1000, 20_000], [0, 0.5, 1])
    assert len(samples) == 18
    for sample in samples:
        assert len(book(sample.prompt).split()) == sample.length
        (answer,) = sample.prompt.part("answer")
        assert answer.lower() == sample.reference.lower()
        (needle,) = sample.prompt.part("needle")
        assert sample.prompt.text.count(needle) == 1
        before = len(sample.prompt.text.split(needle)[0].split()) / sample.length
        assert sample.depth - 0.05 < before <= sample.depth + 0.01
        if sample.depth == 0.5:
            assert re.search(r"[.!?][\"')\]]* $", sample.prompt.text.split(needle)[0])


# --- files ------------------------------------------------------------------------------------------------------------


def test_needles_are_read(tmp_path: Path) -> None:
    path = tmp_path / "needles.jsonl"
    other = {"real_needle": "b", "needle": "\na b c\n", "question": "q"}
    path.write_text(json.dumps(LINE) + "\n\n" + json.dumps(other) + "\n\n")
    assert fl.load_needles(path) == [NEEDLE, Needle("q", "a b c", "b")]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: broken JSON"),
        ("[1]", "line 2: the line is [1]; it must be a JSON object"),
        (
            {"needle": "a", "question": "b"},
            "line 2: the field 'real_needle' is missing; there are 'needle', 'question'",
        ),
        ({**LINE, "needle": 3}, "line 2: the field 'needle' is 3; it must be a string that is not empty"),
        ({**LINE, "question": " "}, "line 2: the field 'question' is ' '; it must be a string that is not empty"),
    ],
)
def test_lines_that_cannot_be_used_are_refused(line: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "needles.jsonl"
    second = line if isinstance(line, str) else json.dumps(line)
    path.write_text("\n".join([json.dumps(LINE), second, json.dumps(LINE)]))
    with pytest.raises(ValueError, match=re.escape(f"{path}, {message}")):
        fl.load_needles(path)


def test_files_that_are_not_there_or_empty_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no file .*needles\.jsonl"):
        fl.load_needles(tmp_path / "needles.jsonl")
    (tmp_path / "needles.jsonl").write_text("")
    with pytest.raises(ValueError, match="is empty; it must hold one JSON object per line"):
        fl.load_needles(tmp_path / "needles.jsonl")
    for directory in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(FileNotFoundError, match=r"there are no \*\.txt files in"):
            fl.load_haystack(directory)
    (tmp_path / "a.txt").write_text(" \n")
    with pytest.raises(ValueError, match=r"the \*\.txt files in .* are empty"):
        fl.load_haystack(tmp_path)
    (tmp_path / "b.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=r"b\.txt is not a text in UTF-8"):
        fl.load_haystack(tmp_path)


def test_essays_are_joined_by_name(tmp_path: Path) -> None:
    for name, text in (("b.txt", "Second.\n"), ("a.txt", "\nFirst, naïve."), ("c.txt", "\n"), ("d.md", "Not this.")):
        (tmp_path / name).write_text(text, encoding="utf-8")
    assert fl.load_haystack(tmp_path) == "First, naïve.\n\nSecond."


# --- the demo corpus --------------------------------------------------------------------------------------------------


def test_synthetic_needles_are_the_sentences_that_answer() -> None:
    needles = fl.synthetic_needles((4, 6), (0, 3), n=40)
    samples = [s for n in (4, 6) for s in fl.load_synthetic(40, num_documents=n, gold_positions=(0, 3))]
    assert len(needles) == len(samples) == 80
    for needle, sample in zip(needles, samples, strict=True):
        assert sample.gold_index is not None
        (text,), (answer,) = needle.prompt.part("needle"), sample.answers
        gold = sample.documents[sample.gold_index]
        assert needle.prompt.text == sample.prompt("long").text
        assert needle.prompt.part("question") == (sample.question,)
        assert (needle.reference, needle.length, needle.id) == (answer, len(sample.documents), sample.id)
        assert needle.depth == sample.gold_index / (len(sample.documents) - 1)
        assert answer in text
        assert text in gold.text
        assert re.fullmatch(r"[A-Z][^.]*\.", text)
        (start, end), (first, last) = needle.prompt.spans["needle"][0], needle.prompt.spans["relevant"][0]
        assert first < start < end <= last
    assert len({one.id for one in needles}) == 80


def test_where_no_single_sentence_answers_the_document_is_the_needle() -> None:
    def needle(text: str) -> tuple[str, ...]:
        documents = (fl.Document("Red Bay", "Red Bay."), fl.Document("Red Bay", text))
        return _planted(fl.MultiDocSample("?", ("Red Bay",), documents, 1)).prompt.part("needle")

    assert needle("One. It is in Red Bay.  Three.") == ("It is in Red Bay.",)
    assert needle("Red Bay is big. One.") == ("Red Bay is big.",)
    for text in ("Red Bay is big. Red Bay is red.", "Red Bayou is big. One.", "Red Bay without an end"):
        assert needle(text) == (text,)


def test_one_document_has_its_needle_at_depth_zero() -> None:
    (one,) = fl.synthetic_needles(1, n=1)
    assert (one.length, one.depth) == (1, 0.0)


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"needles": []}, "there are no needles; give at least one"),
        ({"lengths": []}, "there are no lengths; give at least one"),
        ({"depths": []}, "there are no depths; give at least one"),
        ({"needles": [NEEDLE, NEEDLE]}, "needles repeats Needle("),
        ({"lengths": [9, 10, 9]}, "lengths repeats 9; give each once"),
        ({"depths": [0, 0.0]}, "depths repeats 0.0; give each once"),
        ({"depths": [0, 50]}, "depth 50 is not a share of the haystack; it must be from 0 (first) to 1 (last)"),
        ({"depths": [-0.1]}, "depth -0.1 is not a share"),
        ({"lengths": [3]}, "length 3 leaves no room for a haystack around a needle of 3 tokens ('The cat sat.'); it"),
        ({"lengths": [19]}, "haystack of 16 tokens in addition to the needle's 3; this haystack has 15"),
        ({"tokenizer": object()}, "object is not a fast tokenizer"),
    ],
)
def test_what_cannot_be_swept_is_refused(changes: dict[str, Any], message: str, words: Any) -> None:
    settings: dict[str, Any] = {
        "tokenizer": words, "haystack": HAYSTACK, "needles": [NEEDLE], "lengths": [9], "depths": [0.5]
    }  # fmt: skip
    with pytest.raises(ValueError, match=re.escape(message)):
        fl.needle_samples(**{**settings, **changes})


def test_the_longest_length_that_there_is_haystack_for(words: Any) -> None:
    (sample,) = fl.needle_samples(words, HAYSTACK, [NEEDLE], [18], [0])
    assert book(sample.prompt) == f"The cat sat. {HAYSTACK}"


def test_values_that_make_no_needle_are_refused() -> None:
    for fields, name in ((("", "a", "b"), "question"), (("q", " ", "b"), "text"), (("q", "a", "\n"), "answer")):
        with pytest.raises(ValueError, match=f"the needle's {name} is empty"):
            Needle(*fields)
    for spans in ({}, {"needle": []}, {"question": [(0, 1)]}):
        with pytest.raises(ValueError, match="the prompt of sample 'x' has no span 'needle'; it has"):
            NeedleSample(Prompt("abc", cast("Any", spans)), "a", 3, 0.0, "x")


def test_synthetic_needles_refuse_what_the_corpus_does_not_have() -> None:
    with pytest.raises(ValueError, match="there are no num_documents"):
        fl.synthetic_needles([])
    with pytest.raises(ValueError, match="num_documents repeats 5"):
        fl.synthetic_needles([5, 5])
    with pytest.raises(
        ValueError,
        match=re.escape("gold_positions 7 is outside of the documents: with num_documents 5, positions are 0 to 4"),
    ):
        fl.synthetic_needles([9, 5], [7])
    with pytest.raises(ValueError, match="has no gold document"):
        _planted(fl.MultiDocSample("?", ("a",), (fl.Document("t", "x"),), None))
