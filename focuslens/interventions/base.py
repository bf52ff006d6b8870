"""Helpers for all interventions: checks of prompts and rows, and edits on copies of tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from typing import Any, Literal, TypeAlias, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from focuslens.heads import Head, as_heads, check_heads
from focuslens.hooks import Cursor, HookTarget, PromptLike
from focuslens.prompts.batch import PromptBatch, SpanLike
from focuslens.util.checks import checked_integer

__all__ = [
    "Placed",
    "Positions",
    "check_positions",
    "checked_span",
    "exactly",
    "first_query_row",
    "first_row",
    "heads_described",
    "heads_mask",
    "optional_heads",
    "require_prompt",
    "rows_of",
]

Positions: TypeAlias = Literal["all", "response"]
"""Rows to change: all rows, or the rows that produce the response (the last prompt token and all later tokens)."""


def check_positions(positions: str) -> None:
    """Raise ``ValueError`` unless ``positions`` is ``all`` or ``response``."""
    if positions not in get_args(Positions):
        raise ValueError(f"positions is {positions!r}; it must be one of {', '.join(get_args(Positions))}")


def checked_span(span: Any) -> SpanLike:
    """A span's name, or its token range as Python's integers.

    The end of the range is checked later, because the prompt's length is not known yet.

    Raises:
        ValueError: If the span is neither a name nor one range with 0 <= start < end.
    """
    if isinstance(span, str):
        return span
    try:
        start, end = (checked_integer(position, "span") for position in span)
    except (TypeError, ValueError):
        start, end = 0, 0
    # The elements of a range are the positions themselves, and not their first and last.
    if isinstance(span, range | bytes | Mapping | Set) or not 0 <= start < end:
        raise ValueError(f"span is {span!r}; it must be a name or one range of token positions with 0 <= start < end")
    return start, end


def require_prompt(model: HookTarget, prompt: PromptLike | None, purpose: str) -> PromptBatch:
    """The prompt as a :class:`PromptBatch`.

    Raises:
        ValueError: If ``prompt`` is ``None``.
    """
    if prompt is None:
        raise ValueError(f"{purpose} needs the prompt: intervention.hooks(model, prompt)")
    return model.batch(prompt)


def first_row(
    model: HookTarget,
    layer: int,
    batch: PromptBatch,
    positions: Positions,
    cursor: Cursor | None,
    tensor: Float[Tensor, "batch head row key"],
) -> int:
    """Index of the first row to change, for a hook whose tensor has a key axis.

    Raises:
        ValueError: If the pass does not run the prompts of ``batch``, or if the key columns are not absolute positions.
    """
    n_rows, n_keys = tensor.shape[-2:]
    if not _known(cursor):
        _require_all_keys(model, layer, n_rows, n_keys)
        _require_growing_cache(tensor)
        if n_keys < batch.width:
            raise ValueError(
                f"these hooks are for a prompt of {batch.width} tokens, and the pass has {n_keys} keys; run the model "
                "on the prompt's own tokens, model.to_tokens(prompt), in one pass (not in chunks)"
            )
    _require_same_batch(batch, tensor)
    _require_running(model, batch, cursor, n_keys - n_rows, n_rows)
    return 0 if positions == "all" else batch.first_response_row(n_keys - n_rows)


def first_query_row(
    model: HookTarget,
    batch: PromptBatch | None,
    positions: Positions,
    cursor: Cursor | None,
    tensor: Float[Tensor, "batch row ..."],
) -> int:
    """Index of the first row to change, for a hook whose tensor does not have a key axis.

    Raises:
        ValueError: If the pass does not run the prompts of ``batch``, or if the positions of the rows are unknown.
    """
    if positions == "all" or batch is None:
        return 0
    n_rows = tensor.shape[1]
    if not _known(cursor) and 1 < n_rows < batch.width:
        raise ValueError(
            f"these hooks are for a prompt of {batch.width} tokens, and a pass of {n_rows} rows could be a part of it "
            "or follow it; run the prompt's own tokens, model.to_tokens(prompt), in one pass and later tokens one at a "
            "time, or give the first column of the pass: hooks(model, prompt, cursor=Cursor(column))"
        )
    _require_same_batch(batch, tensor)
    # Without a cursor, a single row can be any later token.
    _require_running(model, batch, cursor, 0 if n_rows > 1 else batch.width, n_rows)
    return (cursor or Cursor()).first_response_row(batch, n_rows)


def _known(cursor: Cursor | None) -> bool:
    return cursor is not None and cursor.start is not None


def _require_running(model: HookTarget, batch: PromptBatch, cursor: Cursor | None, start: int, n_rows: int) -> None:
    if cursor is None or cursor.start is None:
        model.require_running(batch, start, n_rows)
    else:  # The tensor can be a block of rows, which does not begin where the pass begins.
        model.require_running(batch, cursor.start, None)


def _require_same_batch(batch: PromptBatch, tensor: Tensor) -> None:
    if len(tensor) != len(batch):
        raise ValueError(
            f"these hooks are for {len(batch)} prompt(s), and the pass has {len(tensor)}; give all prompts of the "
            "batch, intervention.hooks(model, prompts), padded on the left, or [prompt] * n for copies of one"
        )


def _require_all_keys(model: HookTarget, layer: int, n_rows: int, n_keys: int) -> None:
    """Raise ``ValueError`` if the pass may use a cache that keeps only the keys of a sliding window.

    The key columns of such a cache are not absolute positions. An edit of a span could change the wrong tokens, or no
    tokens at all.
    """
    window = model.cache_window(layer)
    if window is not None and n_rows < n_keys == window - 1 + n_rows:
        raise ValueError(
            f"layer {layer} has a sliding window of {window} keys and its cache may hold only these, so parts of the "
            "prompt cannot be found; use model.generate, or generate without a cache"
        )


def _require_growing_cache(tensor: Float[Tensor, "batch head row key"]) -> None:
    """Raise ``ValueError`` if the last keys of the pass are room for later tokens, as in a static cache.

    The number of keys then does not tell where the rows are. In a cache that grows, the last row sees the last key.
    """
    if tensor.shape[-1] > tensor.shape[-2]:
        newest = tensor[..., -1, -1]
        if bool((newest == 0).all()) or bool((newest < torch.finfo(tensor.dtype).min / 2).all()):
            raise ValueError(
                "the last key of this pass is masked, as in a static cache, whose columns do not tell the positions of "
                "the rows; use a cache that grows (cache_implementation='dynamic'), or model.generate"
            )


def exactly(x: Tensor) -> Tensor:
    """The tensor in double precision. On Apple GPUs, which lack double precision, the tensor is returned unchanged."""
    return x if x.device.type == "mps" else x.double()


def optional_heads(heads: Iterable[tuple[int, int]] | None) -> tuple[Head, ...] | None:
    """The heads of an argument; ``None`` for all heads."""
    return None if heads is None else as_heads(heads)


def heads_described(heads: tuple[Head, ...] | None) -> list[list[int]] | None:
    """Heads as JSON values."""
    return None if heads is None else [list(head) for head in heads]


def heads_mask(model: HookTarget, heads: tuple[Head, ...] | None) -> Float[Tensor, "layer head"]:
    """1 for the heads, and 0 for all others, in double precision.

    Raises:
        ValueError: If a head does not exist or occurs twice.
    """
    n_layers, n_heads = model.shape.n_layers, model.shape.n_heads
    if heads is None:
        return torch.ones(n_layers, n_heads, dtype=torch.float64)
    mask = torch.zeros(n_layers, n_heads, dtype=torch.float64)
    for layer, head in check_heads(heads, n_layers, n_heads):
        mask[layer, head] = 1
    return mask


class Placed:
    """Tensor that is copied once to the device and dtype of the activations that it is used with."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    def on(self, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
        """The tensor on a device, by default with its own dtype."""
        dtype = self._tensor.dtype if dtype is None else dtype
        if self._tensor.device != device or self._tensor.dtype != dtype:
            self._tensor = self._tensor.to(device=device, dtype=dtype)
        return self._tensor


def rows_of(tensor: Tensor, heads: Int[Tensor, "n"], edited: Tensor) -> Tensor:
    """Copy of ``tensor [batch head row key]`` in which ``edited`` replaces the rows of ``heads``.

    ``tensor`` itself must not change, because an activation cache may already contain it.
    """
    result = tensor.clone()
    result[:, heads] = edited.to(tensor.dtype)
    return result
