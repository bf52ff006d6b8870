"""Sums of attention over the tokens of documents, and the value of a head by these sums."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from focuslens.prompts.prompt import Span

__all__ = ["criterion", "document_sums", "filtered_sums", "gold_ranks", "ideal_gain"]


def document_sums(attention: Float[Tensor, "*head pos"], documents: Sequence[Span]) -> Float[Tensor, "*head document"]:
    """Sum of the attention to the tokens of each document."""
    return torch.stack([attention[..., start:end].sum(dim=-1) for start, end in documents], dim=-1)


def filtered_sums(attention: Float[Tensor, "*head pos"], documents: Sequence[Span]) -> Float[Tensor, "*head document"]:
    """Sum of the attention to the tokens of each document that is above the document's mean minus two deviations.

    The standard deviation is that of a sample, with ``n - 1`` in the denominator. A document of one token keeps it.
    """
    sums: list[Tensor] = []
    for start, end in documents:
        part = attention[..., start:end]
        if end - start > 1:
            limit = part.mean(dim=-1, keepdim=True) - 2 * part.std(dim=-1, keepdim=True)
            part = torch.where(part > limit, part, 0)
        sums.append(part.sum(dim=-1))
    return torch.stack(sums, dim=-1)


def criterion(
    values: Float[Tensor, "layer head document"], gold: Sequence[int], by: str, temperature: float
) -> Float[Tensor, "layer head"]:
    """Value of each head for one sample, by a criterion of :meth:`QuestionScores.select`."""
    places = list(gold)
    if by == "attention":
        return values[..., places].sum(dim=-1)
    if by == "contrast":
        return (values.double() / temperature).softmax(dim=-1)[..., places].sum(dim=-1)
    ranks = gold_ranks(values, places)
    gains = torch.where(ranks <= 10, 1 / torch.log2(1 + ranks.double()), 0.0)
    return gains.sum(dim=-1) / ideal_gain(min(len(places), 10))


def gold_ranks(values: Float[Tensor, "*head document"], gold: Sequence[int]) -> Int[Tensor, "*head gold"]:
    """Rank of each gold document, the best first. Other documents with the same value come before it."""
    others = torch.ones(values.shape[-1], dtype=torch.bool)
    others[list(gold)] = False
    best = values[..., list(gold)].sort(dim=-1, descending=True).values
    before = (values[..., None, others] >= best[..., None]).sum(dim=-1)
    return before + torch.arange(1, len(gold) + 1)


def ideal_gain(n: int) -> float:
    """Discounted cumulative gain of ``n`` gold documents at the first ranks."""
    return sum(1 / math.log2(2 + i) for i in range(n))
