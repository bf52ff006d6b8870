"""Changes of a prompt's text: documents are removed as if they had never been there, and spans move along."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from typing import Any

import pytest

import focuslens as fl
from focuslens.prompts.rewriting import Edit, removed_documents, rewritten_text
from focuslens.prompts.template import DEFAULT_TEMPLATE


@pytest.mark.parametrize("titled", [True, False])
@pytest.mark.parametrize("name", ["llama", "qwen2", "llama_chat"])
def test_a_prompt_without_documents_is_that_of_the_other_documents(
    name: str, titled: bool, load_model: Any, samples: list[fl.MultiDocSample]
) -> None:
    encoder, sample = load_model(name).encoder, samples[3]
    if not titled:
        untitled = tuple(fl.Document("", document.text) for document in sample.documents)
        sample = replace(sample, documents=untitled)
    prompt, n = encoder.encode(sample.prompt()), len(sample.documents)
    for kept in (kept for size in range(1, n + 1) for kept in combinations(range(n), size)):
        texts = {i: (sample.documents[i].title, sample.documents[i].text) for i in kept}
        expected = encoder.encode(DEFAULT_TEMPLATE.prompt(sample.question, texts, sample.gold_indices))
        rewritten = encoder.rewritten(prompt, removed_documents(prompt, kept))
        assert rewritten.text == expected.text
        assert rewritten.tokens.tolist() == expected.tokens.tolist()
        assert rewritten.spans == expected.spans
        assert rewritten.characters == expected.characters


def test_a_prompt_without_any_document_asks_the_question_alone(
    load_model: Any, samples: list[fl.MultiDocSample]
) -> None:
    encoder = load_model("llama").encoder
    prompt = encoder.encode(samples[0].prompt())
    rewritten = encoder.rewritten(prompt, removed_documents(prompt))
    (end,) = (end for _, end in prompt.characters["instruction"])
    assert rewritten.text == f"{prompt.text[:end]}\n\nQuestion: {samples[0].question}\nAnswer:"
    assert rewritten.spans["document"] == rewritten.spans["relevant"] == ()


def test_text_between_documents_stays(load_model: Any) -> None:
    text = "Read.\nText A\nThen read this: text B\nWhy?"
    ranges = [(text.index(part), text.index(part) + 6) for part in ("Text A", "text B")]
    encoder = load_model("llama").encoder
    prompt = encoder.encode(fl.Prompt(text, {"document": ranges}))
    texts = [encoder.rewritten(prompt, removed_documents(prompt, kept)).text for kept in ([], [0], [1], [0, 1])]
    assert texts == [
        "Read.\n\nThen read this: Why?",
        "Read.\nText A\nThen read this: \nWhy?",
        f"Read.\n{text[12:]}",
        text,
    ]


def test_inserted_text_belongs_to_the_ranges_around_it() -> None:
    characters = {"whole": [(0, 6)], "first": [(0, 3)], "second": [(3, 6)], "inner": [(1, 2)]}
    edits = [Edit(0, 0, "<"), Edit(3, 3, ">", closes=True), Edit(3, 3, "<"), Edit(6, 6, ">", closes=True)]
    text, moved = rewritten_text("abcdef", characters, edits)
    assert text == "<abc><def>"
    parts = {name: [text[start:end] for start, end in ranges] for name, ranges in moved.items()}
    assert parts == {"whole": ["<abc><def>"], "first": ["<abc>"], "second": ["<def>"], "inner": ["b"]}


def test_ranges_that_lose_all_characters_are_dropped() -> None:
    characters = {"gone": [(2, 4)], "cut": [(1, 3)], "after": [(4, 6)]}
    assert rewritten_text("abcdef", characters, [Edit(2, 4)]) == (
        "abef",
        {"gone": (), "cut": ((1, 2),), "after": ((2, 4),)},
    )


def test_changes_that_cannot_be_made_are_refused(load_model: Any) -> None:
    encoder = load_model("llama").encoder
    with pytest.raises(ValueError, match=r"two edits change the same characters: \(0, 2\) and \(1, 3\)"):
        rewritten_text("abc", {}, [Edit(0, 2), Edit(1, 3)])
    with pytest.raises(ValueError, match="the text of the prompt is unknown, so it cannot be changed"):
        encoder.rewritten(encoder.encode([1, 2]), [])
    with pytest.raises(ValueError, match="the prompt has no text with a span 'document'"):
        removed_documents(encoder.encode("abc"))
    with pytest.raises(ValueError, match="documents of the prompt overlap"):
        removed_documents(encoder.encode(fl.Prompt("abcdef", {"document": [(0, 3), (2, 6)]})))
