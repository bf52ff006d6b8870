"""Attention weights that are multiplied by a factor per column, for methods that steer attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from focuslens.heads import Head, check_heads, heads_by_layer
from focuslens.hooks import Cursor, Hook, HookTarget, PromptLike
from focuslens.interventions.base import exactly, require_prompt, rows_of
from focuslens.interventions.rescaling import pattern_hooks

__all__ = ["ScaledAttention"]


@dataclass(frozen=True, eq=False)
class ScaledAttention:
    """Attention weights times a factor per column, divided by their new sum.

    A factor ``f`` is the same as the addition of ``log(f)`` to the attention logits of a column. All rows change, and
    rows that see only columns of one factor stay as they are.

    Args:
        heads: The heads.
        factors: Positive factor of each column of the padded batch. Later columns have the factor 1.
    """

    heads: tuple[Head, ...]
    factors: Float[Tensor, "batch column"]

    @property
    def changes_prompt(self) -> bool:
        """Always ``True``, because all rows change."""
        return True

    def describe(self) -> dict[str, Any]:
        """Kind and heads of the intervention as JSON values."""
        return {"kind": "scaled_attention", "heads": [list(head) for head in self.heads]}

    def hooks(self, model: HookTarget, prompt: PromptLike | None = None, *, cursor: Cursor | None = None) -> list[Hook]:
        """TransformerLens hooks for the batch that the factors belong to."""
        batch = require_prompt(model, prompt, "scaled attention")

        by_layer = heads_by_layer(check_heads(self.heads, model.shape.n_layers, model.shape.n_heads))
        edits = {layer: _Scaling(self.factors, torch.as_tensor(heads)) for layer, heads in by_layer.items()}
        hooks = pattern_hooks(model, batch, edits, "all", cursor)
        model.require_acting(name for name, _ in hooks)
        return hooks


class _Scaling:
    """Edit of the rows of some heads of a layer."""

    empty = False

    def __init__(
        self, factors: Float[Tensor, "batch column"], heads: Int[Tensor, "chosen"], *, sinks: bool = False
    ) -> None:
        self._factors, self._heads, self._sinks = factors, heads, sinks

    def with_sinks(self) -> _Scaling:
        """The edit for rows of heads with a sink, which keeps the factor 1."""
        return _Scaling(self._factors, self._heads, sinks=True)

    def __call__(self, rows: Float[Tensor, "batch head row key"]) -> Float[Tensor, "batch head row key"]:
        n_keys, chosen = rows.shape[-1], self._heads.to(rows.device)
        weights = exactly(rows[:, chosen])
        factors = self._factors[:, :n_keys].to(weights)
        factors = torch.nn.functional.pad(factors, (0, n_keys - factors.shape[1]), value=1.0)
        scaled = weights * rearrange(factors, "batch key -> batch 1 1 key")
        sums = scaled.sum(dim=-1, keepdim=True)
        if self._sinks:
            sums = sums + (1 - weights.sum(dim=-1, keepdim=True)).clamp(min=0)
        # Rows of padding can be zero.
        return rows_of(rows, chosen, scaled / torch.where(sums > 0, sums, 1.0))
