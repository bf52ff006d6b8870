"""The attention engine: what a layer reads, without a pattern that nobody looks at.

Rows of a prompt go through ``scaled_dot_product_attention``, at a memory linear in the length. Rows that follow a
prompt are few, and are computed explicitly over the keys and values kept so far, which any number of rows can share
without a copy. So is every row of a layer whose scores or pattern are hooked.

Everything here is tensors in and tensors out; ``engine.py`` puts it under TransformerLens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from jaxtyping import Bool, Float, Int
from torch import Tensor

__all__ = [
    "LayerCache",
    "Segment",
    "attend_causally",
    "attend_explicitly",
    "row_blocks",
    "trim",
    "visible_keys",
]

SEALED = 256
"""Columns from which on a segment is left alone: what follows begins a new one, so that appending copies little."""

BLOCK = 2**24
"""Scores that are held at a time where nobody needs all of them."""


class Segment(NamedTuple):
    """Keys and values of consecutive columns; each prompt's are read by ``copies`` consecutive rows of the batch."""

    keys: Float[Tensor, "prompt kv_head column d_head"]
    values: Float[Tensor, "prompt kv_head column d_head"]
    copies: int = 1

    @property
    def columns(self) -> int:
        """How many columns there are."""
        return self.keys.shape[2]


@dataclass
class LayerCache:
    """Rotated keys and values of one layer, in segments that are never changed: caches can share them."""

    segments: tuple[Segment, ...] = ()

    @property
    def columns(self) -> int:
        """How many columns there are."""
        return sum(segment.columns for segment in self.segments)

    def append(
        self, keys: Float[Tensor, "batch row kv_head d_head"], values: Float[Tensor, "batch row kv_head d_head"]
    ) -> None:
        """Add the columns of new rows."""
        keys, values = (rearrange(x, "batch row kv d -> batch kv row d").contiguous() for x in (keys, values))
        kept = self.segments
        if kept and kept[-1].columns < SEALED and len(kept[-1].keys) == len(keys):
            keys, values = torch.cat((kept[-1].keys, keys), dim=2), torch.cat((kept[-1].values, values), dim=2)
            kept = kept[:-1]
        self.segments = (*kept, Segment(keys, values))

    def shared(self, copies: int) -> LayerCache:
        """The same columns for a batch in which every row stands ``copies`` times."""
        return LayerCache(tuple(segment._replace(copies=segment.copies * copies) for segment in self.segments))


def trim(segments: Sequence[Segment], columns: int) -> tuple[Segment, ...]:
    """The first columns of all."""
    kept: list[Segment] = []
    for segment in segments:
        if columns <= 0:
            break
        kept.append(segment._replace(keys=segment.keys[:, :, :columns], values=segment.values[:, :, :columns]))
        columns -= segment.columns
    return tuple(kept)


def visible_keys(
    n_rows: int, n_keys: int, padding_mask: Int[Tensor, "batch key"] | None, window: int | None, device: torch.device
) -> Bool[Tensor, "#batch 1 row key"]:
    """Which keys each row attends to: those up to its own column that are no padding and inside its window.

    Rows of the padding itself see their own column, so that no row is empty; nothing reads what they make of it.
    """
    columns = torch.arange(n_keys, device=device)
    rows = columns[n_keys - n_rows :, None]
    visible = columns <= rows
    if window is not None:
        visible = visible & (columns > rows - window)
    visible = rearrange(visible, "row key -> 1 1 row key")
    if padding_mask is not None:
        visible = visible & rearrange(padding_mask.bool(), "batch key -> batch 1 1 key")
    return visible | (columns == rows)


def row_blocks(n_rows: int, scores_per_row: int) -> list[tuple[int, int]]:
    """Ranges of rows whose scores fit into :data:`BLOCK`."""
    size = max(1, BLOCK // max(1, scores_per_row))
    return [(start, min(start + size, n_rows)) for start in range(0, n_rows, size)]


def attend_causally(
    q: Float[Tensor, "batch row head d_head"],
    segment: Segment,
    padding: Sequence[int] | None,
    window: int | None,
    scale: float,
) -> Float[Tensor, "batch row head d_head"]:
    """Outputs of prompts that begin in the segment's first column, by the fused kernel.

    Args:
        q: Rotated queries.
        segment: Keys and values of the same rows.
        padding: Columns of padding to the left of each prompt, whose rows come out as zeros; ``None`` for none.
        window: How many keys, its own included, a row sees at most; ``None`` for all.
        scale: What query-key products are multiplied by.
    """
    q = rearrange(q, "batch row head d -> batch head row d")
    keys, values = segment.keys, segment.values
    if padding is None or not any(padding):
        z = _causal(q, keys, values, window, scale)
    else:
        # One prompt at a time: a mask would cost memory quadratic in the length, and the fast kernels take none.
        z = torch.zeros_like(q)
        for i, left in enumerate(padding):
            if left == q.shape[2]:
                continue
            own_q, own_keys, own_values = (x[i : i + 1, :, left:] for x in (q, keys, values))
            z[i : i + 1, :, left:] = _causal(own_q, own_keys, own_values, window, scale)
    return rearrange(z, "batch head row d -> batch row head d")


def _causal(
    q: Float[Tensor, "batch head row d_head"],
    keys: Float[Tensor, "batch kv_head row d_head"],
    values: Float[Tensor, "batch kv_head row d_head"],
    window: int | None,
    scale: float,
) -> Float[Tensor, "batch head row d_head"]:
    length = q.shape[2]
    masked = window is not None and window < length
    if not _kernel_groups(q.device.type, q.dtype, masked=masked):
        group = q.shape[1] // keys.shape[1]
        keys, values = (repeat(x, "batch kv row d -> batch (kv group) row d", group=group) for x in (keys, values))
    grouped = q.shape[1] != keys.shape[1]
    if window is None or window >= length:
        return F.scaled_dot_product_attention(q, keys, values, is_causal=True, scale=scale, enable_gqa=grouped)
    parts: list[Tensor] = []
    for start in range(0, length, window):
        end, first = min(start + window, length), max(0, start - window + 1)
        mask = visible_keys(end - start, end - first, None, window, q.device)
        own = (q[:, :, start:end], keys[:, :, first:end], values[:, :, first:end])
        parts.append(F.scaled_dot_product_attention(*own, attn_mask=mask, scale=scale, enable_gqa=grouped))
    return torch.cat(parts, dim=2)


def _kernel_groups(device: str, dtype: torch.dtype, *, masked: bool) -> bool:
    """Whether a kernel of linear memory reads grouped keys as they are; elsewhere each query head needs its own.

    Off the CPU that is flash attention alone, which takes half precision and no mask.
    """
    return device == "cpu" or (dtype in (torch.float16, torch.bfloat16) and not masked)


def attend_explicitly(
    q: Float[Tensor, "batch row head d_head"],
    segments: Sequence[Segment],
    visible: Bool[Tensor, "#batch 1 row key"] | None,
    scale: float,
    on_scores: Callable[[Tensor], Tensor] | None = None,
    on_pattern: Callable[[Tensor], Tensor] | None = None,
) -> Float[Tensor, "batch row head d_head"]:
    """Outputs of some rows over all columns of the segments, with their scores and pattern to be seen and changed.

    Half-precision rows are computed in float32, as the fused kernels do, and float32 is what is seen.

    Args:
        q: Rotated queries.
        segments: Keys and values; ``copies`` of one prompt's rows are one matrix product.
        visible: Keys that each row attends to; ``None`` for all.
        scale: What query-key products are multiplied by.
        on_scores: Gets and gives ``[batch head row key]`` before the softmax, minus infinity where masked.
        on_pattern: Gets and gives ``[batch head row key]`` after it.
    """
    exact = q if q.dtype in (torch.float32, torch.float64) else q.float()
    scores = torch.cat([_products(exact, segment, scale) for segment in segments], dim=-1)
    if visible is not None:
        scores.masked_fill_(~visible, -torch.inf)
    if on_scores is None:
        pattern = scores.softmax(dim=-1)
    else:
        pattern = on_scores(scores).to(exact.dtype).softmax(dim=-1)
        # A row whose every key somebody has masked reads nothing.
        pattern = torch.where(pattern.isnan(), 0, pattern)
    if on_pattern is not None:
        pattern = on_pattern(pattern).to(exact.dtype)
    return _mixtures(pattern, segments).to(q.dtype)


def _products(
    q: Float[Tensor, "batch row head d_head"], segment: Segment, scale: float
) -> Float[Tensor, "batch head row column"]:
    """Scaled query-key products; rows of all copies and heads that share keys stand in one matrix."""
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
    """Values weighted by the pattern."""
    first, parts = 0, list[Tensor]()
    for segment in segments:
        weights, copies, kv = pattern[..., first : first + segment.columns], segment.copies, segment.keys.shape[1]
        rows = rearrange(
            weights, "(prompt copy) (kv group) row key -> prompt kv (copy group row) key", copy=copies, kv=kv
        )
        mixed = rows @ segment.values.to(rows.dtype)
        group = pattern.shape[1] // kv
        parts.append(
            rearrange(mixed, "prompt kv (copy group row) d -> (prompt copy) row (kv group) d", copy=copies, group=group)
        )
        first += segment.columns
    return torch.stack(parts).sum(dim=0) if len(parts) > 1 else parts[0]
