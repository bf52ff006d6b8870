"""Batches without a model, for tests of batch planning."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from types import SimpleNamespace
from typing import Any, TypeVar, cast

from focuslens.model.batching import map_batches

__all__ = ["in_batches"]

_T = TypeVar("_T")


def in_batches(
    lengths: Sequence[int], budget: int, run: Callable[[list[int], int], _T], *, divisible: bool = False
) -> Generator[tuple[list[int], _T]]:
    """Run :func:`map_batches` without a model, one batch after another.

    ``run`` receives the indices of a batch and the current token budget.
    """
    here = cast("Any", SimpleNamespace(map=lambda function, work: (function(None, *one) for one in work)))
    indices = range(len(lengths))
    names = [f"item {index}" for index in indices]

    def of_batch(_: None, batch: list[int], now: int) -> _T:
        return run(batch, now)

    return map_batches(here, of_batch, indices, names, lengths, budget, divisible=divisible)
