"""What the interventions share: the prompt they are for, the rows they act on, and safe edits of some heads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from focuslens.batch import PromptBatch, SpanLike
from focuslens.hooks import Cursor, PromptLike

if TYPE_CHECKING:
    from focuslens.model import FocusModel

__all__ = [
    "Positions",
    "check_positions",
    "check_span",
    "first_query_row",
    "first_row",
    "require_all_keys",
    "require_prompt",
    "rows_of",
]

Positions: TypeAlias = Literal["all", "response"]
"""Rows an intervention acts on: every row, or the rows that produce the response (from the last prompt token on)."""


def check_positions(positions: str) -> None:
    """Refuse anything but the two names."""
    if positions not in get_args(Positions):
        raise ValueError(f"positions is {positions!r}; it must be one of {', '.join(get_args(Positions))}")


def check_span(span: SpanLike) -> None:
    """Refuse an empty or reversed token range; whether it lies in the prompt is known only with the prompt."""
    if not isinstance(span, str) and not 0 <= span[0] < span[1]:
        raise ValueError(f"span is {span}; it must be a name or a range of token positions with 0 <= start < end")


def require_prompt(model: FocusModel, prompt: PromptLike | None, why: str) -> PromptBatch:
    """The prompt as a batch; an error where there is none."""
    if prompt is None:
        raise ValueError(f"{why} needs the prompt: intervention.hooks(model, prompt)")
    return model.batch(prompt)


def first_row(batch: PromptBatch | None, positions: Positions, n_keys: int, n_rows: int) -> int:
    """Index of the first row to act on, at a hook whose tensor has a key axis."""
    if positions == "all" or batch is None:
        return 0
    return batch.first_response_row(n_keys - n_rows)


def first_query_row(batch: PromptBatch | None, positions: Positions, cursor: Cursor | None, n_rows: int) -> int:
    """Index of the first row to act on, at a hook whose tensor has no key axis."""
    if positions == "all" or batch is None:
        return 0
    return (cursor or Cursor()).first_response_row(batch, n_rows)


def require_all_keys(model: FocusModel, layer: int, cursor: Cursor | None, n_rows: int, n_keys: int) -> None:
    """Refuse a user's own cached pass through a cache that keeps only the keys of a sliding window.

    Columns are then no longer absolute, and an edit of a part of the prompt would act elsewhere or not at all.
    """
    window = model.backend.window(layer)
    forgets = "Bridge" in type(model.hooked).__name__ and (cursor is None or cursor.start is None)
    if forgets and window is not None and n_rows < n_keys == window - 1 + n_rows:
        raise ValueError(
            f"layer {layer} has a sliding window of {window} keys and its cache may hold no others, so parts of the "
            "prompt cannot be found; use model.generate, or generate without a cache"
        )


def rows_of(tensor: Tensor, heads: Sequence[int], first: int, edited: Tensor) -> Tensor:
    """A copy of ``tensor [batch head row key]`` whose chosen heads and rows from ``first`` on are ``edited``.

    A copy, because the tensor may already be in somebody's activation cache.
    """
    result = tensor.clone()
    result[:, torch.as_tensor(heads, device=tensor.device), first:] = edited.to(tensor.dtype)
    return result
