"""Attention engine that replaces the attention of a TransformerLens model, and fires the same hook points.

A fused kernel computes the rows of a prompt. Rows after the prompt are computed over cached, rotated keys. ``hook_q``,
``hook_k``, ``hook_v``, ``hook_rot_q``, ``hook_rot_k`` and ``hook_z`` always fire. ``hook_attn_scores`` and
``hook_pattern`` fire only in layers where they have hooks.
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
from focuslens.hooks import RowHook, is_row_wise
from focuslens.model.attention import (
    PLAIN,
    LayerCache,
    Segment,
    Steps,
    attend_causally,
    attend_explicitly,
    row_blocks,
    trim,
    visible_keys,
)

__all__ = [
    "CacheEntry",
    "Filled",
    "Forgetting",
    "KeyValueCache",
    "Pass",
    "attend",
    "is_hooked",
    "replaced_forwards",
    "stop_layer",
    "under_hook",
    "without_dropout",
    "without_hooks",
]


@dataclass(frozen=True)
class Forgetting:
    """Keys that Hugging Face's ``generate`` drops from its cache, although the attention of the model has no window.

    ``generate`` makes the cache from the configuration. If the configuration has a sliding window that the architecture
    does not read, the rows of the prompt attend to all keys, and later rows only to the keys that are left.

    Attributes:
        n_prompt: Number of columns of the prompts.
        windows: Maximum number of keys per row after the prompt, by layer; ``None`` for no limit.
    """

    n_prompt: int
    windows: tuple[int | None, ...]

    def window(self, layer: int, window: int | None, start: int) -> int | None:
        """Window of a layer in a pass whose first row is in the column ``start``."""
        limits = [limit for limit in (window, self.windows[layer]) if limit is not None]
        return window if start < self.n_prompt else min(limits, default=None)


@dataclass
class KeyValueCache:
    """Key-value cache of the engine. ``HookedTransformer`` can use it in place of a ``TransformerLensKeyValueCache``.

    Args:
        layers: One cache per layer.
        mask: Attention mask of all columns: 1 for a token, 0 for padding.
        heads: Number of key-value heads per layer, and ``d_head``, the size of each head.
        forgetting: Keys that rows after the prompt do not see; ``None`` if they see all keys in their windows.
    """

    layers: list[LayerCache]
    mask: Int[Tensor, "batch column"]
    heads: tuple[int, int]
    forgetting: Forgetting | None = None

    @classmethod
    def empty(
        cls, shape: ModelShape, batch: int, device: torch.device, forgetting: Forgetting | None = None
    ) -> KeyValueCache:
        """An empty cache for ``batch`` rows."""
        mask, heads = torch.zeros(batch, 0, dtype=torch.long, device=device), (shape.n_key_value_heads, shape.d_head)
        return cls([LayerCache() for _ in range(shape.n_layers)], mask, heads, forgetting)

    def window(self, layer: int, window: int | None, rows: Pass) -> int | None:
        """Window of a layer in a pass over this cache."""
        start = rows.mask.shape[1] - rows.n_rows
        return window if self.forgetting is None else self.forgetting.window(layer, window, start)

    def shared(self, copies: int = 1) -> KeyValueCache:
        """A new cache in which every batch row occurs ``copies`` times in succession.

        The new cache shares the segments of this cache. Columns appended to one cache do not appear in the other cache.
        """
        mask = repeat(self.mask, "batch column -> (batch copy) column", copy=copies)
        return KeyValueCache([layer.shared(copies) for layer in self.layers], mask, self.heads, self.forgetting)

    def truncated(self, columns: int) -> KeyValueCache:
        """A new cache with the first ``columns`` columns of this cache, whose segments it shares."""
        layers = [LayerCache(trim(layer.segments, columns)) for layer in self.layers]
        return KeyValueCache(layers, self.mask[:, :columns], self.heads, self.forgetting)

    def below(self, layer: int, copies: int) -> KeyValueCache:
        """A new cache that shares this cache's layers below ``layer``, with ``copies`` consecutive rows per prompt.

        All other layers of the new cache are empty, and its mask has no columns.
        """
        layers = [cache.shared(copies) if i < layer else LayerCache() for i, cache in enumerate(self.layers)]
        mask = torch.zeros(len(self.mask) * copies, 0, dtype=self.mask.dtype, device=self.mask.device)
        return KeyValueCache(layers, mask, self.heads, self.forgetting)

    def __getitem__(self, index: int) -> CacheEntry:
        # ``HookedTransformer`` uses only the shape of this tensor, to find the number of columns. No data is needed.
        layer = self.layers[index]
        return CacheEntry(layer, torch.empty(len(self.mask), layer.columns, *self.heads, device="meta"))

    def append_attention_mask(self, new: Int[Tensor, "batch row"]) -> Int[Tensor, "batch column"]:
        """Append the mask of new columns and return the whole mask.

        ``HookedTransformer`` calls this method at the start of each pass.
        """
        self.mask = torch.cat((self.mask, new.to(self.mask.device)), dim=1)
        return self.mask


class Filled(Exception):
    """Signal to end a pass early because all required keys, values and observations have been computed."""


def stop_layer(blocks: Any, last: int | None, early: Sequence[str]) -> int | None:
    """First layer, starting at ``last``, in which a pass may end once the layer's keys and values are complete.

    Args:
        blocks: Blocks of the model.
        last: Last layer whose keys, values or activations the caller needs; ``None`` if the pass must not end early.
        early: Names of the modules of a block that have run by the time the block's keys and values are complete.

    Returns:
        Index of the layer; ``None`` if the pass must run to the end.
    """
    later = range(len(blocks) if last is None else last, len(blocks))
    return next((layer for layer in later if _may_stop_at_keys(blocks[layer], early)), None)


def _may_stop_at_keys(block: Any, early: Sequence[str]) -> bool:
    """Whether all hooks of a block are on the ``early`` modules or on their submodules."""
    modules = [
        getattr(block.attn if name.startswith("attn.") else block, name.removeprefix("attn."), None) for name in early
    ]
    before_keys = {inner for module in modules if module is not None for inner in module.modules()}
    return not any(is_hooked(module) for module in block.modules() if module not in before_keys)


class CacheEntry(NamedTuple):
    """Cache of one layer, with the attribute ``past_keys`` that ``HookedTransformer`` reads."""

    layer: LayerCache
    past_keys: Tensor


@dataclass(frozen=True, eq=False)
class Pass:
    """Rows and columns of one forward pass, and the attention masks that all layers share.

    Args:
        n_rows: Number of rows in the pass.
        mask: Attention mask of all columns, on the CPU: 1 for a token, 0 for padding.
    """

    n_rows: int
    mask: Int[Tensor, "batch column"]
    _visible: dict[tuple[int | None, int | None, torch.device], Tensor | None] = field(default_factory=dict[Any, Any])

    @cached_property
    def padded(self) -> bool:
        """Whether any column is padding."""
        return not bool(self.mask.all())

    @cached_property
    def left_padding(self) -> tuple[int, ...] | None:
        """Number of padding columns before each prompt.

        The result is ``None`` unless the pass runs whole prompts with padding only on the left.
        """
        n_columns = self.mask.shape[1]
        padding = n_columns - self.mask.sum(dim=1)
        left_padded = (torch.arange(n_columns) >= padding[:, None]).long()
        whole = self.n_rows == n_columns and torch.equal(left_padded, self.mask.long())
        return tuple(padding.tolist()) if whole else None

    def visible(
        self, window: int | None, device: torch.device, chunk: int | None = None
    ) -> Bool[Tensor, "#batch 1 row column"] | None:
        """Mask of the keys that each row attends to; ``None`` if every row attends to all keys."""
        n_columns = self.mask.shape[1]
        all_within = all(limit is None or limit >= n_columns for limit in (window, chunk))
        if self.n_rows == 1 and not self.padded and all_within:
            return None
        key = (window, chunk, device)
        if key not in self._visible:
            mask = self.mask.to(device) if self.padded else None
            self._visible[key] = visible_keys(self.n_rows, n_columns, mask, window, device, chunk)
        return self._visible[key]

    def require(self, layer_input: Float[Tensor, "batch row *head d_model"], cache: LayerCache) -> None:
        """Check that the input and the cache of a layer have the sizes of this pass.

        Raises:
            RuntimeError: If a size differs. A hook or another caller has then run the model during this pass.
        """
        shape, columns = (len(self.mask), self.n_rows), cache.columns + self.n_rows
        if layer_input.shape[:2] != shape or columns != self.mask.shape[1]:
            raise RuntimeError(
                f"a pass of {shape[1]} rows per prompt, {shape[0]} prompt(s), was interrupted by another run of the "
                "same model; a hook must not run the model it is on: run it before or after, or on a copy"
            )

    def block(self, start: int, end: int) -> Pass:
        """Pass with the rows ``start`` to ``end - 1`` of this pass, and the columns up to the last row's column."""
        return Pass(end - start, self.mask[:, : self.mask.shape[1] - self.n_rows + end])


@contextmanager
def replaced_forwards(layers: Sequence[Any], forwards: Sequence[Callable[..., Any]]) -> Generator[None]:
    """Replace the ``forward`` methods of attention layers for the duration of a ``with`` block."""
    try:
        for layer, forward in zip(layers, forwards, strict=True):
            vars(layer)["forward"] = forward  # ``setattr`` on a bridge would change the wrapped module
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
    steps: Steps = PLAIN,
) -> Float[Tensor, "batch row head d_head"]:
    """Attention outputs of one layer, by the cheapest method that the layer's hooks on scores and pattern allow.

    Args:
        points: Attention module of the layer, with the hook points ``hook_attn_scores`` and ``hook_pattern``.
        rows: Rows and columns of the current pass.
        q: Rotated queries.
        segments: Keys (rotated) and values of all columns.
        window: Maximum number of keys that a row attends to, including the row's own key; ``None`` for no limit.
        scale: Factor that multiplies the query-key products.
        steps: Further steps of the architecture.
    """
    hooked = [point if is_hooked(point) else None for point in (points.hook_attn_scores, points.hook_pattern)]
    if not any(hooked) and rows.left_padding is not None:
        return attend_causally(q, segments[0], rows.left_padding, window, scale, steps)
    n_columns = rows.mask.shape[1]
    blocks = row_blocks(rows.n_rows, q.shape[0] * q.shape[2] * n_columns)
    whole = [point for point in hooked if point is not None and not _every_hook(point, is_row_wise)]
    if len(blocks) == 1 or whole:
        # Lean layers give functions on rows the weights before rounding, too.
        rounded = [point for point in whole if not _every_hook(point, lambda hook: isinstance(hook, RowHook))]
        callbacks = [partial(_in_dtype, point, q.dtype) if point in rounded else point for point in hooked]
        visible = rows.visible(window, q.device, steps.chunk)
        return attend_explicitly(q, segments, visible, scale, *callbacks, steps=steps)
    parts: list[Tensor] = []
    for start, end in blocks:
        block = rows.block(start, end)
        block_segments = trim(segments, block.mask.shape[1])
        visible = block.visible(window, q.device, steps.chunk)
        parts.append(attend_explicitly(q[:, start:end], block_segments, visible, scale, *hooked, steps=steps))
    return torch.cat(parts, dim=1)


def under_hook(point: Any, segments: tuple[Segment, ...]) -> Segment:
    """One segment with all columns, in which the hooks on ``point`` have changed the keys."""
    keys = torch.cat([_per_row(segment.keys, segment.copies) for segment in segments], dim=1)
    values = torch.cat([_per_row(segment.values, segment.copies) for segment in segments], dim=1)
    keys, values = (rearrange(x, "batch key kv d -> batch kv key d") for x in (point(keys), values))
    return Segment(keys, values)


def _per_row(x: Float[Tensor, "prompt kv_head key d_head"], copies: int) -> Float[Tensor, "batch key kv_head d_head"]:
    """Keys or values of a segment, repeated ``copies`` times per prompt, in the layout of TransformerLens's hooks."""
    return repeat(x, "prompt kv key d -> (prompt copy) key kv d", copy=copies)


def is_hooked(module: Any) -> bool:
    """Whether a module has hooks, other than those that transformers and TransformerLens set outside hook points."""
    stores = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    hooks = [hook for store in stores for hook in store.values()]
    return bool(hooks) if hasattr(module, "fwd_hooks") else any(map(_is_of_others, hooks))


def _is_of_others(hook: Any) -> bool:
    return not str(getattr(hook, "__module__", "")).startswith(("transformers.", "transformer_lens."))


@contextmanager
def without_hooks(hooked: Any) -> Generator[None]:
    """Remove the hooks of a model for the duration of a ``with`` block, so that none of them sees test tokens.

    These are all hooks on hook points, and PyTorch's hooks on any module, except those that transformers and
    TransformerLens need.
    """
    original, points = getattr(hooked, "original_model", None) or hooked, list(hooked.hook_dict.values())
    modules = {id(module): module for module in (*hooked.modules(), *original.modules(), *points)}
    contents = [
        (store, dict(store)) for module in modules.values() if is_hooked(module) for store in _forward_stores(module)
    ]
    of_points = {id(store) for point in points for store in _forward_stores(point)}
    for store, entries in contents:
        for key, hook in entries.items():
            if id(store) in of_points or _is_of_others(hook):
                del store[key]
    try:
        yield
    finally:
        for store, entries in contents:
            store.clear()
            store.update(entries)


def _forward_stores(module: Any) -> tuple[Any, Any]:
    return module._forward_hooks, module._forward_pre_hooks


@contextmanager
def without_dropout(hooked: Any) -> Generator[None]:
    """Put a model that is being trained into evaluation mode for the duration of a ``with`` block."""
    # Some modules of a bridge's original model are none of the bridge's.
    roots = (hooked, getattr(hooked, "original_model", None) or hooked) if hooked.training else ()
    training = [module for root in roots for module in root.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _in_dtype(point: Any, dtype: torch.dtype, exact: Tensor) -> Tensor:
    """Run the hooks on scores or a pattern in the model's dtype, which is the dtype that TransformerLens uses.

    If the hooks do not change the tensor, the tensor before rounding is returned. Hooks that only observe therefore do
    not affect results.
    """
    rounded = exact.to(dtype)
    # Tensors of torch.inference_mode() do not count their edits.
    version = None if rounded.is_inference() else rounded._version
    result = point(rounded)
    if result is not rounded:
        return result
    is_same = torch.equal(rounded, exact.to(dtype)) if version is None else rounded._version == version
    return exact if is_same else rounded


def _every_hook(point: Any, condition: Callable[[Any], bool]) -> bool:
    """Whether every hook on a hook point fulfils a condition."""
    fulfilled = [handle for handle in point.fwd_hooks if condition(getattr(handle, "user_hook", None))]
    return not point.bwd_hooks and len(fulfilled) == len(point._forward_hooks) and not point._forward_pre_hooks
