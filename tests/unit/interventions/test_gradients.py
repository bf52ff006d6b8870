"""Gradients through hooks on attention patterns, for spans of one range and of several, against finite differences."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import focuslens as fl

HEADS = [(1, 0), (1, 2)]


@pytest.mark.parametrize("ranges", [((1, 3),), ((1, 2), (4, 6))])
@pytest.mark.parametrize(
    "intervention",
    [fl.SplitSoftmax(HEADS, 0.3), fl.LogitBias(HEADS, 1.0), fl.Pasta(HEADS, 0.1), fl.SpotLight(0.6)],
    ids=lambda item: type(item).__name__,
)
def test_gradients_through_hooks(intervention: Any, ranges: Any, load_model: Any) -> None:
    model = load_model("llama")
    prompt = fl.EncodedPrompt(torch.arange(6), {"relevant": ranges})
    hook = dict(intervention.hooks(model, prompt))["blocks.1.attn.hook_pattern"]
    logits = torch.randn(1, 4, 2, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def changed(logits: Tensor) -> Tensor:
        return hook(logits.softmax(dim=-1), None)

    assert float((changed(logits) - logits.softmax(dim=-1)).abs().max()) > 1e-3
    assert torch.autograd.gradcheck(changed, (logits.requires_grad_(),))
