"""Soft caps, chunks and sinks of the attention engine against loops in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from focuslens.model import attention
from focuslens.model.attention import LayerCache, Steps, attend_causally, attend_explicitly, visible_keys
from focuslens.model.engine import Pass

CPU = torch.device("cpu")
LENGTH, KV, GROUP, D = 13, 2, 3, 4
SINKS = torch.tensor([2.0, -1.0, 0.5, 4.0, 0.0, -3.0], dtype=torch.float64)
STEPS = {
    "cap": Steps(cap=1.5),
    "chunk": Steps(chunk=5),
    "sinks": Steps(sinks=SINKS),
    "cap and sinks": Steps(cap=1.5, sinks=SINKS),
    "sinks and chunk": Steps(chunk=4, sinks=SINKS),
}


def random(*shape: int) -> Tensor:
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def row(
    q: Tensor, keys: Tensor, values: Tensor, tokens: list[int], i: int, window: int | None, steps: Steps, sink: float
) -> tuple[Tensor, dict[int, float]]:
    """Output and weights of one row of one head, key by key. ``tokens`` are the columns that are no padding."""
    place, weights = tokens.index(i), dict[int, float]()
    for j, column in enumerate(tokens[: place + 1]):
        if window is not None and place - j >= window:
            continue
        if steps.chunk is not None and j // steps.chunk != place // steps.chunk:
            continue
        score = 0.3 * float(q[i] @ keys[column])
        if steps.cap is not None:
            score = steps.cap * math.tanh(score / steps.cap)
        weights[column] = math.exp(score)
    total = sum(weights.values()) + (0.0 if steps.sinks is None else math.exp(sink))
    weights = {column: weight / total for column, weight in weights.items()}
    output = torch.zeros(D, dtype=torch.float64)
    for column, weight in weights.items():
        output += weight * values[column]
    return output, weights


def inputs() -> tuple[Tensor, LayerCache]:
    cache = LayerCache()
    cache.append(random(2, LENGTH, KV, D), random(2, LENGTH, KV, D + 1)[..., 1:])
    return random(2, LENGTH, KV * GROUP, D), cache


@pytest.mark.parametrize("name", list(STEPS))
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("padding", [(0, 0), (0, 4)])
@pytest.mark.parametrize("block", [2**24, 30])
def test_rows_are_those_of_loops(name, window, padding, block, monkeypatch):
    """Whole prompts through the kernel, the last rows over all columns, and their patterns."""
    monkeypatch.setattr(attention, "BLOCK", block)
    steps, (q, cache) = STEPS[name], inputs()
    (segment,) = cache.segments
    mask = (torch.arange(LENGTH) >= torch.tensor(padding)[:, None]).long()
    whole = attend_causally(q, segment, padding, window, 0.3, steps)
    patterns: list[Tensor] = []
    visible = visible_keys(4, LENGTH, mask, window, CPU, steps.chunk)
    last = attend_explicitly(
        q[:, -4:], [segment], visible, 0.3, None, lambda p: patterns.append(p.clone()) or p, steps=steps
    )
    for b, left in enumerate(padding):
        tokens = list(range(left, LENGTH))
        for head in range(KV * GROUP):
            keys, values, sink = segment.keys[b, head // GROUP], segment.values[b, head // GROUP], float(SINKS[head])
            for i in tokens:
                output, weights = row(q[b, :, head], keys, values, tokens, i, window, steps, sink)
                torch.testing.assert_close(whole[b, i, head], output)
                if i >= LENGTH - 4:
                    torch.testing.assert_close(last[b, i - LENGTH, head], output)
                    expected = torch.tensor([weights.get(j, 0.0) for j in range(LENGTH)], dtype=torch.float64)
                    torch.testing.assert_close(patterns[0][b, head, i - LENGTH], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_large_sink_takes_all_attention(dtype):
    q, cache = inputs()
    (segment,) = cache.segments
    segment = segment._replace(keys=segment.keys.to(dtype), values=segment.values.to(dtype))
    sinks = torch.full((KV * GROUP,), 60.0, dtype=dtype)
    for window in (None, 3):
        z = attend_causally(q.to(dtype), segment, None, window, 0.3, Steps(sinks=sinks))
        assert z.dtype == dtype
        assert float(z.abs().max()) < 1e-12


def test_a_row_at_the_start_of_a_chunk_sees_itself_alone():
    rows = Pass(1, torch.ones(1, 9, dtype=torch.long))
    visible = rows.visible(None, CPU, 8)
    assert visible is not None
    assert visible.flatten().tolist() == [False] * 8 + [True]
    assert rows.visible(None, CPU, 9) is None
    # Chunks count tokens, not padding.
    padded = Pass(2, torch.tensor([[0, 0, 1, 1, 1, 1]])).visible(None, CPU, 2)
    assert padded is not None
    assert padded[0, 0].int().tolist() == [[0, 0, 0, 0, 1, 0], [0, 0, 0, 0, 1, 1]]
