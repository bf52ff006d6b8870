"""Split-softmax against Hugging Face attention that a float64 loop edits."""

from __future__ import annotations

import pytest
import torch

import focuslens as fl
from tests.support.reference import (
    Edits,
    document_ranges,
    gap,
    prompt_text,
    split_softmax_rows,
    tokens_of_ranges,
)

HEADS = [(0, 1), (0, 3), (1, 0), (1, 2), (2, 2), (2, 3)]
TOLERANCE = 1e-3
"""Tolerance of logits. Edited rows are as accurate as the rows before the edit.

On ``HookedTransformer``, whose rotary tables differ, 1e-4 is measured. The tolerance also applies at tau = 0 and 1,000:
all weights on one side of the split are multiplied by one number, so they keep their relative error.
"""

TAUS = (0, 0.1, 0.6, 1, 1.5, 1000)


def relevant_tokens(hf, sample, case="long") -> list[int]:
    prompt = prompt_text(sample, case)
    return tokens_of_ranges(hf.offsets(prompt), document_ranges(sample, hf.text(prompt))[sample.gold_index])


@pytest.mark.parametrize(
    ("name", "tau"),
    [*(("llama", tau) for tau in TAUS), ("qwen2", 0.1), ("qwen2", 1000), ("qwen3", 0), ("qwen3", 1.5)],
)
def test_logits_are_those_of_edited_rows(name, tau, backend, load_model, reference, samples):
    """Logits under split-softmax on the relevant document, the default span, equal those of edited rows."""
    model, hf, sample = load_model(name, backend), reference(name), samples[2]
    prompt = hf.ids(prompt_text(sample, "long"))
    tokens = torch.cat((prompt, torch.tensor([70, 300, 5, 90])))
    expected = hf.logits(
        tokens, Edits(pattern=split_softmax_rows(HEADS, tau, relevant_tokens(hf, sample), len(prompt) - 1))
    )
    actual = model.logits(tokens, [fl.SplitSoftmax(HEADS, tau)], prompt=sample.prompt("long"))
    assert gap(actual, expected) < TOLERANCE
    changed = (expected - hf.logits(tokens)).abs().amax(dim=-1)
    assert changed[: len(prompt) - 1].max() < 1e-5, "the prompt's rows stay as they are"
    if tau == 1:
        assert changed.max() < 1e-5
    else:
        assert changed[len(prompt) - 1 :].min() > 0.02


@pytest.mark.parametrize("tau", [0, 0.3, 1000])
def test_a_range_of_tokens(tau, backend, load_model, reference, samples):
    """The span can be a range of token positions, here inside a window of 24 keys before the prompt's end."""
    sample = samples[3]
    for name in ("llama", "mistral_window"):
        model, hf = load_model(name, backend), reference(name)
        prompt = hf.ids(prompt_text(sample, "long"))
        span = (len(prompt) - 12, len(prompt) - 4)
        tokens = torch.cat((prompt, torch.tensor([70, 300, 5, 90])))
        expected = hf.logits(tokens, Edits(pattern=split_softmax_rows(HEADS, tau, range(*span), len(prompt) - 1)))
        actual = model.logits(tokens, [fl.SplitSoftmax(HEADS, tau, span=span)], prompt=sample.prompt("long"))
        assert gap(actual, expected) < TOLERANCE
        assert gap(expected, hf.logits(tokens)) > 0.1


def test_a_part_of_several_ranges(backend, load_model, reference, samples):
    """A span of several ranges is one side of the split, here all irrelevant documents."""
    model, hf, sample = load_model("llama", backend), reference("llama"), samples[1]
    text = prompt_text(sample, "long")
    prompt, offsets = hf.ids(text), hf.offsets(text)
    ranges = document_ranges(sample, hf.text(text))
    others = [
        t for i, characters in ranges.items() if i != sample.gold_index for t in tokens_of_ranges(offsets, characters)
    ]
    expected = hf.logits(prompt, Edits(pattern=split_softmax_rows(HEADS, 2.5, others, len(prompt) - 1)))
    actual = model.logits(sample.prompt("long"), [fl.SplitSoftmax(HEADS, 2.5, span="irrelevant")])
    assert gap(actual, expected) < TOLERANCE
    assert gap(expected, hf.logits(prompt)) > 0.1


def test_rows_with_all_or_nothing_on_the_span(backend, load_model, reference, samples):
    """Rows with all attention on the span (p = 1) or none (p = 0, span outside the window) stay unchanged."""
    model, hf, sample = load_model("mistral_window", backend), reference("mistral_window"), samples[3]
    prompt = hf.ids(prompt_text(sample, "long"))
    n = len(prompt)
    plain = hf.logits(prompt)
    for span, acts in (((0, n), False), ((0, n - 24), False), ((n - 24, n), False), ((n - 20, n), True)):
        logits = model.logits(prompt, [fl.SplitSoftmax(HEADS, 0.2, span=span)], prompt=sample.prompt("long"))
        assert logits.isfinite().all()
        assert (gap(logits, plain) > 0.05) == acts, span
        if not acts:
            assert gap(logits, plain) < TOLERANCE


@pytest.mark.parametrize("tau", TAUS)
def test_responses_are_those_of_edited_rows(tau, backend, load_model, reference, samples):
    """Responses of a batch equal those of Hugging Face's cached generation for each prompt alone."""
    model, hf = load_model("llama", backend), reference("llama")
    chosen = samples[1:]
    expected = []
    for sample in chosen:
        prompt = hf.ids(prompt_text(sample, "long"))
        edits = Edits(pattern=split_softmax_rows(HEADS, tau, relevant_tokens(hf, sample), len(prompt) - 1))
        expected.append(hf.generate(prompt, 6, edits))
    prompts = [sample.prompt("long") for sample in chosen]
    batched = model.generate(prompts, [fl.SplitSoftmax(HEADS, tau)], max_new_tokens=6)
    assert [response.tokens.tolist() for response in batched] == expected
    plain = [hf.generate(hf.ids(prompt_text(sample, "long")), 6) for sample in chosen]
    if tau == 1:
        assert expected == plain
    elif tau in (0, 0.1, 1000):
        assert sum(a != b for a, b in zip(expected, plain, strict=True)) > 0


def test_the_mass_on_the_span_is_its_power(backend, load_model, samples):
    """In ``hook_pattern``, the span's mass p becomes p ** tau and rows sum to one.

    Other heads and rows stay unchanged.
    """
    model, sample = load_model("qwen2", backend), samples[0]
    encoded = model.encode(sample.prompt("long"))
    ((start, end),) = encoded.spans["relevant"]
    tokens = encoded.tokens
    seen: dict[bool, torch.Tensor] = {}

    def keep(which: bool):
        def observe(pattern, hook) -> None:
            seen[which] = pattern[0].double()

        return ("blocks.0.attn.hook_pattern", observe)

    split = fl.SplitSoftmax([(0, 1), (0, 2)], 0.25)
    model.hooked.run_with_hooks(tokens[None], fwd_hooks=[keep(False)])
    model.hooked.run_with_hooks(tokens[None], fwd_hooks=[*split.hooks(model, sample.prompt("long")), keep(True)])
    before, after = seen[False], seen[True]
    assert gap(after.sum(dim=-1), torch.ones_like(after.sum(dim=-1))) < 1e-6
    p, powered = before[[1, 2], -1, start:end].sum(dim=-1), after[[1, 2], -1, start:end].sum(dim=-1)
    assert gap(powered, p**0.25) < 1e-6
    assert (powered > p + 0.05).all()
    assert gap(after[:, :-1], before[:, :-1]) == 0
    assert gap(after[[0, 3]], before[[0, 3]]) == 0
