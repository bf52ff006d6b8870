"""The mean of split-softmax over several parts, against Hugging Face attention that a float64 loop edits."""

from __future__ import annotations

import pytest
import torch

import focuslens as fl
from focuslens.interventions.mixed_split import MixedSplitSoftmax, WeightedParts
from tests.support.reference import Edits, Rows, gap, prompt_text, split_softmax_rows

HEADS = [(0, 1), (0, 3), (1, 0), (2, 2), (2, 3)]
TOLERANCE = 1e-3
"""Tolerance of logits, as for split-softmax."""

WEIGHTS = (0.5, 0.0, 0.3, 0.2)


def mixed_rows(tau: float, prompt: WeightedParts, from_row: int) -> Rows:
    def turn(layer, pattern, first):
        rows = [
            weight * split_softmax_rows(HEADS, tau, range(*part), from_row)(layer, pattern, first).double()
            for part, weight in zip(*prompt, strict=True)
        ]
        return sum(rows[1:], rows[0]).to(pattern.dtype)

    return turn


@pytest.mark.parametrize(("name", "tau"), [("llama", 0.1), ("llama", 0), ("llama", 1000), ("qwen3", 0.4)])
def test_logits_are_those_of_the_mean(name, tau, backend, path, load_model, reference, samples):
    model, hf, sample = load_model(name, backend), reference(name), samples[2]
    prompt = hf.ids(prompt_text(sample, "long"))
    parts = WeightedParts(model.encode(sample.prompt()).spans["document"][: len(WEIGHTS)], WEIGHTS)
    tokens = torch.cat((prompt, torch.tensor([70, 300, 5, 90])))
    expected = hf.logits(tokens, Edits(pattern=mixed_rows(tau, parts, len(prompt) - 1)))
    mixed = MixedSplitSoftmax(HEADS, tau, [parts])
    actual = model.logits(tokens, [mixed], prompt=sample.prompt())
    assert gap(actual, expected) < TOLERANCE
    changed = (expected - hf.logits(tokens)).abs().amax(dim=-1)
    assert changed[: len(prompt) - 1].max() < 1e-5
    assert changed[len(prompt) - 1 :].min() > 0.02
    # The same rows one at a time, over a cache.
    generated = model.decode(model.prefill(sample.prompt(), hold_last=True), [mixed], max_new_tokens=6)[0].tokens
    whole = hf.logits(torch.cat((prompt, generated)), Edits(pattern=mixed_rows(tau, parts, len(prompt) - 1)))
    best = whole[len(prompt) - 1 : -1].topk(2)
    sure = best.values[:, 0] - best.values[:, 1] > 2 * TOLERANCE
    assert len(generated)
    assert sure.any()
    assert best.indices[:, 0][sure].tolist() == generated[sure].tolist()


def test_prompts_of_a_batch_have_their_own_parts(backend, path, load_model, samples):
    """Padding, another number of parts and a prompt that is left alone change nothing for the others."""
    model = load_model("llama", backend)
    prompts = [sample.prompt() for sample in samples[:3]]
    spans = [model.encode(prompt).spans["document"] for prompt in prompts]
    parts = [
        WeightedParts(spans[0][:2], (0.25, 0.75)),
        WeightedParts(spans[1][:3], (0.0, 0.0, 0.0)),
        WeightedParts(spans[2][1:2], (1.0,)),
    ]
    together = model.decode(
        model.prefill(prompts, hold_last=True), [MixedSplitSoftmax(HEADS, 0.1, parts)], max_new_tokens=6
    )
    alone = [
        model.generate(prompts[0], [MixedSplitSoftmax(HEADS, 0.1, parts[:1])], max_new_tokens=6),
        model.generate(prompts[1], max_new_tokens=6),
        model.generate(prompts[2], [fl.SplitSoftmax(HEADS, 0.1, spans[2][1])], max_new_tokens=6),
    ]
    assert [one.tokens.tolist() for one in together] == [one.tokens.tolist() for one in alone]


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (WeightedParts(((2, 4),), (0.5, 0.5)), "there must be one weight, 0 or more, for each part"),
        (WeightedParts(((2, 4), (4, 6)), (1.5, -0.5)), "there must be one weight, 0 or more"),
        (WeightedParts(((2, 4), (4, 6)), (0.5, 0.4)), "they must sum to 1"),
        (WeightedParts(((2, 5), (4, 6)), (0.5, 0.5)), "parts of a prompt overlap"),
    ],
)
def test_wrong_weights_are_refused(parts, message):
    with pytest.raises(ValueError, match=message):
        MixedSplitSoftmax(HEADS, 0.1, [parts])


def test_the_number_of_prompts_is_checked(tiny_model, samples):
    mixed = MixedSplitSoftmax(HEADS, 0.1, [WeightedParts(((2, 4),), (1.0,))] * 2)
    with pytest.raises(ValueError, match="the weights are for 2 prompt"):
        mixed.hooks(tiny_model, samples[0].prompt())
