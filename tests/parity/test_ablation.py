"""Ablations against Hugging Face models whose head outputs and attention patterns are edited directly."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import focuslens as fl
from tests.support.reference import Edits, document_ranges, gap, prompt_text, tokens_of_ranges

HEADS = [(0, 1), (1, 0), (1, 3), (2, 2)]
TOLERANCE = 1e-3
"""Tolerance of logits, the same as without interventions (rotary tables of ``HookedTransformer``)."""

FAMILIES = pytest.mark.parametrize("name", ["llama", "qwen3"])


@FAMILIES
@pytest.mark.parametrize("mode", ["zero", "mean"])
@pytest.mark.parametrize("positions", ["all", "response"])
def test_replaced_outputs_are_inputs_of_the_output_projection(
    name, mode, positions, backend, load_model, reference, samples
):
    model, hf = load_model(name, backend), reference(name)
    d_head = model.shape.d_head
    vectors = torch.randn(len(HEADS), d_head, generator=torch.Generator().manual_seed(1)) * (mode == "mean")
    prompt = hf.ids(prompt_text(samples[3], "long"))
    tokens = torch.cat((prompt, torch.tensor([70, 300])))
    first = 0 if positions == "all" else len(prompt) - 1

    def replace(layer: int) -> Any:
        def before(module: Any, inputs: tuple[Tensor]) -> tuple[Tensor]:
            z = inputs[0].clone()
            for (where, head), vector in zip(HEADS, vectors, strict=True):
                if where == layer:
                    z[:, first:, head * d_head : (head + 1) * d_head] = vector
            return (z,)

        return before

    handles = [
        layer.self_attn.o_proj.register_forward_pre_hook(replace(i)) for i, layer in enumerate(hf.eager.model.layers)
    ]
    try:
        expected = hf.logits(tokens)
    finally:
        for handle in handles:
            handle.remove()
    ablation = fl.HeadAblation(HEADS, mode, mean=vectors if mode == "mean" else None, positions=positions)
    assert gap(model.logits(tokens, [ablation], prompt=samples[3].prompt("long")), expected) < TOLERANCE
    changed = (expected - hf.logits(tokens)).abs().amax(dim=-1)
    assert changed[len(prompt) - 1 :].min() > 0.3
    assert (changed[: len(prompt) - 1].max() == 0) == (positions == "response")


@FAMILIES
@pytest.mark.parametrize("positions", ["all", "response"])
def test_knocked_out_attention_moves_to_the_other_tokens(name, positions, backend, load_model, reference, samples):
    """Weights on the span become zero and the rest of the row is rescaled to sum to one.

    The result equals a softmax without the span's keys.
    """
    model, hf, sample = load_model(name, backend), reference(name), samples[3]
    text = prompt_text(sample, "long")
    prompt = hf.ids(text)
    tokens = torch.cat((prompt, torch.tensor([70, 300])))
    ranges = document_ranges(sample, hf.text(text))
    cut = [
        t for i, range_ in ranges.items() if i != sample.gold_index for t in tokens_of_ranges(hf.offsets(text), range_)
    ]
    first = 0 if positions == "all" else len(prompt) - 1

    def knock(layer: int, pattern: Tensor, _: int) -> Tensor:
        result = pattern.double()
        for head in (head for where, head in HEADS if where == layer):
            kept = result[0, head, first:].clone()
            kept[:, cut] = 0
            result[0, head, first:] = kept / kept.sum(dim=-1, keepdim=True)
        return result.to(pattern.dtype)

    expected = hf.logits(tokens, Edits(pattern=knock))
    ablation = fl.HeadAblation(HEADS, "knockout", span="irrelevant", positions=positions)
    assert gap(model.logits(tokens, [ablation], prompt=sample.prompt("long")), expected) < TOLERANCE
    assert gap(expected, hf.logits(tokens)) > 0.3


def test_mean_outputs_are_means_over_all_tokens(backend, load_model, reference, samples):
    model, hf = load_model("qwen2", backend), reference("qwen2")
    seen: dict[int, list[Tensor]] = {0: [], 1: [], 2: []}

    def keep(layer: int) -> Any:
        return lambda module, inputs: seen[layer].append(inputs[0][0])

    handles = [
        layer.self_attn.o_proj.register_forward_pre_hook(keep(i)) for i, layer in enumerate(hf.eager.model.layers)
    ]
    try:
        for sample in samples:
            hf.logits(hf.ids(prompt_text(sample, "gold")))
    finally:
        for handle in handles:
            handle.remove()
    expected = torch.stack([torch.cat(seen[i])[:, h * 16 : (h + 1) * 16].mean(dim=0) for i, h in HEADS])
    means = fl.mean_head_outputs(model, [sample.prompt("gold") for sample in samples], HEADS)
    assert gap(means, expected) < 1e-4
    assert expected.abs().max() > 0.1
