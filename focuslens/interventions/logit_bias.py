"""Constant added to the attention logits of a span's keys."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from focuslens.heads import Head
from focuslens.hooks import Cursor, Hook, HookTarget, PromptLike
from focuslens.interventions.base import (
    Placed,
    Positions,
    check_positions,
    checked_span,
    heads_described,
    heads_mask,
    optional_heads,
    require_prompt,
)
from focuslens.interventions.rescaling import Rescaling, SpanColumns, pattern_hooks
from focuslens.prompts.batch import PromptBatch, SpanLike
from focuslens.util.checks import checked_number

__all__ = ["LogitBias", "bias_factors", "bias_hooks"]


@dataclass(frozen=True)
class LogitBias:
    """Constant that is added to the attention logits of a span's keys, before the softmax.

    The weights of the span's keys are thus multiplied by ``exp(bias)``, and the row is divided by its new sum. The hook
    point is ``hook_pattern``. A row that sees keys only inside or only outside the span does not change.

    InstABoost (Guardieiro et al., 2025) multiplies the weights of the span by M and normalises the row. That is
    ``LogitBias(None, math.log(M), span, positions="all")``. DySCO (2026) adds ``math.log(2)`` to logits of tokens that
    it chooses anew for each token of the response.

    Args:
        heads: ``(layer, head)`` pairs; ``None`` for all heads.
        bias: The constant. A positive one raises the attention on the span, 0 changes nothing.
        span: A span's name, such as ``relevant``, or a half-open range of token positions.
        positions: Rows to change: the rows that produce the ``response``, or ``all`` rows.
    """

    heads: tuple[Head, ...] | None
    bias: float
    span: SpanLike = "relevant"
    positions: Positions = "response"

    def __init__(
        self,
        heads: Iterable[tuple[int, int]] | None,
        bias: float,
        span: SpanLike = "relevant",
        positions: Positions = "response",
    ) -> None:
        bias = checked_number(bias, "bias")
        if not math.isfinite(bias):
            raise ValueError(f"bias is {bias}; it must be a finite number (0 changes nothing, more raises attention)")
        check_positions(positions)
        object.__setattr__(self, "heads", optional_heads(heads))
        object.__setattr__(self, "bias", bias)
        object.__setattr__(self, "span", checked_span(span))
        object.__setattr__(self, "positions", positions)

    @property
    def changes_prompt(self) -> bool:
        """Whether rows before the last prompt token change."""
        return self.positions == "all"

    def describe(self) -> dict[str, Any]:
        """Kind and settings of the intervention as JSON values."""
        return {
            "kind": "logit_bias",
            "bias": self.bias,
            "span": self.span,
            "positions": self.positions,
            "heads": heads_described(self.heads),
        }

    def hooks(self, model: HookTarget, prompt: PromptLike | None = None, *, cursor: Cursor | None = None) -> list[Hook]:
        """TransformerLens hooks for one prompt, or for a batch padded on the left.

        Raises:
            ValueError: As for :meth:`SplitSoftmax.hooks`.
            KeyError: If ``span`` is a name and the prompt has no span with this name.
        """
        batch = require_prompt(model, prompt, "a logit bias")
        columns = SpanColumns(batch.columns(self.span, batch.width))
        return bias_hooks(model, batch, columns, self.heads, self.bias, self.positions, cursor)


def bias_hooks(
    model: HookTarget,
    batch: PromptBatch,
    columns: SpanColumns,
    heads: tuple[Head, ...] | None,
    bias: float,
    positions: Positions,
    cursor: Cursor | None,
) -> list[Hook]:
    """Hooks that add a constant to the attention logits of columns, one per layer.

    Raises:
        ValueError: If a head does not exist or occurs twice, or if the model ignores changes of its attention patterns.
    """
    mask = heads_mask(model, heads)
    edits = {
        layer: Rescaling(columns, _Bias(bias * of_layer), wide=bias < -_WIDE)
        for layer, of_layer in enumerate(mask)
        if bool(of_layer.any())
    }
    hooks = pattern_hooks(model, batch, edits, positions, cursor)
    model.require_acting(name for name, _ in hooks)
    return hooks


_WIDE = 80.0
"""Largest decrease of logits for which the factor outside the span fits single precision (``exp(88)``)."""


class _Bias:
    """Factors of a constant on the logits of the span, with a constant for each head."""

    may_overflow = False

    def __init__(self, bias: Float[Tensor, "head"]) -> None:
        self._bias = Placed(bias[:, None, None])

    def __call__(
        self, on_span: Float[Tensor, "batch head row 1"], elsewhere: Float[Tensor, "batch head row 1"]
    ) -> tuple[Float[Tensor, "batch head row 1"], Float[Tensor, "batch head row 1"]]:
        return bias_factors(on_span, elsewhere, self._bias.on(on_span.device, on_span.dtype))


def bias_factors(
    on_span: Float[Tensor, "batch head row 1"],
    elsewhere: Float[Tensor, "batch head row 1"],
    bias: Float[Tensor, "*#rows 1"],
) -> tuple[Float[Tensor, "batch head row 1"], Float[Tensor, "batch head row 1"]]:
    """Factors inside and outside a span whose logits rise by ``bias``. The sums of the rows do not change.

    Both factors are exactly 1 where the bias is 0, or where a row has all or no attention on the span.
    """
    # The larger of the two exponentials is 1, so that nothing overflows.
    largest = bias.clamp(min=0)
    inside, outside = torch.exp(bias - largest), torch.exp(-largest)
    changed = (on_span > 0) & (elsewhere > 0)
    total = torch.where(changed, on_span * inside + elsewhere * outside, 1.0)
    scale = (on_span + elsewhere) / total
    return torch.where(changed, inside * scale, 1.0), torch.where(changed, outside * scale, 1.0)
