"""The attention engine under ``HookedTransformer``: the same numbers and hooks, at the price of the plain model.

TransformerLens computes every layer's ``[batch head row key]`` pattern in full, several times over, keeps keys before
their rotation and rotates all of them again for every new token. Here a prompt's rows go through the fused kernel and
rotated keys are kept. ``hook_q``, ``hook_k``, ``hook_v``, ``hook_rot_q``, ``hook_rot_k`` and ``hook_z`` fire as usual;
so do ``hook_attn_scores`` and ``hook_pattern``, in layers where somebody looks at them.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from jaxtyping import Bool, Float, Int
from torch import Tensor

from focuslens.attention import (
    LayerCache,
    Segment,
    attend_causally,
    attend_explicitly,
    row_blocks,
    trim,
    visible_keys,
)
from focuslens.hooks import is_row_wise

__all__ = ["KeyValueCache", "Pass", "can_fuse", "fused_attention"]


def can_fuse(hooked: Any) -> bool:
    """Whether a model's attention is plain ``softmax(Q K^T * scale) V`` over rotary queries and keys, and its own."""
    cfg = hooked.cfg
    return (
        cfg.positional_embedding_type == "rotary"
        and cfg.attention_dir == "causal"
        and cfg.attn_scores_soft_cap <= 0
        and not any(getattr(cfg, name, False) for name in _UNUSUAL)
        and str(cfg.original_architecture) not in ("OlmoeForCausalLM", "Olmo2ForCausalLM", "Olmo3ForCausalLM")
        # A layer whose forward somebody has replaced, as accelerate does, is left to them.
        and not any("forward" in vars(block.attn) for block in hooked.blocks)
    )


_UNUSUAL = (
    "use_attention_sinks",
    "use_logn_attn",
    "use_dynamic_ntk_rope",
    "load_in_4bit",
    "use_attn_result",
    "clip_qkv",
)


@dataclass
class KeyValueCache:
    """Keys and values of all layers, in the form that ``HookedTransformer`` asks for and the engine fills.

    Args:
        layers: One cache a layer.
        mask: 1 where a column holds a token, 0 where it is padding.
        heads: Key-value heads a layer, and numbers a head.
    """

    layers: list[LayerCache]
    mask: Int[Tensor, "batch column"]
    heads: tuple[int, int]

    def shared(self, copies: int = 1) -> KeyValueCache:
        """A cache for ``copies`` consecutive rows a prompt, which can grow without changing this one."""
        mask = repeat(self.mask, "batch column -> (batch copy) column", copy=copies)
        return KeyValueCache([layer.shared(copies) for layer in self.layers], mask, self.heads)

    def __getitem__(self, index: int) -> _Entry:
        # A tensor without data: ``HookedTransformer`` reads the number of columns from its shape.
        layer = self.layers[index]
        return _Entry(layer, torch.empty(len(self.mask), layer.columns, *self.heads, device="meta"))

    def append_attention_mask(self, new: Int[Tensor, "batch row"]) -> Int[Tensor, "batch column"]:
        """What ``HookedTransformer`` calls before its layers run."""
        self.mask = torch.cat((self.mask, new.to(self.mask.device)), dim=1)
        return self.mask


class _Entry(NamedTuple):
    """One layer of a cache, as ``HookedTransformer`` sees it."""

    layer: LayerCache
    past_keys: Tensor


@dataclass(frozen=True, eq=False)
class Pass:
    """The rows and columns of one forward pass, looked at once for all layers.

    Args:
        n_rows: Rows that are run.
        mask: 1 where a column holds a token, 0 where it is padding; of all columns, on the CPU.
    """

    n_rows: int
    mask: Int[Tensor, "batch column"]
    _visible: dict[tuple[int | None, torch.device], Tensor | None] = field(default_factory=dict[Any, Any])

    @cached_property
    def padded(self) -> bool:
        """Whether any column is padding."""
        return not bool(self.mask.all())

    @cached_property
    def left_padding(self) -> tuple[int, ...] | None:
        """Columns of padding before each prompt, where the pass begins with the prompts; else ``None``."""
        n_columns = self.mask.shape[1]
        left = n_columns - self.mask.sum(dim=1)
        plain = (torch.arange(n_columns) >= left[:, None]).long()
        return tuple(left.tolist()) if self.n_rows == n_columns and torch.equal(plain, self.mask.long()) else None

    def visible(self, window: int | None, device: torch.device) -> Bool[Tensor, "#batch 1 row column"] | None:
        """Keys that each row attends to; ``None`` where that is all of them."""
        n_columns = self.mask.shape[1]
        if self.n_rows == 1 and not self.padded and (window is None or window >= n_columns):
            return None
        place = (window, device)
        if place not in self._visible:
            mask = self.mask.to(device) if self.padded else None
            self._visible[place] = visible_keys(self.n_rows, n_columns, mask, window, device)
        return self._visible[place]

    def block(self, start: int, end: int) -> Pass:
        """Some of the rows, with the columns up to the last of them."""
        return Pass(end - start, self.mask[:, : self.mask.shape[1] - self.n_rows + end])


@contextmanager
def fused_attention(hooked: Any, rows: Pass) -> Generator[None]:
    """Run one pass of a ``HookedTransformer`` on the engine; its own attention is back in place when the block ends.

    A cache, if there is one, has to be a :class:`KeyValueCache`.
    """
    layers = [block.attn for block in hooked.blocks]
    try:
        for layer in layers:
            layer.forward = partial(_forward, layer, rows)
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)


def _forward(
    layer: Any,
    rows: Pass,
    query_input: Float[Tensor, "batch row d_model"],
    key_input: Float[Tensor, "batch row d_model"],
    value_input: Float[Tensor, "batch row d_model"],
    past_kv_cache_entry: _Entry | None = None,
    additive_attention_mask: Tensor | None = None,
    attention_mask: Int[Tensor, "batch key"] | None = None,
    position_bias: Tensor | None = None,
) -> Float[Tensor, "batch row d_model"]:
    """What ``AbstractAttention.forward`` computes, with its hooks."""
    q, k, v = layer.calculate_qkv_matrices(query_input, key_input, value_input)
    cache = LayerCache() if past_kv_cache_entry is None else past_kv_cache_entry.layer
    start = cache.columns
    q = layer.hook_rot_q(layer.apply_rotary(q, start, attention_mask))
    cache.append(layer.apply_rotary(k, start, attention_mask), v)
    segments = cache.segments
    if _hooked(layer.hook_rot_k):
        segments = (_under_hook(layer.hook_rot_k, segments),)
    z = layer.hook_z(_attend(layer, rows, q, segments))
    weight = rearrange(layer.W_O, "head d_head d_model -> d_model (head d_head)")
    return F.linear(rearrange(z, "batch row head d_head -> batch row (head d_head)"), weight, layer.b_O)


def _attend(
    layer: Any, rows: Pass, q: Float[Tensor, "batch row head d_head"], segments: tuple[Segment, ...]
) -> Float[Tensor, "batch row head d_head"]:
    window = layer.cfg.window_size if layer.attn_type == "local" else None
    scale = 1 / float(layer.attn_scale)
    watched = [point if _hooked(point) else None for point in (layer.hook_attn_scores, layer.hook_pattern)]
    if not any(watched) and rows.left_padding is not None:
        return attend_causally(q, segments[0], rows.left_padding, window, scale)
    n_columns = rows.mask.shape[1]
    blocks = row_blocks(rows.n_rows, q.shape[0] * q.shape[2] * n_columns)
    if len(blocks) == 1 or not all(point is None or _row_wise(point) for point in watched):
        return attend_explicitly(q, segments, rows.visible(window, q.device), scale, *watched)
    parts: list[Tensor] = []
    for start, end in blocks:
        own = rows.block(start, end)
        keys = trim(segments, own.mask.shape[1])
        parts.append(attend_explicitly(q[:, start:end], keys, own.visible(window, q.device), scale, *watched))
    return torch.cat(parts, dim=1)


def _under_hook(point: Any, segments: tuple[Segment, ...]) -> Segment:
    """All columns as one segment, whose keys a hook has seen and may have changed for this pass."""
    whole = [
        torch.cat(
            [repeat(x, "prompt kv key d -> (prompt copy) key kv d", copy=part.copies) for x, part in parts], dim=1
        )
        for parts in ([(part.keys, part) for part in segments], [(part.values, part) for part in segments])
    ]
    keys, values = (rearrange(x, "batch key kv d -> batch kv key d") for x in (point(whole[0]), whole[1]))
    return Segment(keys, values)


def _hooked(point: Any) -> bool:
    return bool(point.fwd_hooks or point.bwd_hooks or point._forward_hooks or point._forward_pre_hooks)


def _row_wise(point: Any) -> bool:
    """Whether everybody who looks at the point can do with some rows at a time."""
    marked = [handle for handle in point.fwd_hooks if is_row_wise(getattr(handle, "user_hook", None))]
    return not point.bwd_hooks and len(marked) == len(point._forward_hooks) and not point._forward_pre_hooks
