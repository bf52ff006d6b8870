"""Edits of attention rows by methods of the field, as loops in float64 over the weights of one prompt.

Functions with ``_restated`` in their name follow the authors' code, with tensors instead of loops.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tests.support.reference import Rows

__all__ = [
    "biased_rows",
    "calibrated_rows",
    "dimmed_rows",
    "dimmed_rows_restated",
    "lit_rows",
    "lit_rows_restated",
]

Heads = Sequence[tuple[int, int]]


def softmax_of(weights: list[float], biases: Callable[[int], float]) -> list[float]:
    """Softmax of the logarithms of weights plus a bias for each key."""
    logits = [math.log(weight) + biases(j) if weight > 0 else -math.inf for j, weight in enumerate(weights)]
    largest = max(logits)
    powers = [math.exp(logit - largest) for logit in logits]
    return [power / math.fsum(powers) for power in powers]


def each_row(heads: Heads, from_row: int, edit: Callable[[list[float]], list[float]]) -> Rows:
    """An edit of each row of some heads from position ``from_row`` on."""

    def turn(layer: int, pattern: Tensor, first: int) -> Tensor:
        result = pattern.clone()
        for head in (head for where, head in heads if where == layer):
            for row in range(max(0, from_row - first), pattern.shape[2]):
                edited = edit(pattern[0, head, row].tolist())
                result[0, head, row] = torch.tensor(edited, dtype=torch.float64).to(pattern.dtype)
        return result

    return turn


def biased_rows(heads: Heads, bias: float, span: Sequence[int], from_row: int) -> Rows:
    """A constant on the logits of the span's keys."""
    inside = set(span)
    return each_row(heads, from_row, lambda weights: softmax_of(weights, lambda j: bias if j in inside else 0.0))


def dimmed_rows(heads: Heads, alpha: float, span: Sequence[int], n_prompt: int, from_row: int) -> Rows:
    """PASTA: ``log(alpha)`` on the logits of the prompt's keys outside the span."""
    outside = set(range(n_prompt)) - set(span)
    bias = math.log(alpha)
    return each_row(heads, from_row, lambda weights: softmax_of(weights, lambda j: bias if j in outside else 0.0))


def dimmed_rows_restated(heads: Heads, alpha: float, span: tuple[int, int], n_prompt: int) -> Rows:
    """PASTA with one range, as a change of the additive attention mask that every row has."""

    def turn(layer: int, pattern: Tensor, first: int) -> Tensor:
        mask = pattern.double().log()  # logits up to a constant, minus infinity for keys that a row does not see
        chosen = [head for where, head in heads if where == layer]
        start, end = span
        mask[:, chosen, :, :start] += math.log(alpha)
        mask[:, chosen, :, end:n_prompt] += math.log(alpha)
        return mask.softmax(dim=-1).to(pattern.dtype)

    return turn


def lit_rows(heads: Heads, target: float, span: Sequence[int], n_prompt: int, *, prompt: bool) -> Rows:
    """SpotLight: groups are the rows before the prompt's last one (if ``prompt``), and each later row, per layer."""
    inside = set(span)

    def turn(layer: int, pattern: Tensor, first: int) -> Tensor:
        result = pattern.clone()
        chosen = [head for where, head in heads if where == layer]
        rows = range(first, first + pattern.shape[2])
        groups = [[row for row in rows if row < n_prompt - 1]] if prompt else []
        groups += [[row] for row in rows if row >= n_prompt - 1]
        for group in filter(None, groups if chosen else []):
            weights = {(head, row): pattern[0, head, row - first].tolist() for head in chosen for row in group}
            part = math.fsum(row[j] for row in weights.values() for j in inside)
            whole = math.fsum(weight for row in weights.values() for weight in row)
            if not 0 < part / whole < target:
                continue
            biases = [math.log(target * whole / part) if j in inside else 0.0 for j in range(pattern.shape[3])]
            for (head, row), values in weights.items():
                edited = softmax_of(values, biases.__getitem__)
                result[0, head, row - first] = torch.tensor(edited, dtype=torch.float64).to(pattern.dtype)
        return result

    return turn


def lit_rows_restated(target: float, span: tuple[int, int], n_prompt: int) -> Rows:
    """SpotLight in all heads, for passes that the reference splits before the prompt's last row and after each row.

    As in the authors' code, 1e-10 is added to each weight, and all weights of a pass have one proportion.
    """

    def of_pass(weights: Tensor) -> Tensor:
        mask = torch.zeros(weights.shape[-1], dtype=torch.float64)
        mask[slice(*span)] = 1
        proportion = (weights * mask).sum() / weights.sum()
        if proportion >= target:
            return weights
        return ((weights + 1e-10).log() + mask * (target / proportion).log()).softmax(dim=-1)

    def turn(layer: int, pattern: Tensor, first: int) -> Tensor:
        assert first == 0
        starts = [0, *range(n_prompt - 1, pattern.shape[2])]
        ends = [*starts[1:], pattern.shape[2]]
        # A pass has no keys after its last row.
        parts = [of_pass(pattern[0, :, start:end, :end].double()) for start, end in zip(starts, ends, strict=True)]
        result = torch.zeros_like(pattern)
        for part, start, end in zip(parts, starts, ends, strict=True):
            result[0, :, start:end, :end] = part.to(pattern.dtype)
        return result

    return turn


def calibrated_rows(
    heads: Heads,
    documents: Sequence[Sequence[int]],
    attention: Sequence[float],
    bias: Sequence[float],
    temperature: float,
    from_row: int,
    *,
    relative_to: str,
) -> Rows:
    """Attention to documents in proportion to ``softmax(attention - bias) / attention``, with the same total.

    ``attention`` is replaced by the row's own mean over the tokens of the document if ``relative_to`` is ``row``.
    """
    relevance = [(own - dummy) / temperature for own, dummy in zip(attention, bias, strict=True)]
    powers = [math.exp(value - max(relevance)) for value in relevance]
    alpha = [power / math.fsum(powers) for power in powers]

    def edit(weights: list[float]) -> list[float]:
        sums = [math.fsum(weights[j] for j in tokens) for tokens in documents]
        own = [total / len(tokens) for total, tokens in zip(sums, documents, strict=True)]
        below = own if relative_to == "row" else attention
        result, rescaled = list(weights), {}
        for share, denominator, tokens in zip(alpha, below, documents, strict=True):
            rescaled |= {j: share / denominator * weights[j] if denominator > 0 else 0.0 for j in tokens}
        total = math.fsum(rescaled.values())
        if total > 0:
            for j, weight in rescaled.items():
                result[j] = weight / total * math.fsum(sums)
        return result

    return each_row(heads, from_row, edit)
