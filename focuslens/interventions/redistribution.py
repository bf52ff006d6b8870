"""Redistribution of each row's attention between parts of a prompt, whose total does not change."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from jaxtyping import Float, Int
from torch import Tensor

from focuslens.interventions.base import Placed
from focuslens.interventions.rescaling import SpanColumns
from focuslens.prompts.batch import PromptBatch
from focuslens.prompts.prompt import Span

__all__ = ["Redistribution", "ShareOf"]

ShareOf: TypeAlias = Literal["mean", "row"]
"""Attention that weights of parts are relative to: a mean that the weights already contain, or that of each row."""


class Redistribution:
    """Edit that multiplies the attention to each part by a weight, and all parts by one factor that keeps their total.

    Args:
        batch: The prompts.
        parts: Token ranges of the parts of each prompt. A token of two parts belongs to the first.
        log_weights: Logarithms of the weights of each prompt's parts.
        share_of: ``row`` if each weight is to be divided by the row's own mean attention to a token of the part.
    """

    def __init__(
        self,
        batch: PromptBatch,
        parts: Sequence[Sequence[Span]],
        log_weights: Sequence[Float[Tensor, "_"]],
        share_of: ShareOf,
    ) -> None:
        owners, n_parts = _owners(batch, parts), max(len(spans) for spans in parts)
        inside = owners >= 0
        self._columns = SpanColumns(inside)
        index, counted = self._columns.index, self._columns.counted
        owner = owners.gather(1, index).clamp(min=0)
        self._one_hot = Placed(F.one_hot(owner, max(n_parts, 1)).double())
        self._counted = Placed((F.one_hot(owner, max(n_parts, 1)) * counted[..., None]).double())
        weights = [F.pad(row, (0, n_parts - len(row)), value=-torch.inf) for row in log_weights]
        if share_of == "row":
            n_tokens = (F.one_hot(owner, max(n_parts, 1)) * counted[..., None]).sum(dim=1)
            weights = [row + torch.log(n[: len(row)].double()) for row, n in zip(weights, n_tokens, strict=True)]
        self._log_weights = Placed(rearrange(torch.stack(weights), "batch part -> batch 1 1 part"))
        self._share_of = share_of

    @property
    def empty(self) -> bool:
        """Whether no prompt has a part."""
        return self._columns.empty

    def with_sinks(self) -> Redistribution:
        """This edit, which moves attention between parts only."""
        return self

    def __call__(self, rows: Float[Tensor, "batch head row key"]) -> Float[Tensor, "batch head row key"]:
        """Edit rows, which are changed in place if they have single or double precision."""
        if self.empty:
            return rows
        exact = rows if rows.dtype in (torch.float32, torch.float64) else rows.float()
        weights = self._columns.taken(exact)
        device, dtype = weights.device, weights.dtype
        masses = einsum(
            weights, self._counted.on(device, dtype), "batch head row n, batch n part -> batch head row part"
        )
        factors = self._factors(masses)
        by_column = einsum(
            factors, self._one_hot.on(device, dtype), "batch head row part, batch n part -> batch head row n"
        )
        self._columns.put(exact, weights * by_column)
        return exact if exact.dtype == rows.dtype else exact.to(rows.dtype)

    def _factors(self, masses: Float[Tensor, "batch head row part"]) -> Float[Tensor, "batch head row part"]:
        """Factor of each part; 1 in rows without attention to a part that has a weight."""
        logs = self._log_weights.on(masses.device, masses.dtype)
        logs = torch.where(masses > 0, logs, -torch.inf)
        if self._share_of == "row":
            logs = logs - torch.log(torch.where(masses > 0, masses, 1.0))
        largest = logs.amax(dim=-1, keepdim=True)
        acts = largest > -torch.inf
        # The largest weight is 1, so that nothing overflows.
        relative = torch.exp(logs - torch.where(acts, largest, 0.0))
        total = (relative * masses).sum(dim=-1, keepdim=True)
        scale = masses.sum(dim=-1, keepdim=True) / torch.where(acts, total, 1.0)
        return torch.where(acts, relative * scale, 1.0)


def _owners(batch: PromptBatch, parts: Sequence[Sequence[Span]]) -> Int[Tensor, "batch column"]:
    """Index of the part that each column belongs to; -1 for none."""
    owners = torch.full((len(batch), batch.width), -1)
    for row, spans, padding in zip(owners, parts, batch.padding, strict=True):
        for k, (start, end) in reversed(list(enumerate(spans))):
            row[padding + start : padding + end] = k
    return owners
