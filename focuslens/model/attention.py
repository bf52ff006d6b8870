"""Functions that compute the attention of one layer, with a fused kernel for the rows of a prompt.

The rows of a prompt are computed by ``scaled_dot_product_attention``, which needs memory linear in the prompt's length.
The few rows after a prompt are computed explicitly over cached keys and values. Several rows of a batch can share these
keys and values without a copy. If a layer has a hook on the scores or the pattern, all its rows are computed
explicitly.

``engine.py`` connects these functions to TransformerLens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from focuslens.model.kernels import causal, causal_with_sinks, visible_keys

__all__ = [
    "PLAIN",
    "LayerCache",
    "Segment",
    "Steps",
    "attend_causally",
    "attend_explicitly",
    "row_blocks",
    "trim",
    "visible_keys",
]

SEALED = 256
"""Minimum number of columns of a full segment. Later columns start a new segment, so that little is copied."""

BLOCK = 2**24
"""Maximum number of attention scores in memory at a time, unless a hook needs all rows at once."""


@dataclass(frozen=True, eq=False)
class Steps:
    """Steps of some architectures between the query-key products and the pattern.

    Attributes:
        cap: Soft cap ``c`` of the scaled products ``s``, which become ``c * tanh(s / c)`` (Gemma 2).
        chunk: Length of the chunks of a prompt's tokens outside of which a row sees nothing (Llama 4).
        sinks: One further logit per head, which takes part in the softmax and has no value (gpt-oss). Rows of the
            pattern then sum to less than one.
    """

    cap: float | None = None
    chunk: int | None = None
    sinks: Float[Tensor, "head"] | None = None


PLAIN = Steps()
"""No further steps."""


class Segment(NamedTuple):
    """Keys and values of consecutive columns. ``copies`` consecutive batch rows share one prompt's keys and values."""

    keys: Float[Tensor, "prompt kv_head column d_head"]
    values: Float[Tensor, "prompt kv_head column d_head"]
    copies: int = 1

    @property
    def columns(self) -> int:
        """Number of columns in the segment."""
        return self.keys.shape[2]


@dataclass
class LayerCache:
    """Keys (rotated) and values of one layer, in immutable segments that several caches can share."""

    segments: tuple[Segment, ...] = ()

    @property
    def columns(self) -> int:
        """Number of columns in all segments."""
        return sum(segment.columns for segment in self.segments)

    def append(
        self, keys: Float[Tensor, "batch row kv_head d_head"], values: Float[Tensor, "batch row kv_head d_head"]
    ) -> None:
        """Append the keys and values of new rows as columns."""
        keys, values = (rearrange(x, "batch row kv d -> batch kv row d").contiguous() for x in (keys, values))
        segments = self.segments
        if segments and segments[-1].columns < SEALED and len(segments[-1].keys) == len(keys):
            *segments, last = segments
            keys, values = torch.cat((last.keys, keys), dim=2), torch.cat((last.values, values), dim=2)
        self.segments = (*segments, Segment(keys, values))

    def shared(self, copies: int) -> LayerCache:
        """A new cache with the same columns, in which every batch row occurs ``copies`` times in succession."""
        return LayerCache(tuple(segment._replace(copies=segment.copies * copies) for segment in self.segments))


def trim(segments: Sequence[Segment], columns: int) -> tuple[Segment, ...]:
    """Consecutive segments, cut off after ``columns`` columns in total."""
    parts: list[Segment] = []
    for segment in segments:
        if columns <= 0:
            break
        parts.append(segment._replace(keys=segment.keys[:, :, :columns], values=segment.values[:, :, :columns]))
        columns -= segment.columns
    return tuple(parts)


def row_blocks(n_rows: int, scores_per_row: int) -> list[tuple[int, int]]:
    """Ranges ``(start, end)`` of rows. Each range has at most :data:`BLOCK` scores, or is a single row."""
    size = max(1, BLOCK // max(1, scores_per_row))
    return [(start, min(start + size, n_rows)) for start in range(0, n_rows, size)]


def attend_causally(
    q: Float[Tensor, "batch row head d_head"],
    segment: Segment,
    padding: Sequence[int] | None,
    window: int | None,
    scale: float,
    steps: Steps = PLAIN,
) -> Float[Tensor, "batch row head d_head"]:
    """Attention outputs of whole prompts, computed by the fused kernel.

    No kernel caps scores. With a cap, blocks of rows are computed explicitly, of which no pattern is stored either.

    Args:
        q: Rotated queries.
        segment: Keys (rotated) and values of the rows in ``q``.
        padding: Number of padding columns to the left of each prompt; ``None`` if no prompt has padding. The outputs of
            padding rows are zero.
        window: Maximum number of keys that a row attends to, including the row's own key; ``None`` for no limit.
        scale: Factor that multiplies the query-key products.
        steps: Further steps of the architecture.
    """
    q = rearrange(q, "batch row head d -> batch head row d")
    keys, values = segment.keys, segment.values
    if padding is None or not any(padding):
        z = _chunked(q, keys, values, window, scale, steps)
    else:
        # The kernel is called once per prompt. A mask for the padding would need memory quadratic in the prompt's
        # length, and the fast kernels do not accept masks.
        z = torch.zeros_like(q)
        for i, left in enumerate(padding):
            if left == q.shape[2]:
                continue
            prompt_q, prompt_keys, prompt_values = (x[i : i + 1, :, left:] for x in (q, keys, values))
            z[i : i + 1, :, left:] = _chunked(prompt_q, prompt_keys, prompt_values, window, scale, steps)
    return rearrange(z, "batch head row d -> batch row head d")


def _chunked(
    q: Float[Tensor, "batch head row d_head"],
    keys: Float[Tensor, "batch kv_head row d_head"],
    values: Float[Tensor, "batch kv_head row d_head"],
    window: int | None,
    scale: float,
    steps: Steps,
) -> Float[Tensor, "batch head row d_head"]:
    """Causal attention of rows without padding, chunk by chunk if there are chunks."""
    length = q.shape[2]
    size = length if steps.chunk is None else min(steps.chunk, length)
    parts: list[Tensor] = []
    for start in range(0, length, size):
        rows, seen, mixed = (x[:, :, start : start + size] for x in (q, keys, values))
        if steps.cap is not None:
            parts.append(_capped(rows, seen, mixed, window, scale, steps))
        elif steps.sinks is not None:
            parts.append(causal_with_sinks(rows, seen, mixed, window, scale, steps.sinks))
        else:
            parts.append(causal(rows, seen, mixed, window, scale))
    return torch.cat(parts, dim=2) if len(parts) > 1 else parts[0]


def _capped(
    q: Float[Tensor, "batch head row d_head"],
    keys: Float[Tensor, "batch kv_head row d_head"],
    values: Float[Tensor, "batch kv_head row d_head"],
    window: int | None,
    scale: float,
    steps: Steps,
) -> Float[Tensor, "batch head row d_head"]:
    """Causal attention of rows without padding, computed explicitly for one block of rows at a time."""
    length = q.shape[2]
    size = min(max(1, BLOCK // (q.shape[0] * q.shape[1] * length)), _CAPPED_ROWS, length)
    parts: list[Tensor] = []
    for start in range(0, length, size):
        end = min(start + size, length)
        first = 0 if window is None else max(0, start - window + 1)
        rows = rearrange(q[:, :, start:end], "batch head row d -> batch row head d")
        visible = visible_keys(end - start, end - first, None, window, q.device)
        segment = Segment(keys[:, :, first:end], values[:, :, first:end])
        parts.append(attend_explicitly(rows, [segment], visible, scale, steps=steps))
    return rearrange(torch.cat(parts, dim=1), "batch row head d -> batch head row d")


_CAPPED_ROWS = 512
"""Maximum number of rows in a block of :func:`_capped`. In smaller blocks fewer keys after the row are computed."""


def attend_explicitly(
    q: Float[Tensor, "batch row head d_head"],
    segments: Sequence[Segment],
    visible: Bool[Tensor, "#batch 1 row key"] | None,
    scale: float,
    on_scores: Callable[[Tensor], Tensor] | None = None,
    on_pattern: Callable[[Tensor], Tensor] | None = None,
    *,
    steps: Steps = PLAIN,
) -> Float[Tensor, "batch row head d_head"]:
    """Attention outputs of rows over all columns of the segments, with callbacks for scores and pattern.

    If ``q`` has half precision, attention is computed in float32, as in the fused kernels. The callbacks then receive
    float32 tensors.

    Args:
        q: Rotated queries.
        segments: Keys (rotated) and values. Batch rows that share a prompt are computed in one matrix product.
        visible: Mask of the keys that each row attends to; ``None`` if every row attends to all keys.
        scale: Factor that multiplies the query-key products.
        on_scores: Callback that receives the scores ``[batch head row key]`` before the softmax and returns the scores
            to use. Masked scores are minus infinity.
        on_pattern: Callback that receives the pattern ``[batch head row key]`` and returns the pattern to use. With
            sinks, its rows sum to less than one: the rest is the mass of the sink.
        steps: Further steps of the architecture. Chunks are a part of ``visible``.
    """
    exact = q if q.dtype in (torch.float32, torch.float64) else q.float()
    scores = torch.cat([_products(exact, segment, scale) for segment in segments], dim=-1)
    if steps.cap is not None:
        scores = torch.tanh(scores / steps.cap) * steps.cap
    if visible is not None:
        scores.masked_fill_(~visible, -torch.inf)
    if on_scores is None:
        pattern = _softmax(scores, steps.sinks)
    else:
        pattern = _softmax(on_scores(scores).to(exact.dtype), steps.sinks)
        # If a hook masks every key of a row, the softmax of that row is NaN. The output of the row is set to zero.
        pattern = torch.where(pattern.isnan(), 0, pattern)
    if on_pattern is not None:
        pattern = on_pattern(pattern).to(exact.dtype)
    return _mixtures(pattern, segments).to(q.dtype)


def _softmax(
    scores: Float[Tensor, "batch head row key"], sinks: Float[Tensor, "head"] | None
) -> Float[Tensor, "batch head row key"]:
    """Softmax over the keys, and over the head's sink if there are sinks, whose share is left out of the result."""
    if sinks is None:
        return scores.softmax(dim=-1)
    sink = rearrange(sinks.to(scores), "head -> head 1 1").expand(*scores.shape[:3], 1)
    return torch.cat((scores, sink), dim=-1).softmax(dim=-1)[..., :-1].contiguous()


def _products(
    q: Float[Tensor, "batch row head d_head"], segment: Segment, scale: float
) -> Float[Tensor, "batch head row column"]:
    """Scaled query-key products. The queries of all copies and heads that share keys form one matrix."""
    copies, kv = segment.copies, segment.keys.shape[1]
    group = q.shape[2] // kv
    q = rearrange(q * scale, "(prompt copy) row (kv group) d -> prompt kv (copy group row) d", copy=copies, kv=kv)
    products = q @ segment.keys.to(q.dtype).mT
    return rearrange(
        products, "prompt kv (copy group row) key -> (prompt copy) (kv group) row key", copy=copies, group=group
    )


def _mixtures(
    pattern: Float[Tensor, "batch head row key"], segments: Sequence[Segment]
) -> Float[Tensor, "batch row head d_head"]:
    """Sums of the values, weighted by the pattern."""
    first, parts = 0, list[Tensor]()
    for segment in segments:
        weights, copies, kv = pattern[..., first : first + segment.columns], segment.copies, segment.keys.shape[1]
        rows = rearrange(
            weights, "(prompt copy) (kv group) row key -> prompt kv (copy group row) key", copy=copies, kv=kv
        )
        mixtures = rows @ segment.values.to(rows.dtype)
        group = pattern.shape[1] // kv
        parts.append(
            rearrange(
                mixtures, "prompt kv (copy group row) d -> (prompt copy) row (kv group) d", copy=copies, group=group
            )
        )
        first += segment.columns
    return torch.stack(parts).sum(dim=0) if len(parts) > 1 else parts[0]
