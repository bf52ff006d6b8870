"""PASTA: decrease of the attention to all of a prompt but a span (Zhang et al., 2023)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from focuslens.heads import Head
from focuslens.hooks import Cursor, Hook, HookTarget, PromptLike
from focuslens.interventions.base import (
    Positions,
    check_positions,
    checked_span,
    heads_described,
    optional_heads,
    require_prompt,
)
from focuslens.interventions.logit_bias import bias_hooks
from focuslens.interventions.rescaling import SpanColumns
from focuslens.prompts.batch import SpanLike
from focuslens.util.checks import checked_number

__all__ = ["Pasta"]


@dataclass(frozen=True)
class Pasta:
    """PASTA: attention to the prompt's tokens outside a span is scaled by ``alpha`` (Zhang et al., 2023).

    ``log(alpha)`` is added to the attention logits of all prompt keys outside the span, before the softmax. Keys of the
    span and of the response keep their logits. A row that sees only keys of one of the two kinds does not change. If
    the span is empty, no row changes. The hook point is ``hook_pattern``.

    The span is a set of tokens, as in the paper: a token of any of its ranges is inside. The authors' code differs for
    spans of several ranges: it adds the constant once per range that does not contain the key, so that a key outside
    all of ``n`` ranges is scaled by ``alpha ** n``, and a key inside one of them by ``alpha ** (n - 1)``.

    Args:
        heads: ``(layer, head)`` pairs; ``None`` for all heads. The authors choose heads by their effect on a task;
            :func:`focuslens.load_ranking` reads their files.
        alpha: Factor of the attention outside the span, more than 0. 1 changes nothing.
        span: A span's name, such as ``relevant``, or a half-open range of token positions.
        positions: Rows to change: ``all`` rows, as the authors do, or the rows that produce the ``response``.
    """

    heads: tuple[Head, ...] | None
    alpha: float = 0.01
    span: SpanLike = "relevant"
    positions: Positions = "all"

    def __init__(
        self,
        heads: Iterable[tuple[int, int]] | None,
        alpha: float = 0.01,
        span: SpanLike = "relevant",
        positions: Positions = "all",
    ) -> None:
        alpha = checked_number(alpha, "alpha")
        if not (math.isfinite(alpha) and alpha > 0):
            raise ValueError(
                f"alpha is {alpha}; it must be a finite number above 0 (1 changes nothing, less raises the attention "
                "to the span)"
            )
        check_positions(positions)
        object.__setattr__(self, "heads", optional_heads(heads))
        object.__setattr__(self, "alpha", alpha)
        object.__setattr__(self, "span", checked_span(span))
        object.__setattr__(self, "positions", positions)

    @property
    def changes_prompt(self) -> bool:
        """Whether rows before the last prompt token change."""
        return self.positions == "all"

    def describe(self) -> dict[str, Any]:
        """Kind and settings of the intervention as JSON values."""
        return {
            "kind": "pasta",
            "alpha": self.alpha,
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
        batch = require_prompt(model, prompt, "PASTA")
        inside = batch.columns(self.span, batch.width)
        scaled = batch.mask().bool() & ~inside & inside.any(dim=1, keepdim=True)
        return bias_hooks(model, batch, SpanColumns(scaled), self.heads, math.log(self.alpha), self.positions, cursor)
