"""The attention engine under TransformerLens: what its caches, passes and hook points mean to it.

A prompt's rows go through the fused kernel, rows that follow it are computed over the rotated keys kept so far.
``hook_q``, ``hook_k``, ``hook_v``, ``hook_rot_q``, ``hook_rot_k`` and ``hook_z`` fire as usual; so do
``hook_attn_scores`` and ``hook_pattern``, in layers where somebody looks at them.
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
    """Keys and values of all layers, in the form that ``HookedTransformer`` asks for and the engine fills.

    Args:
        layers: One cache a layer.
        mask: 1 where a column holds a token, 0 where it is padding.
        heads: Key-value heads a layer, and numbers a head.
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
        """A cache for ``copies`` consecutive rows a prompt, which can grow without changing this one."""
        mask = repeat(self.mask, "batch column -> (batch copy) column", copy=copies)
        return KeyValueCache([layer.shared(copies) for layer in self.layers], mask, self.heads)

    def below(self, layer: int, copies: int) -> KeyValueCache:
        """The layers below one, shared; that layer and those above are to be filled anew."""
        shared = [kept.shared(copies) if i < layer else LayerCache() for i, kept in enumerate(self.layers)]
        mask = torch.zeros(len(self.mask) * copies, 0, dtype=self.mask.dtype, device=self.mask.device)
        return KeyValueCache(shared, mask, self.heads)

    def __getitem__(self, index: int) -> CacheEntry:
        # A tensor without data: ``HookedTransformer`` reads the number of columns from its shape.
        layer = self.layers[index]
        return CacheEntry(layer, torch.empty(len(self.mask), layer.columns, *self.heads, device="meta"))

    def append_attention_mask(self, new: Int[Tensor, "batch row"]) -> Int[Tensor, "batch column"]:
        """What ``HookedTransformer`` calls before its layers run."""
        self.mask = torch.cat((self.mask, new.to(self.mask.device)), dim=1)
        return self.mask


class Filled(Exception):
    """Raised where a pass that is run for its keys and values, or for its observers, has made the last of them."""


def stop_layer(blocks: Any, last: int | None, early: Sequence[str]) -> int | None:
    """The first layer from ``last`` on of which nobody sees more than what leads to its keys; ``None`` for none."""
    later = range(len(blocks) if last is None else last, len(blocks))
    return next((layer for layer in later if _may_stop_at_keys(blocks[layer], early)), None)


def _may_stop_at_keys(block: Any, early: Sequence[str]) -> bool:
    """Whether nobody looks at what a block does with its keys and values.

    Args:
        block: The block.
        early: Names of its modules that have run by then, and all that is inside them.
    """
    modules = [
        getattr(block.attn if name.startswith("attn.") else block, name.removeprefix("attn."), None) for name in early
    ]
    run = {inner for module in modules if module is not None for inner in module.modules()}
    return not any(is_hooked(module) for module in block.modules() if module not in run)


class CacheEntry(NamedTuple):
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

    def require(self, layer_input: Float[Tensor, "batch row *head d_model"], cache: LayerCache) -> None:
        """Refuse rows that are not of this pass.

        Raises:
            RuntimeError: If somebody, a hook perhaps, runs the model while it is in this pass.
        """
        shape, columns = (len(self.mask), self.n_rows), cache.columns + self.n_rows
        if layer_input.shape[:2] != shape or columns != self.mask.shape[1]:
            raise RuntimeError(
                f"a pass of {shape[1]} rows a prompt, {shape[0]} prompt(s), was interrupted by another run of the "
                "same model; a hook must not run the model it is on: run it before or after, or on a copy"
            )

    def block(self, start: int, end: int) -> Pass:
        """Some of the rows, with the columns up to the last of them."""
        return Pass(end - start, self.mask[:, : self.mask.shape[1] - self.n_rows + end])


@contextmanager
def replaced_forwards(layers: Sequence[Any], forwards: Sequence[Callable[..., Any]]) -> Generator[None]:
    """Let attention layers run other ``forward`` methods; their own are back in place when the block ends."""
    try:
        for layer, forward in zip(layers, forwards, strict=True):
            vars(layer)["forward"] = forward  # a bridge's own way of setting attributes hands them to what it wraps
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
    """What one layer reads, in the cheapest way that lets everybody see who looks at its scores or pattern.

    Args:
        points: Holds the layer's ``hook_attn_scores`` and ``hook_pattern``.
        rows: The pass.
        q: Rotated queries.
        segments: Rotated keys and values of all columns.
        window: How many keys, its own included, a row sees at most; ``None`` for all.
        scale: What query-key products are multiplied by.
    """
    watched = [point if is_hooked(point) else None for point in (points.hook_attn_scores, points.hook_pattern)]
    if not any(watched) and rows.left_padding is not None:
        return attend_causally(q, segments[0], rows.left_padding, window, scale)
    n_columns = rows.mask.shape[1]
    blocks = row_blocks(rows.n_rows, q.shape[0] * q.shape[2] * n_columns)
    plain = [point for point in watched if point is not None and not _row_wise(point)]
    shown = [partial(_in_dtype, point, q.dtype) if point in plain else point for point in watched]
    if len(blocks) == 1 or plain:
        return attend_explicitly(q, segments, rows.visible(window, q.device), scale, *shown)
    parts: list[Tensor] = []
    for start, end in blocks:
        own = rows.block(start, end)
        keys = trim(segments, own.mask.shape[1])
        parts.append(attend_explicitly(q[:, start:end], keys, own.visible(window, q.device), scale, *watched))
    return torch.cat(parts, dim=1)


def under_hook(point: Any, segments: tuple[Segment, ...]) -> Segment:
    """All columns as one segment, whose keys a hook has seen and may have changed for this pass."""
    whole = [
        torch.cat(
            [repeat(x, "prompt kv key d -> (prompt copy) key kv d", copy=part.copies) for x, part in parts], dim=1
        )
        for parts in ([(part.keys, part) for part in segments], [(part.values, part) for part in segments])
    ]
    keys, values = (rearrange(x, "batch key kv d -> batch kv key d") for x in (point(whole[0]), whole[1]))
    return Segment(keys, values)


def is_hooked(module: Any) -> bool:
    """Whether anybody looks at a hook point or another module; what the libraries wire up for themselves is nobody."""
    own = ("transformers.", "transformer_lens.") if not hasattr(module, "fwd_hooks") else ()
    stores = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(not str(getattr(hook, "__module__", "")).startswith(own) for store in stores for hook in store.values())


def _in_dtype(point: Any, dtype: torch.dtype, exact: Tensor) -> Tensor:
    """Show scores or a pattern to hooks in the model's dtype, as TransformerLens does.

    What they leave as it is keeps its single precision, so that looking changes no rounding.
    """
    shown = exact.to(dtype)
    version = shown._version
    given = point(shown)
    return exact if given is shown and shown._version == version else given


def _row_wise(point: Any) -> bool:
    """Whether everybody who looks at the point can do with some rows at a time."""
    marked = [handle for handle in point.fwd_hooks if is_row_wise(getattr(handle, "user_hook", None))]
    return not point.bwd_hooks and len(marked) == len(point._forward_hooks) and not point._forward_pre_hooks
