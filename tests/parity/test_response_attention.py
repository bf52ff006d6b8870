"""Response rows and attention windows against the full patterns of Hugging Face's eager attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import focuslens as fl
from tests.support.reference import Edits, document_ranges, gap, prompt_text, split_softmax_rows, tokens_of_ranges

HEADS = [(2, 3), (0, 1), (2, 0)]
RESPONSE = "The silver lantern"
TOLERANCE = 1e-4  # see test_scores.py


def picked(patterns: torch.Tensor) -> torch.Tensor:
    return torch.stack([patterns[layer, head] for layer, head in HEADS])


@pytest.mark.parametrize("name", ["llama", "qwen2", "mistral_window", "llama_chat"])
def test_rows_of_a_generated_response(name: str, backend: Any, load_model: Any, reference: Any, samples: Any):
    model, hf = load_model(name, backend), reference(name)
    for sample in samples[:2]:
        ids = hf.ids(prompt_text(sample, "long"))
        made = torch.tensor(hf.generate(ids, 5))
        expected = picked(hf.patterns(torch.cat((ids, made))))[:, len(ids) :]
        found = fl.response_attention(model, sample.prompt("long"), HEADS, max_new_tokens=5)
        assert gap(found.rows, expected) < TOLERANCE
        assert found.text == hf.tokenizer.decode(made, skip_special_tokens=True).strip()
        assert (found.prompt_length, found.head_names) == (len(ids), ("L2H3", "L0H1", "L2H0"))


@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral_window"])
def test_rows_of_a_given_response_under_an_intervention(name, backend, load_model, reference, samples):
    model, hf, sample = load_model(name, backend), reference(name), samples[0]
    prompt = prompt_text(sample, "long")
    ids = hf.ids(prompt)
    text = hf.text(prompt) + ("" if hf.chat else " ") + RESPONSE
    whole = torch.tensor(hf.tokenizer(text, add_special_tokens=not hf.chat)["input_ids"])
    span = tokens_of_ranges(hf.offsets(prompt), document_ranges(sample, hf.text(prompt))[sample.gold_index])
    edits = Edits(pattern=split_softmax_rows(HEADS[:2], 0.2, span, len(ids) - 1))
    expected = picked(hf.patterns(whole, edits))[:, len(ids) :]
    split = fl.SplitSoftmax(HEADS[:2], tau=0.2)
    found = fl.response_attention(
        model, sample.prompt("long"), HEADS, response=RESPONSE, interventions=[split], name="split"
    )
    assert gap(found.rows, expected) < TOLERANCE
    assert (found.name, found.text) == ("split", RESPONSE)
    plain = fl.response_attention(model, sample.prompt("long"), HEADS, response=RESPONSE)
    if name != "mistral_window":  # the window hides the document from the response
        assert gap(plain.rows, expected) > 0.05
    # Shares of the prompt's parts equal sums over their tokens.
    units = found.by_unit()
    relevant = units.labels.index(f"Document [{sample.gold_index + 1}]")
    assert units.relevant == (relevant,)
    assert gap(units.shares[:, :, relevant], expected[:, :, span].sum(dim=-1)) < TOLERANCE
    assert gap(units.shares[:, :, 0], expected[:, :, :2].sum(dim=-1)) < TOLERANCE
    assert gap(units.shares.sum(dim=-1), torch.ones(3, len(whole) - len(ids))) < TOLERANCE


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_a_window_holds_the_pattern_between_its_tokens(name, backend, load_model, reference, samples):
    model, hf, sample = load_model(name, backend), reference(name), samples[0]
    ids = hf.ids(prompt_text(sample, "long"))
    made = torch.tensor(hf.generate(ids, 4))
    found = fl.window_attention(model, sample.prompt("long"), HEADS, margin=2, max_new_tokens=4)
    expected = picked(hf.patterns(torch.cat((ids, made))))
    places = torch.tensor(found.positions)
    assert gap(found.pattern, expected[:, places][:, :, places]) < TOLERANCE
    offsets, text = hf.offsets(prompt_text(sample, "long")), hf.text(prompt_text(sample, "long"))
    document = tokens_of_ranges(offsets, document_ranges(sample, text)[sample.gold_index])
    answer = range(len(ids), len(ids) + len(made))
    assert {0, 1, document[0] - 2, *document, document[-1] + 2, *answer} <= set(found.positions)
    assert document[0] - 3 not in found.positions
    assert (found.length, found.left_out) == (len(ids) + len(made), 0)
