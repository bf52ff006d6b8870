"""Fused attention for ``HookedTransformer``: the same numbers and hooks, without writing a pattern out.

TransformerLens computes every layer's ``[batch head row key]`` pattern in full, several times over. Where nobody looks
at it (no hook on ``hook_attn_scores`` or ``hook_pattern`` of that layer), ``scaled_dot_product_attention`` gives the
same output at a memory linear in the length; ``hook_q``, ``hook_k``, ``hook_v``, ``hook_rot_q``, ``hook_rot_k`` and
``hook_z`` fire as usual.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from jaxtyping import Bool, Float, Int
from torch import Tensor

__all__ = ["can_fuse", "fused_attention", "visible_keys"]


def can_fuse(cfg: Any) -> bool:
    """Whether a model's attention is plain ``softmax(Q K^T * scale) V`` over rotary queries and keys in full precision.

    In half precision the kernel and TransformerLens round differently by far more than in float32. A hook on one layer
    would then change the numbers by itself, and a comparison with the unhooked model would measure rounding.
    """
    return (
        cfg.dtype in (torch.float32, torch.float64)
        and cfg.positional_embedding_type == "rotary"
        and cfg.attention_dir == "causal"
        and cfg.attn_scores_soft_cap <= 0
        and not any(
            getattr(cfg, name, False)
            for name in ("use_attention_sinks", "use_logn_attn", "load_in_4bit", "use_attn_result", "clip_qkv")
        )
        and str(cfg.original_architecture) not in ("OlmoeForCausalLM", "Olmo2ForCausalLM", "Olmo3ForCausalLM")
    )


@contextmanager
def fused_attention(hooked: Any) -> Generator[None]:
    """Run a ``HookedTransformer`` with fused attention in every layer whose scores and pattern nobody hooks.

    The layers' own ``forward`` is back in place when the block ends, whatever happens in it.
    """
    layers = [block.attn for block in hooked.blocks] if can_fuse(hooked.cfg) else []
    # A layer whose forward somebody has replaced, as accelerate does, is left to them.
    layers = [layer for layer in layers if "forward" not in vars(layer)]
    fused = [layer for layer in layers if not (_hooked(layer.hook_attn_scores) or _hooked(layer.hook_pattern))]
    try:
        for layer in fused:
            layer.forward = partial(_fused_forward, layer)
        yield
    finally:
        for layer in fused:
            vars(layer).pop("forward", None)


def _hooked(point: Any) -> bool:
    return bool(point.fwd_hooks or point.bwd_hooks or point._forward_hooks or point._forward_pre_hooks)


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


def _fused_forward(
    layer: Any,
    query_input: Float[Tensor, "batch row d_model"],
    key_input: Float[Tensor, "batch row d_model"],
    value_input: Float[Tensor, "batch row d_model"],
    past_kv_cache_entry: Any | None = None,
    additive_attention_mask: Tensor | None = None,
    attention_mask: Int[Tensor, "batch key"] | None = None,
    position_bias: Tensor | None = None,
) -> Float[Tensor, "batch row d_model"]:
    """What ``AbstractAttention.forward`` computes, with its hooks but those on scores and pattern."""
    q, k, v = layer.calculate_qkv_matrices(query_input, key_input, value_input)
    start = 0
    if past_kv_cache_entry is not None:
        start = past_kv_cache_entry.past_keys.size(1)
        k, v = past_kv_cache_entry.append(k, v)
    q = layer.hook_rot_q(layer.apply_rotary(q, start, attention_mask))
    k = layer.hook_rot_k(layer.apply_rotary(k, 0, attention_mask))
    z = layer.hook_z(_attend(layer, q, k, v, attention_mask))
    weight = rearrange(layer.W_O, "head d_head d_model -> d_model (head d_head)")
    return F.linear(rearrange(z, "batch row head d_head -> batch row (head d_head)"), weight, layer.b_O)


def _attend(
    layer: Any,
    q: Float[Tensor, "batch row head d_head"],
    k: Float[Tensor, "batch key kv_head d_head"],
    v: Float[Tensor, "batch key kv_head d_head"],
    padding_mask: Int[Tensor, "batch key"] | None,
) -> Float[Tensor, "batch row head d_head"]:
    n_rows, n_keys, group = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    window = layer.cfg.window_size if layer.attn_type == "local" else None
    if padding_mask is not None and bool(padding_mask.all()):
        padding_mask = None
    # The kernel's own causal mask needs no memory; it fits only where rows and keys begin in the same column.
    simple = padding_mask is None and window is None and n_rows == n_keys
    mask = None if simple else visible_keys(n_rows, n_keys, padding_mask, window, q.device)
    k, v = (repeat(x, "batch key kv_head d_head -> batch (kv_head group) key d_head", group=group) for x in (k, v))
    q = rearrange(q, "batch row head d_head -> batch head row d_head")
    z = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=simple, scale=1 / float(layer.attn_scale))
    return rearrange(z, "batch head row d_head -> batch row head d_head")
