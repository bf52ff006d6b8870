"""SpotLight: increase of the attention to a span up to a target proportion (Venkateswaran and Contractor, 2025)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from focuslens.heads import Head
from focuslens.hooks import Cursor, Hook, HookTarget, PromptLike, RowHook, hook_name
from focuslens.interventions.base import (
    Placed,
    Positions,
    check_positions,
    checked_span,
    first_row,
    heads_described,
    heads_mask,
    optional_heads,
    require_prompt,
)
from focuslens.interventions.logit_bias import bias_factors
from focuslens.interventions.rescaling import Rescaling, SpanColumns, pattern_hooks
from focuslens.prompts.batch import PromptBatch, SpanLike
from focuslens.util.checks import checked_number

__all__ = ["SpotLight"]


@dataclass(frozen=True)
class SpotLight:
    r"""SpotLight: attention to a span is raised towards a target proportion (Venkateswaran and Contractor, 2025).

    For each prompt and layer, the proportion :math:`\psi` is the attention on the span, summed over a group of rows of
    all heads, divided by the group's whole attention. If :math:`0 < \psi <` ``target``, :math:`\log(\text{target} /
    \psi)` is added to the span's attention logits in all rows and heads of the group. The proportion after the edit is
    near the target, but not equal to it, because each row is normalised again. The hook point is ``hook_pattern``.

    A row that produces the response is a group of its own, over all heads. This is the authors' procedure for the pass
    that decodes a token. All prompt tokens before the last one are one group (``positions="all"``), including tokens
    before the span. The result does not depend on the passes that compute the rows. It differs from the authors' code
    in these points:

    - The row of the last prompt token is a group of its own. In the code, it belongs to the group of the prompt,
      because one pass runs both.
    - Rows of padding belong to no group. In the code, a batch's padding lowers the proportion of the shorter prompts.
    - Weights are exact. The code adds 1e-10 to each weight before the logarithm, also to those of later tokens.
    - ``positions="response"`` changes no rows of the prompt; the code always does.
    - If ``heads`` is given, proportions are those of a layer's chosen heads, and only these heads change.

    With ``positions="all"``, the whole attention pattern of one layer is in memory while the prompt runs.

    Args:
        target: Target proportion, more than 0 and at most 1.
        span: A span's name, such as ``relevant``, or a half-open range of token positions.
        heads: ``(layer, head)`` pairs; ``None`` for all heads, as the authors do.
        positions: Rows to change: ``all`` rows, as the authors do, or the rows that produce the ``response``.
    """

    target: float
    span: SpanLike = "relevant"
    heads: tuple[Head, ...] | None = None
    positions: Positions = "all"

    def __init__(
        self,
        target: float,
        span: SpanLike = "relevant",
        heads: Iterable[tuple[int, int]] | None = None,
        positions: Positions = "all",
    ) -> None:
        target = checked_number(target, "target")
        if not 0 < target <= 1:
            raise ValueError(f"target is {target}; it must be a proportion of the attention, above 0 and at most 1")
        check_positions(positions)
        object.__setattr__(self, "target", target)
        object.__setattr__(self, "span", checked_span(span))
        object.__setattr__(self, "heads", optional_heads(heads))
        object.__setattr__(self, "positions", positions)

    @property
    def changes_prompt(self) -> bool:
        """Whether rows before the last prompt token change."""
        return self.positions == "all"

    def describe(self) -> dict[str, Any]:
        """Kind and settings of the intervention as JSON values."""
        return {
            "kind": "spotlight",
            "target": self.target,
            "span": self.span,
            "positions": self.positions,
            "heads": heads_described(self.heads),
        }

    def hooks(self, model: HookTarget, prompt: PromptLike | None = None, *, cursor: Cursor | None = None) -> list[Hook]:
        """TransformerLens hooks for one prompt, or for a batch padded on the left.

        Raises:
            ValueError: As for :meth:`SplitSoftmax.hooks`. With ``positions="all"``, the hooks also raise ``ValueError``
                if a pass runs a part of the prompt only.
            KeyError: If ``span`` is a name and the prompt has no span with this name.
        """
        batch = require_prompt(model, prompt, "SpotLight")
        columns = SpanColumns(batch.columns(self.span, batch.width))
        chosen = {layer: of_layer for layer, of_layer in enumerate(heads_mask(model, self.heads)) if of_layer.any()}
        by_row = {layer: Rescaling(columns, _Target(self.target, of_layer)) for layer, of_layer in chosen.items()}
        if self.positions == "response":
            hooks = pattern_hooks(model, batch, by_row, "response", cursor)
        else:
            tokens = batch.mask().bool()[:, :-1]
            together = {i: Rescaling(columns, _Target(self.target, mask, tokens)) for i, mask in chosen.items()}
            for edits in (together, by_row):
                edits.update({layer: edits[layer].with_sinks() for layer in edits if layer in model.sink_layers})
            hooks = [
                (hook_name(layer, "hook_pattern"), _whole(model, layer, batch, together[layer], by_row[layer], cursor))
                for layer in chosen
            ]
        model.require_acting(name for name, _ in hooks)
        return hooks


def _whole(
    model: HookTarget, layer: int, batch: PromptBatch, together: Rescaling, by_row: Rescaling, cursor: Cursor | None
) -> RowHook:
    """Hook that edits the rows of prompts together, and each row of a response for itself."""

    def change(pattern: Float[Tensor, "batch head row key"], hook: Any) -> Tensor | None:
        first = first_row(model, layer, batch, "response", cursor, pattern)
        n_rows, n_keys = pattern.shape[-2:]
        if first and (n_keys > n_rows or n_rows < batch.width - 1):
            raise ValueError(
                "SpotLight with positions='all' needs all rows of the prompt in one pass, and this pass has "
                f"{n_rows} of {batch.width} columns; use positions='response', or run the prompt in one pass"
            )
        if by_row.empty:
            return None
        prompt, response = pattern[:, :, :first].clone(), pattern[:, :, first:].clone()
        edited = [edit(rows) for edit, rows in ((together, prompt), (by_row, response)) if rows.shape[2]]
        return torch.cat(edited, dim=2)

    return RowHook(change, by_row, every_row=True)


class _Target:
    """Factors that raise the proportion of attention on the span in groups of rows and heads.

    Args:
        target: Target proportion.
        heads: 1 for the heads of the groups, and 0 for all others.
        tokens: Rows of the one group of each prompt; ``None`` if each row is a group.
    """

    may_overflow = False

    def __init__(
        self, target: float, heads: Float[Tensor, "head"], tokens: Bool[Tensor, "batch row"] | None = None
    ) -> None:
        self._target, self._heads = target, Placed(rearrange(heads, "head -> head 1 1"))
        self._tokens = None if tokens is None else Placed(rearrange(tokens, "batch row -> batch 1 row 1"))

    def __call__(
        self, on_span: Float[Tensor, "batch head row 1"], elsewhere: Float[Tensor, "batch head row 1"]
    ) -> tuple[Float[Tensor, "batch head row 1"], Float[Tensor, "batch head row 1"]]:
        heads = self._heads.on(on_span.device, on_span.dtype)
        part, whole = self._sum(on_span * heads), self._sum((on_span + elsewhere) * heads)
        below = (part > 0) & (part < self._target * whole)
        raised = torch.where(below, self._target * whole / torch.where(below, part, 1.0), 1.0)
        return bias_factors(on_span, elsewhere, torch.log(raised) * heads)

    def _sum(self, masses: Float[Tensor, "batch head row 1"]) -> Float[Tensor, "batch 1 #row 1"]:
        """Sums over each group."""
        if self._tokens is None:
            return masses.sum(dim=1, keepdim=True)
        return (masses * self._tokens.on(masses.device, masses.dtype)).sum(dim=(1, 2), keepdim=True)
