"""Edits of rows whose heads have a sink: the mass that a row lacks to one lies outside the span."""

from __future__ import annotations

import math
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

import focuslens as fl
from focuslens.evaluation.methods.scaled_attention import ScaledAttention
from focuslens.interventions.mixed_split import MixedSplitSoftmax, WeightedParts
from focuslens.prompts.batch import EncodedPrompt, PromptBatch

KEYS, SPAN, HEADS = 9, (2, 5), 3


def rows() -> tuple[Tensor, Tensor]:
    """Logits ``[head key]`` with a further last column, the sink, and the weights of the keys."""
    logits = 2 * torch.randn(HEADS, KEYS + 1, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    logits[:, -1] = 2.0
    return logits, logits.softmax(dim=-1)[:, :-1]


def target(*sink_layers: int) -> SimpleNamespace:
    """What an intervention asks of a model with one layer."""
    return SimpleNamespace(
        shape=SimpleNamespace(n_layers=1, n_heads=HEADS),
        sink_layers=frozenset(sink_layers),
        batch=lambda prompts: prompts,
        require_acting=list,
        require_running=lambda *_: None,
        cache_window=lambda layer: None,
    )


def edited(intervention: fl.Intervention, pattern: Tensor, *sink_layers: int) -> Tensor:
    """The edited pattern of the last row of a prompt of nine tokens."""
    prompt = EncodedPrompt(torch.arange(KEYS), {"relevant": (SPAN,)})
    ((name, hook),) = intervention.hooks(target(*sink_layers), PromptBatch.of([prompt]))  # type: ignore[arg-type]
    assert name == "blocks.0.attn.hook_pattern"
    whole = torch.zeros(1, HEADS, KEYS, KEYS, dtype=torch.float64)
    whole[0, :, -1] = pattern
    result = hook(whole, None)
    assert result is not None
    return result[0, :, -1]


ALL_HEADS = [(0, head) for head in range(HEADS)]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("worth", [10**9, -1])
@pytest.mark.parametrize("tau", [0.0, 0.3, 2.0])
def test_split_softmax_counts_the_sink_as_outside(tau: float, worth: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equations 2 and 3, weight by weight, with the sink as one more weight outside the span."""
    monkeypatch.setattr(sys.modules["focuslens.interventions.split_softmax"], "_WORTH_CHOOSING", worth)
    _, pattern = rows()
    result = edited(fl.SplitSoftmax(ALL_HEADS, tau), pattern, 0)
    for head in range(HEADS):
        weights: list[float] = pattern[head].tolist()
        p, sink = sum(weights[slice(*SPAN)]), 1 - sum(weights)
        assert sink > 0.01
        inside, outside = p**tau / p, (1 - p**tau) / (1 - p)
        for j, weight in enumerate(weights):
            factor = inside if SPAN[0] <= j < SPAN[1] else outside
            assert math.isclose(float(result[head, j]), factor * weight, rel_tol=1e-9, abs_tol=1e-15)
        assert math.isclose(float(result[head].sum()) + outside * sink, 1, rel_tol=1e-12)
        assert torch.equal(edited(fl.SplitSoftmax([(0, head)], tau), pattern, 0)[head], result[head])
    # Without the sink, the mass of the keys would stay as it is.
    torch.testing.assert_close(edited(fl.SplitSoftmax(ALL_HEADS, tau), pattern).sum(dim=-1), pattern.sum(dim=-1))


@pytest.mark.usefixtures("unchecked")
def test_a_bias_of_the_span_is_a_bias_of_logits() -> None:
    logits, pattern = rows()
    result = edited(fl.LogitBias(ALL_HEADS, 1.3, positions="response"), pattern, 0)
    logits[:, SPAN[0] : SPAN[1]] += 1.3
    torch.testing.assert_close(result, logits.softmax(dim=-1)[:, :-1])


@pytest.mark.usefixtures("unchecked")
def test_a_mixture_of_one_part_is_split_softmax() -> None:
    _, pattern = rows()
    mixed = MixedSplitSoftmax(ALL_HEADS, 0.3, [WeightedParts((SPAN, (6, 8)), (1.0, 0.0))])
    torch.testing.assert_close(edited(mixed, pattern, 0), edited(fl.SplitSoftmax(ALL_HEADS, 0.3), pattern, 0))


@pytest.mark.usefixtures("unchecked")
def test_scaled_columns_are_biases_of_logits() -> None:
    logits, pattern = rows()
    factors = torch.linspace(0.5, 3, KEYS, dtype=torch.float64)
    result = edited(ScaledAttention(tuple(fl.Head(*head) for head in ALL_HEADS), factors[None]), pattern, 0)
    logits[:, :-1] += factors.log()
    torch.testing.assert_close(result, logits.softmax(dim=-1)[:, :-1])


@pytest.mark.usefixtures("unchecked")
def test_spotlight_reaches_its_target_of_all_attention() -> None:
    _, pattern = rows()
    spotlight = fl.SpotLight(0.6, heads=ALL_HEADS[:1], positions="response")
    p = float(pattern[0, SPAN[0] : SPAN[1]].sum())
    assert p < 0.6
    # The bias log(target / p) on the logits of the span, with a softmax over the keys and the sink.
    logits, _ = rows()
    logits[0, SPAN[0] : SPAN[1]] += math.log(0.6 / p)
    torch.testing.assert_close(edited(spotlight, pattern, 0)[0], logits.softmax(dim=-1)[0, :-1])
