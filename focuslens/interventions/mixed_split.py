"""Mean of split-softmax over several parts of a prompt, for choices that are shares and not one part."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from focuslens.heads import Head, as_heads, check_heads, heads_by_layer
from focuslens.hooks import Cursor, Hook, HookTarget, PromptLike
from focuslens.interventions.base import exactly, require_prompt
from focuslens.interventions.rescaling import pattern_hooks
from focuslens.interventions.split_softmax import SplitSoftmax, split_factors
from focuslens.prompts.batch import PromptBatch
from focuslens.prompts.prompt import Span

__all__ = ["MixedSplitSoftmax", "WeightedParts"]


class WeightedParts(NamedTuple):
    """Parts of one prompt, and a weight for each part. The weights sum to 1, or are all 0."""

    parts: tuple[Span, ...]
    weights: tuple[float, ...]


@dataclass(frozen=True)
class MixedSplitSoftmax:
    r"""Weighted mean of split-softmax on each part of a prompt, in the rows that produce the response.

    A row of attention :math:`W` becomes :math:`\sum_d s_d \, \mathrm{split}(W, d, \tau)` with the weights :math:`s_d`
    of the parts :math:`d`: its mean if one part were drawn by its weight. A prompt whose weights are all 0 does not
    change.

    Args:
        heads: ``(layer, head)`` pairs.
        tau: Exponent of split-softmax; see :func:`split_softmax`.
        prompts: Parts and weights of each prompt of the batch, in the order of the prompts.
    """

    heads: tuple[Head, ...]
    tau: float
    prompts: tuple[WeightedParts, ...]

    def __init__(self, heads: Iterable[tuple[int, int]], tau: float, prompts: Iterable[WeightedParts]) -> None:
        object.__setattr__(self, "heads", as_heads(heads))
        object.__setattr__(self, "tau", SplitSoftmax([], tau).tau)
        object.__setattr__(self, "prompts", tuple(prompts))
        for parts, weights in self.prompts:
            if len(parts) != len(weights) or any(not weight >= 0 for weight in weights):
                raise ValueError(
                    f"a prompt has {len(parts)} parts and the weights {weights}; there must be one weight, 0 or more, "
                    "for each part"
                )
            if any(weights) and abs(sum(weights) - 1) > 1e-6:
                raise ValueError(f"the weights of a prompt sum to {sum(weights)}; they must sum to 1, or be all 0")
            ordered = sorted(parts)
            if any(before[1] > after[0] for before, after in pairwise(ordered)):
                raise ValueError("parts of a prompt overlap; each token must belong to one part at most")

    @property
    def changes_prompt(self) -> bool:
        """Always ``False``, because only the rows that produce the response change."""
        return False

    def describe(self) -> dict[str, Any]:
        """Kind and settings of the intervention as JSON values."""
        return {
            "kind": "mixed_split_softmax",
            "tau": self.tau,
            "prompts": [[list(map(list, parts)), list(weights)] for parts, weights in self.prompts],
            "heads": [list(head) for head in self.heads],
        }

    def hooks(self, model: HookTarget, prompt: PromptLike | None = None, *, cursor: Cursor | None = None) -> list[Hook]:
        """TransformerLens hooks for the batch of prompts.

        Raises:
            ValueError: If the batch has another number of prompts, or as for :meth:`SplitSoftmax.hooks`.
        """
        batch = require_prompt(model, prompt, "mixed split-softmax")
        if len(batch) != len(self.prompts):
            raise ValueError(f"the weights are for {len(self.prompts)} prompt(s), and the batch has {len(batch)}")
        columns = _PartColumns(batch, self.prompts)
        by_layer = heads_by_layer(check_heads(self.heads, model.shape.n_layers, model.shape.n_heads))
        edits = {layer: _Mixing(columns, self.tau, heads) for layer, heads in sorted(by_layer.items())}
        hooks = pattern_hooks(model, batch, edits, "response", cursor)
        model.require_acting(name for name, _ in hooks)
        return hooks


class _Mixing:
    """Edit of the rows of some heads of a layer."""

    empty = False

    def __init__(self, columns: _PartColumns, tau: float, heads: Sequence[int], *, sinks: bool = False) -> None:
        self._columns, self._tau, self._sinks = columns, tau, sinks
        self._heads = torch.tensor(heads)

    def with_sinks(self) -> _Mixing:
        """The edit for rows of heads with a sink."""
        return _Mixing(self._columns, self._tau, self._heads.tolist(), sinks=True)

    def __call__(self, rows: Float[Tensor, "batch head row key"]) -> Float[Tensor, "batch head row key"]:
        if self._heads.device != rows.device:
            self._heads = self._heads.to(rows.device)
        edited = self._columns.mixed(rows.index_select(1, self._heads), self._tau, sinks=self._sinks)
        return rows.index_copy_(1, self._heads, edited)


class _PartColumns:
    """Membership of each prompt column in a part, and the weights of the parts, for a batch of prompts."""

    def __init__(self, batch: PromptBatch, prompts: Sequence[WeightedParts]) -> None:
        n = max(len(parts) for parts, _ in prompts)
        self.member = torch.zeros(len(prompts), n, batch.width, dtype=torch.float64)
        self.weights = torch.zeros(len(prompts), n, dtype=torch.float64)
        for i, ((parts, weights), padding) in enumerate(zip(prompts, batch.padding, strict=True)):
            for k, (start, end) in enumerate(parts):
                self.member[i, k, padding + start : padding + end] = 1
                self.weights[i, k] = weights[k]
        self.others = 1 - torch.eye(n, dtype=torch.float64)

    def _on(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        dtype = torch.float32 if rows.device.type == "mps" else torch.float64
        if self.member.device != rows.device:
            self.member, self.weights, self.others = (
                x.to(rows.device, dtype) for x in (self.member, self.weights, self.others)
            )
        return self.member, self.weights, self.others

    def mixed(
        self, rows: Float[Tensor, "batch head row key"], tau: float, *, sinks: bool = False
    ) -> Float[Tensor, "batch head row key"]:
        """The weighted mean of split-softmax on each part."""
        member, weights, others = self._on(rows)
        exact, width = exactly(rows), member.shape[-1]
        masses = einsum(exact[..., :width], member, "batch head row key, batch part key -> batch head row part")
        outside = 1 - member.sum(dim=1)
        rest = einsum(exact[..., :width], outside, "batch head row key, batch key -> batch head row")
        rest = rest + exact[..., width:].sum(dim=-1)
        if sinks:
            rest = torch.maximum(rest, 1 - masses.sum(dim=-1))
        # Sums over the other parts, because a difference from the whole would lose the digits of a small rest.
        elsewhere = rest[..., None] + masses @ others
        raised, lowered = split_factors(masses, elsewhere, tau)
        weights = weights[:, None, None]
        # A prompt without weights keeps its rows.
        kept = (weights.sum(dim=-1, keepdim=True) == 0).to(exact.dtype)
        inside = weights * raised + (weights * lowered) @ others + kept
        around = (weights * lowered).sum(dim=-1, keepdim=True) + kept
        factors = einsum(inside, member, "batch head row part, batch part key -> batch head row key")
        factors = factors + around * outside[:, None, None]
        return torch.cat((exact[..., :width] * factors, exact[..., width:] * around), dim=-1).to(rows.dtype)
