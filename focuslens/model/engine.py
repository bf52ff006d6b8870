"""The attention engine that runs under TransformerLens: its caches, its passes, and the hook points of attention.

The rows of a prompt go through the fused kernel. The rows after the prompt are computed over cached, rotated keys.
``hook_q``, ``hook_k``, ``hook_v``, ``hook_rot_q``, ``hook_rot_k`` and ``hook_z`` always fire. ``hook_attn_scores`` and
``hook_pattern`` fire only in layers in which they have a hook.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from einops import rearrange, repeat
from jaxtyping import Bool, Float, Int
from torch import Tensor

from focuslens.heads import ModelShape
from focuslens.hooks import is_row_wise
from focuslens.model.attention import (
    LayerCache,
    Segment,
    attend_causally,
    attend_explicitly,
    row_blocks,
    trim,
    visible_keys,
)

__all__ = [
    "CacheEntry",
    "Filled",
    "KeyValueCache",
    "Pass",
    "attend",
    "is_hooked",
    "replaced_forwards",
    "stop_layer",
    "under_hook",
]


@dataclass
class KeyValueCache:
    """Keys and values of all layers, filled by the engine. It has the interface of ``HookedTransformer``'s own cache.

    Args:
        layers: One cache per layer.
        mask: 1 where a column holds a token, 0 where the column is padding.
        heads: Number of key-value heads per layer, and ``d_head``, the size of a head.
    """

    layers: list[LayerCache]
    mask: Int[Tensor, "batch column"]
    heads: tuple[int, int]

    @classmethod
    def empty(cls, shape: ModelShape, batch: int, device: torch.device) -> KeyValueCache:
        """A cache without columns."""
        mask = torch.zeros(batch, 0, dtype=torch.long, device=device)
        return cls([LayerCache() for _ in range(shape.n_layers)], mask, (shape.n_key_value_heads, shape.d_head))

    def shared(self, copies: int = 1) -> KeyValueCache:
        """An independent cache with ``copies`` consecutive rows per prompt, which shares the segments of this cache."""
        mask = repeat(self.mask, "batch column -> (batch copy) column", copy=copies)
        return KeyValueCache([layer.shared(copies) for layer in self.layers], mask, self.heads)

    def below(self, layer: int, copies: int) -> KeyValueCache:
        """A cache that shares this cache's layers below ``layer``. In the new cache, all other layers are empty."""
        layers = [cache.shared(copies) if i < layer else LayerCache() for i, cache in enumerate(self.layers)]
        mask = torch.zeros(len(self.mask) * copies, 0, dtype=self.mask.dtype, device=self.mask.device)
        return KeyValueCache(layers, mask, self.heads)

    def __getitem__(self, index: int) -> CacheEntry:
        # The tensor has no data: ``HookedTransformer`` reads only the number of columns from its shape.
        layer = self.layers[index]
        return CacheEntry(layer, torch.empty(len(self.mask), layer.columns, *self.heads, device="meta"))

    def append_attention_mask(self, new: Int[Tensor, "batch row"]) -> Int[Tensor, "batch column"]:
        """Append the mask of new columns, and return the whole mask. ``HookedTransformer`` calls this before a pass."""
        self.mask = torch.cat((self.mask, new.to(self.mask.device)), dim=1)
        return self.mask


class Filled(Exception):
    """Signal that ends a pass early, because the keys, values and observations that are needed are complete."""


def stop_layer(blocks: Any, last: int | None, early: Sequence[str]) -> int | None:
    """The first layer, from ``last`` on, in which a pass may end as soon as the layer's keys and values are known.

    Args:
        blocks: The model's blocks.
        last: Last layer whose keys, values or activations are needed; ``None`` for a pass that must not end early.
        early: Names of the modules that run before a block's keys and values are known.

    Returns:
        The layer's index; ``None`` if the pass must run to its end.
    """
    later = range(len(blocks) if last is None else last, len(blocks))
    return next((layer for layer in later if _may_stop_at_keys(blocks[layer], early)), None)


def _may_stop_at_keys(block: Any, early: Sequence[str]) -> bool:
    """Whether the block has no hooks, apart from hooks on the ``early`` modules and on the modules inside them."""
    modules = [
        getattr(block.attn if name.startswith("attn.") else block, name.removeprefix("attn."), None) for name in early
    ]
    before_keys = {inner for module in modules if module is not None for inner in module.modules()}
    return not any(is_hooked(module) for module in block.modules() if module not in before_keys)


class CacheEntry(NamedTuple):
    """One layer of a cache, with ``past_keys``, the attribute that ``HookedTransformer`` reads."""

    layer: LayerCache
    past_keys: Tensor


@dataclass(frozen=True, eq=False)
class Pass:
    """Rows and columns of one forward pass, and the masks that its layers share.

    Args:
        n_rows: Number of rows in the pass.
        mask: Mask of all columns, on the CPU: 1 where a column holds a token, 0 where it is padding.
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
        """Padding columns before each prompt; ``None`` unless the prompts are whole and padded on the left only."""
        n_columns = self.mask.shape[1]
        padding = n_columns - self.mask.sum(dim=1)
        left_padded = (torch.arange(n_columns) >= padding[:, None]).long()
        whole = self.n_rows == n_columns and torch.equal(left_padded, self.mask.long())
        return tuple(padding.tolist()) if whole else None

    def visible(self, window: int | None, device: torch.device) -> Bool[Tensor, "#batch 1 row column"] | None:
        """Mask of the keys that each row attends to; ``None`` for all keys."""
        n_columns = self.mask.shape[1]
        if self.n_rows == 1 and not self.padded and (window is None or window >= n_columns):
            return None
        key = (window, device)
        if key not in self._visible:
            mask = self.mask.to(device) if self.padded else None
            self._visible[key] = visible_keys(self.n_rows, n_columns, mask, window, device)
        return self._visible[key]

    def require(self, layer_input: Float[Tensor, "batch row *head d_model"], cache: LayerCache) -> None:
        """Check that the input and the cache of a layer belong to this pass.

        Raises:
            RuntimeError: If the sizes differ, because a hook or another caller has run the model during this pass.
        """
        shape, columns = (len(self.mask), self.n_rows), cache.columns + self.n_rows
        if layer_input.shape[:2] != shape or columns != self.mask.shape[1]:
            raise RuntimeError(
                f"a pass of {shape[1]} rows per prompt, {shape[0]} prompt(s), was interrupted by another run of the "
                "same model; a hook must not run the model it is on: run it before or after, or on a copy"
            )

    def block(self, start: int, end: int) -> Pass:
        """A pass of the rows from ``start`` up to, but not including, ``end``, with the columns up to its last row."""
        return Pass(end - start, self.mask[:, : self.mask.shape[1] - self.n_rows + end])


@contextmanager
def replaced_forwards(layers: Sequence[Any], forwards: Sequence[Callable[..., Any]]) -> Generator[None]:
    """Replace the ``forward`` methods of attention layers inside a ``with`` block."""
    try:
        for layer, forward in zip(layers, forwards, strict=True):
            vars(layer)["forward"] = forward  # a bridge's __setattr__ would set it on the wrapped module
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)


def attend(
    points: Any,
    rows: Pass,
    q: Float[Tensor, "batch row head d_head"],
    segments: tuple[Segment, ...],
    window: int | None,
    scale: float,
) -> Float[Tensor, "batch row head d_head"]:
    """Attention outputs of one layer, computed as cheaply as its hooks on scores and pattern allow.

    Args:
        points: The layer's attention module, with ``hook_attn_scores`` and ``hook_pattern``.
        rows: Rows and columns of the current pass.
        q: Rotated queries.
        segments: Rotated keys and values of all columns.
        window: Maximum number of keys that a row attends to, its own key included; ``None`` for all.
        scale: Factor that multiplies the query-key products.
    """
    hooked = [point if is_hooked(point) else None for point in (points.hook_attn_scores, points.hook_pattern)]
    if not any(hooked) and rows.left_padding is not None:
        return attend_causally(q, segments[0], rows.left_padding, window, scale)
    n_columns = rows.mask.shape[1]
    blocks = row_blocks(rows.n_rows, q.shape[0] * q.shape[2] * n_columns)
    whole = [point for point in hooked if point is not None and not _row_wise(point)]
    if len(blocks) == 1 or whole:
        callbacks = [partial(_in_dtype, point, q.dtype) if point in whole else point for point in hooked]
        return attend_explicitly(q, segments, rows.visible(window, q.device), scale, *callbacks)
    parts: list[Tensor] = []
    for start, end in blocks:
        block = rows.block(start, end)
        block_segments = trim(segments, block.mask.shape[1])
        parts.append(
            attend_explicitly(q[:, start:end], block_segments, block.visible(window, q.device), scale, *hooked)
        )
    return torch.cat(parts, dim=1)


def under_hook(point: Any, segments: tuple[Segment, ...]) -> Segment:
    """All columns as one segment, with the keys that the hooks on ``point`` return for this pass."""
    keys = torch.cat([_per_row(segment.keys, segment.copies) for segment in segments], dim=1)
    values = torch.cat([_per_row(segment.values, segment.copies) for segment in segments], dim=1)
    keys, values = (rearrange(x, "batch key kv d -> batch kv key d") for x in (point(keys), values))
    return Segment(keys, values)


def _per_row(x: Float[Tensor, "prompt kv_head key d_head"], copies: int) -> Float[Tensor, "batch key kv_head d_head"]:
    """Keys or values of a segment, repeated for every row of the batch, in the layout of TransformerLens's hooks."""
    return repeat(x, "prompt kv key d -> (prompt copy) key kv d", copy=copies)


def is_hooked(module: Any) -> bool:
    """Whether a hook point or other module has hooks that were not set by transformers or TransformerLens itself."""
    libraries = ("transformers.", "transformer_lens.") if not hasattr(module, "fwd_hooks") else ()
    stores = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    hooks = [hook for store in stores for hook in store.values()]
    return any(not str(getattr(hook, "__module__", "")).startswith(libraries) for hook in hooks)


def _in_dtype(point: Any, dtype: torch.dtype, exact: Tensor) -> Tensor:
    """Run hooks on scores or a pattern in the model's dtype, as TransformerLens does.

    If the hooks leave the tensor unchanged, the unrounded tensor is returned, so that an observer changes no result.
    """
    rounded = exact.to(dtype)
    version = rounded._version
    result = point(rounded)
    return exact if result is rounded and rounded._version == version else result


def _row_wise(point: Any) -> bool:
    """Whether every hook on a point accepts blocks of rows; see :func:`focuslens.hooks.row_wise`."""
    row_wise = [handle for handle in point.fwd_hooks if is_row_wise(getattr(handle, "user_hook", None))]
    return not point.bwd_hooks and len(row_wise) == len(point._forward_hooks) and not point._forward_pre_hooks
