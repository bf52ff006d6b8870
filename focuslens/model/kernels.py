"""Calls of the fused kernel for rows of prompts, and the mask of the keys that rows see."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from jaxtyping import Bool, Float, Int
from torch import Tensor

__all__ = ["causal", "causal_with_sinks", "visible_keys"]


def visible_keys(
    n_rows: int,
    n_keys: int,
    padding_mask: Int[Tensor, "batch key"] | None,
    window: int | None,
    device: torch.device,
    chunk: int | None = None,
) -> Bool[Tensor, "#batch 1 row key"]:
    """Mask of the keys that each row attends to: up to the row's column, inside the window, and not padding.

    If ``chunk`` is given, a row also attends to no token of an earlier chunk. Chunks count the tokens of a prompt.

    A padding row also attends to its own column, because a softmax over no keys would be NaN. This does not affect
    token rows, which never attend to padding.
    """
    columns = torch.arange(n_keys, device=device)
    rows = columns[n_keys - n_rows :, None]
    visible = columns <= rows
    if window is not None:
        visible = visible & (columns > rows - window)
    visible = rearrange(visible, "row key -> 1 1 row key")
    if chunk is not None:
        tokens = columns[None] if padding_mask is None else (padding_mask.long().cumsum(dim=1) - 1).clamp(min=0)
        chunks = tokens // chunk
        own = rearrange(chunks[:, n_keys - n_rows :], "batch row -> batch 1 row 1")
        visible = visible & (own == rearrange(chunks, "batch key -> batch 1 1 key"))
    if padding_mask is not None:
        visible = visible & rearrange(padding_mask.bool(), "batch key -> batch 1 1 key")
    return visible | (columns == rows)


def causal(
    q: Float[Tensor, "batch head row d_head"],
    keys: Float[Tensor, "batch kv_head row d_head"],
    values: Float[Tensor, "batch kv_head row d_head"],
    window: int | None,
    scale: float,
) -> Float[Tensor, "batch head row d_head"]:
    """Causal attention of rows without padding. If there is a window, ``window`` rows are computed at a time."""
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
        block = (q[:, :, start:end], keys[:, :, first:end], values[:, :, first:end])
        parts.append(F.scaled_dot_product_attention(*block, attn_mask=mask, scale=scale, enable_gqa=grouped))
    return torch.cat(parts, dim=2)


def _kernel_groups(device: str, dtype: torch.dtype, *, masked: bool) -> bool:
    """Whether a kernel with linear memory accepts grouped keys. If not, keys must be repeated for every query head.

    On the CPU, every kernel accepts grouped keys. On other devices, only flash attention accepts grouped keys. Flash
    attention needs half precision and does not accept masks.
    """
    return device == "cpu" or (dtype in (torch.float16, torch.bfloat16) and not masked)


def causal_with_sinks(
    q: Float[Tensor, "batch head row d_head"],
    keys: Float[Tensor, "batch kv_head row d_head"],
    values: Float[Tensor, "batch kv_head row d_head"],
    window: int | None,
    scale: float,
    sinks: Float[Tensor, "head"],
) -> Float[Tensor, "batch head row d_head"]:
    """Causal attention of rows without padding, in which each head has one more logit that has no value.

    The kernels know no such logit. It becomes the product of a further dimension with a further first key, whose value
    is zero: the queries have ``sink / scale`` in this dimension, the key has 1, and all other keys have 0.
    """
    length, d_head = q.shape[2:]
    extra = 8 if q.device.type == "cuda" else 1  # flash attention needs multiples of 8
    logit = (sinks / scale).to(q.dtype).expand(len(q), length, -1)
    q = F.pad(torch.cat((q, rearrange(logit, "batch row head -> batch head row 1")), dim=-1), (0, extra - 1))
    keys, values = (F.pad(x, (0, extra)) for x in (keys, values))
    sink_key, sink_value = (x.new_zeros(x.shape[0], x.shape[1], 1, x.shape[3]) for x in (keys, values))
    sink_key[..., d_head] = 1
    masked = window is not None and window < length
    if not _kernel_groups(q.device.type, q.dtype, masked=masked):
        group = q.shape[1] // keys.shape[1]
        keys, values, sink_key, sink_value = (
            repeat(x, "batch kv row d -> batch (kv group) row d", group=group)
            for x in (keys, values, sink_key, sink_value)
        )
    grouped = q.shape[1] != keys.shape[1]
    if window is None or window >= length:
        # A first row that sees the further key alone keeps the rows and the keys aligned.
        rows = torch.cat((torch.zeros_like(q[:, :, :1]), q), dim=2)
        keys, values = torch.cat((sink_key, keys), dim=2), torch.cat((sink_value, values), dim=2)
        z = F.scaled_dot_product_attention(rows, keys, values, is_causal=True, scale=scale, enable_gqa=grouped)
        return z[:, :, 1:, :d_head]
    parts: list[Tensor] = []
    for start in range(0, length, window):
        end, first = min(start + window, length), max(0, start - window + 1)
        mask = F.pad(visible_keys(end - start, end - first, None, window, q.device), (1, 0), value=True)
        block_keys = torch.cat((sink_key, keys[:, :, first:end]), dim=2)
        block_values = torch.cat((sink_value, values[:, :, first:end]), dim=2)
        rows = q[:, :, start:end]
        parts.append(
            F.scaled_dot_product_attention(
                rows, block_keys, block_values, attn_mask=mask, scale=scale, enable_gqa=grouped
            )
        )
    return torch.cat(parts, dim=2)[..., :d_head]
