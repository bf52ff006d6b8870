"""Rows of questions read from the weights of layers, against the same rows under TransformerLens's hooks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import focuslens as fl
from focuslens.model import attention, lean_rows, runner
from focuslens.model.question_rows import question_attention

HEADS = [fl.Head(1, 2), fl.Head(0, 0)]


@pytest.mark.parametrize("block", [attention.BLOCK, 1])
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_rows_are_read_from_the_weights_as_under_hooks(
    family: str, block: int, backend: Any, load_model: Any, samples: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(family, backend)
    monkeypatch.setattr(attention, "BLOCK", block)
    prefix = model.prefill([sample.prompt() for sample in samples[:3]], hold_last=True)
    nulls = [model.encode(replace(sample, question="N/A").prompt()) for sample in samples[:3]]
    passes: list[int] = []

    def counted(*arguments: Any) -> None:
        passes.append(len(arguments[1]))
        lean_rows.read_lean_rows(*arguments)

    monkeypatch.setattr(runner, "read_lean_rows", counted)
    lean = question_attention(model, prefix, HEADS, "tail", nulls)
    assert passes == [2, 2]  # the layers 0 and 1, for the questions and the null questions
    with model.hooked.hooks(fwd_hooks=[("blocks.0.hook_resid_pre", lambda tensor, hook: None)]):
        watched = question_attention(model, prefix, HEADS, "tail", nulls)
    monkeypatch.setattr(model, "lean", False)
    plain = question_attention(model, prefix, HEADS, "tail", nulls)
    assert len(passes) == 2
    assert lean.null is not None
    for other in (watched, plain):
        torch.testing.assert_close(lean.attention, other.attention, atol=2e-6, rtol=0)
        torch.testing.assert_close(lean.null, other.null, atol=2e-6, rtol=0)
