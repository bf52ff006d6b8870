"""Collector of attention patterns between selected tokens, from the rows of any number of passes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from focuslens.heads import heads_by_layer
from focuslens.hooks import Hook, RowHook, hook_name, row_wise

__all__ = ["PatternRows"]


class PatternRows:
    """Collector of the attention pattern of heads, restricted to selected tokens. Hooks on ``hook_pattern`` read it.

    Passes can run any rows of one prompt and response, in any order. The last key and the last row of a pass, or of a
    block of its rows, must belong to the same token. Rows that no pass runs are 0.

    Args:
        heads: Heads to read.
        positions: Token positions: the rows and the columns of each pattern.
    """

    def __init__(self, heads: Sequence[tuple[int, int]], positions: Sequence[int]) -> None:
        self._heads = [(layer, head) for layer, head in heads]
        self._positions = torch.as_tensor(positions, dtype=torch.long)
        n = len(self._positions)
        self._patterns = {head: torch.zeros(n, n) for head in self._heads}

    def hooks(self) -> list[Hook]:
        """Hooks for passes over the rows."""
        layers = heads_by_layer(self._heads)
        return [(hook_name(layer, "hook_pattern"), self._observer(layer, indices)) for layer, indices in layers.items()]

    def _observer(self, layer: int, indices: Sequence[int]) -> RowHook:
        def read(pattern: Float[Tensor, "batch head row key"]) -> None:
            n_rows, n_keys = pattern.shape[-2:]
            first = n_keys - n_rows
            rows = ((self._positions >= first) & (self._positions < n_keys)).nonzero()[:, 0]
            columns = (self._positions < n_keys).nonzero()[:, 0]  # later keys are masked in every row of this block
            for head in indices:
                part = pattern[0, head][self._positions[rows] - first][:, self._positions[columns]]
                self._patterns[layer, head][rows[:, None], columns] = part.float().cpu()

        @row_wise
        def observe(pattern: Float[Tensor, "batch head row key"], hook: Any) -> None:
            read(pattern)

        return RowHook(observe, read, reads=True)

    def pattern(self) -> Float[Tensor, "head position position"]:
        """The patterns, with the heads in their given order."""
        return torch.stack([self._patterns[head] for head in self._heads])
