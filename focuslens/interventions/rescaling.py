"""Edits of attention rows: one factor for the columns of a span and another for all other columns, per row and head."""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from focuslens.hooks import Cursor, Hook, HookTarget, RowHook, hook_name, row_wise
from focuslens.interventions.base import Positions, exactly, first_row
from focuslens.prompts.batch import PromptBatch

__all__ = ["ChosenHeads", "Rescaling", "RowEdit", "RowFactors", "SpanColumns", "pattern_hooks"]


@runtime_checkable
class RowEdit(Protocol):
    """Edit of attention rows."""

    @property
    def empty(self) -> bool:
        """Whether the edit changes no row at all."""
        ...

    def __call__(self, rows: Float[Tensor, "batch head row key"]) -> Float[Tensor, "batch head row key"]:
        """Edit rows, in place or in a copy."""
        ...

    def with_sinks(self) -> RowEdit:
        """The edit for rows of heads with a sink: the mass that a row lacks to one lies outside of every span."""
        ...


@runtime_checkable
class RowFactors(Protocol):
    """Factors inside and outside a span, from the attention masses of each row there."""

    @property
    def may_overflow(self) -> bool:
        """Whether factors outside the span can be larger than the largest number of the pattern's type."""
        ...

    def __call__(
        self, on_span: Float[Tensor, "batch head row 1"], elsewhere: Float[Tensor, "batch head row 1"]
    ) -> tuple[Float[Tensor, "batch head row 1"], Float[Tensor, "batch head row 1"]]:
        """The factors, in double precision like the masses."""
        ...


def pattern_hooks(
    model: HookTarget,
    batch: PromptBatch,
    edits: Mapping[int, RowEdit],
    positions: Positions,
    cursor: Cursor | None,
) -> list[Hook]:
    """Hooks on ``hook_pattern``, one per layer, that edit each row for itself.

    Args:
        model: The model.
        batch: The prompts.
        edits: Edit of each layer.
        positions: Rows to edit.
        cursor: Cursor of the pass.
    """

    def hook_of(layer: int, edit: RowEdit) -> RowHook:
        @row_wise
        def change(pattern: Float[Tensor, "batch head row key"], hook: Any) -> Tensor | None:
            first = first_row(model, layer, batch, positions, cursor, pattern)
            if first >= pattern.shape[-2] or edit.empty:
                return None
            edited = edit(pattern[:, :, first:].clone())
            return edited if first == 0 else torch.cat((pattern[:, :, :first], edited), dim=2)

        return RowHook(change, edit, every_row=positions == "all")

    return [
        (hook_name(layer, "hook_pattern"), hook_of(layer, edit.with_sinks() if layer in model.sink_layers else edit))
        for layer, edit in edits.items()
    ]


class SpanColumns:
    """Columns of a span in every prompt of a batch, as tensors on the device of the patterns.

    Args:
        inside: Mask that is true for the columns of the span.

    Attributes:
        index: Columns ``[batch n]`` of each prompt's span. Shorter spans repeat their first column.
        counted: 1 for the columns of the span, 0 for repeated ones.
    """

    def __init__(self, inside: Bool[Tensor, "batch column"]) -> None:
        self._inside = inside
        self._end = int(inside.any(dim=0).nonzero().max()) + 1 if bool(inside.any()) else 0
        columns = [row.nonzero()[:, 0] for row in inside]
        n = max(len(row) for row in columns)
        filled = [torch.cat((row, row.new_full((n - len(row),), int(row[0]) if len(row) else 0))) for row in columns]
        self.index = torch.stack(filled)
        self.counted = torch.arange(n) < torch.tensor([[len(row)] for row in columns])
        first = self.index[0]
        # Copies of one prompt with one range: a slice is cheaper than an index.
        one_range = n > 0 and bool(self.counted.all()) and torch.equal(first, torch.arange(n) + first[0])
        is_same = one_range and torch.equal(self.index, first.expand_as(self.index))
        self._part = slice(int(first[0]), int(first[0]) + n) if is_same else None
        self._chosen_from: tuple[SpanColumns, Tensor] | None = None

    @property
    def empty(self) -> bool:
        """Whether the span is empty in every prompt."""
        return not self.index.shape[1]

    def within(self, n_keys: int) -> SpanColumns:
        """The columns among the first ``n_keys``, for rows that do not have all keys of the prompt."""
        if n_keys >= self._end:
            return self
        if self._chosen_from is None:
            return SpanColumns(self._inside[:, :n_keys])
        columns, prompts = self._chosen_from
        return columns.within(n_keys).of_prompts(prompts)

    def of_prompts(self, prompts: Int[Tensor, "row"]) -> SpanColumns:
        """The columns of one prompt per row, for rows of any prompts in any order."""
        chosen = copy(self)
        chosen.index, chosen.counted = self.index[prompts], self.counted[prompts]
        chosen._chosen_from = self, prompts
        return chosen

    def taken(self, rows: Float[Tensor, "batch head row key"]) -> Float[Tensor, "batch head row n"]:
        """Attention to the columns of the span, in double precision, which is set to zero in ``rows``.

        Repeated columns occur again.
        """
        if self._part is not None:
            part = rows[..., self._part]
            weights = exactly(part)
            weights = weights.clone() if weights is part else weights
            part.zero_()
            return weights
        # The gradient of ``gather`` needs the rows as they are now.
        unchanged = rows.clone() if rows.requires_grad else rows
        weights = exactly(unchanged.gather(-1, self._expanded(rows)))
        rows.scatter_(-1, self._expanded(rows), 0)
        return weights

    def mass(self, weights: Float[Tensor, "batch head row n"]) -> Float[Tensor, "batch head row 1"]:
        """Sum of weights. Repeated columns do not count."""
        if self._part is None:
            if self.counted.device != weights.device:  # once: such a copy cannot be in a recorded pass
                self.counted = self.counted.to(weights.device)
            weights = weights * self.counted[:, None, None]
        return weights.sum(dim=-1, keepdim=True)

    def put(self, rows: Float[Tensor, "batch head row key"], weights: Float[Tensor, "batch head row n"]) -> None:
        """Replace the attention to the columns of the span, in place."""
        if self._part is not None:
            rows[..., self._part].copy_(weights)
        else:
            rows.scatter_(-1, self._expanded(rows), weights.to(rows.dtype))

    def _expanded(self, rows: Tensor) -> Tensor:
        if self.index.device != rows.device:
            self.index = self.index.to(rows.device)
        return self.index[:, None, None].expand(*rows.shape[:3], -1)


class Rescaling:
    """Edit that multiplies the columns of a span by one factor per row and head, and all other columns by another.

    Args:
        columns: Columns of the span.
        factors: Function from the masses inside and outside the span to the factors.
        wide: Whether all columns are multiplied in double precision, not only those of the span.
        sinks: Whether the mass that a row lacks to one is that of a sink, which lies outside the span.
    """

    def __init__(self, columns: SpanColumns, factors: RowFactors, *, wide: bool = False, sinks: bool = False) -> None:
        self._columns, self._factors, self._wide, self._sinks = columns, factors, wide, sinks

    def with_sinks(self) -> Rescaling:
        """The edit for rows of heads with a sink."""
        return Rescaling(self._columns, self._factors, wide=self._wide, sinks=True)

    @property
    def empty(self) -> bool:
        """Whether the span is empty in every prompt."""
        return self._columns.empty

    def __call__(self, rows: Float[Tensor, "batch head row key"]) -> Float[Tensor, "batch head row key"]:
        """Edit rows, which are changed in place if they have single or double precision."""
        columns = self._columns.within(rows.shape[-1])
        if columns.empty:
            return rows
        exact = rows if rows.dtype in (torch.float32, torch.float64) else rows.float()
        exact = exactly(exact) if self._wide else exact
        # Weights on the span need double precision, because the factor for a tiny mass would overflow single precision.
        # The cost is low because the span is short.
        weights = columns.taken(exact)
        on_span = columns.mass(weights)
        elsewhere = exact.sum(dim=-1, keepdim=True).to(weights.dtype)
        if self._sinks:
            elsewhere = torch.maximum(elsewhere, 1 - on_span)
        inside, outside = self._factors(on_span, elsewhere)
        if self._factors.may_overflow:
            outside = outside.clamp(max=torch.finfo(exact.dtype).max)
        exact.mul_(outside.to(exact.dtype))
        columns.put(exact, weights * inside)
        return exact if exact.dtype == rows.dtype else exact.to(rows.dtype)


class ChosenHeads:
    """Edit of some heads of each prompt, which leaves the rows of all other heads as they are.

    Args:
        edit: Edit of rows ``[pair 1 row key]``, one for each chosen pair of a prompt and a head.
        pairs: The pairs as places ``prompt * n_heads + head``.
    """

    def __init__(self, edit: RowEdit, pairs: Int[Tensor, "pair"]) -> None:
        self._edit, self._pairs = edit, pairs

    def with_sinks(self) -> ChosenHeads:
        """The edit for rows of heads with a sink."""
        return ChosenHeads(self._edit.with_sinks(), self._pairs)

    @property
    def empty(self) -> bool:
        """Whether the edit changes no row at all."""
        return self._edit.empty

    def __call__(self, rows: Float[Tensor, "batch head row key"]) -> Float[Tensor, "batch head row key"]:
        """Edit rows in place if their numbers are contiguous."""
        if self._pairs.device != rows.device:  # once: such a copy cannot be in a recorded pass
            self._pairs = self._pairs.to(rows.device)
        by_pair = rows.flatten(0, 1)
        edited = self._edit(by_pair.index_select(0, self._pairs).unsqueeze(1))
        return by_pair.index_copy_(0, self._pairs, edited.squeeze(1)).view(rows.shape)
