"""Batches of prompts of similar length. The token budget per batch is halved when memory runs out."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from focuslens.model.execution import Executor

__all__ = ["BATCH_TOKENS", "RunOptions", "WorkerLostError", "is_out_of_memory", "map_batches", "release_memory"]

BATCH_TOKENS = 2**14
"""Default maximum number of prompt tokens per batch, including padding. A longer prompt forms a batch by itself."""


@dataclass(frozen=True)
class RunOptions:
    """Options of a run that processes many prompts in batches.

    Attributes:
        max_new_tokens: Maximum length of a response, in tokens.
        batch_tokens: Maximum number of prompt tokens per batch. It is halved when memory runs out.
        progress: Whether to show progress bars; :mod:`focuslens.util.progress` describes the default.
    """

    max_new_tokens: int
    batch_tokens: int = BATCH_TOKENS
    progress: bool | None = None


_T = TypeVar("_T")

_OUT_OF_MEMORY = ("can't allocate memory", "MPS backend out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
"""Phrases that identify an out-of-memory ``RuntimeError`` from the CPU allocator, Apple GPUs or cuBLAS."""


class WorkerLostError(ChildProcessError):
    """Error for a call that failed because all workers that ran it were lost, or because no worker could be started."""


def map_batches(
    executor: Executor,
    function: Callable[..., _T],
    items: Sequence[Any],
    names: Sequence[str],
    lengths: Sequence[int],
    budget: int,
    *,
    divisible: bool = False,
    alone: bool = False,
) -> Generator[tuple[list[int], _T]]:
    """Run a function on items in batches of similar length, shortest items first.

    The batches and their order do not depend on the executor. If memory runs out on a batch, a warning is issued, and
    the budget is reduced to half of the batch's tokens or half of the budget, whichever is smaller. The items of the
    batch and all later items are then run in smaller batches.

    Args:
        executor: Executor that runs the batches, possibly several at a time.
        function: Function ``(model, items, budget)`` that returns the result of a batch. ``budget`` is the current
            budget.
        items: Items to run, such as encoded prompts.
        names: Name of each item, for error messages.
        lengths: Length of each item, in tokens.
        budget: Maximum number of tokens per batch, including padding. A longer item forms a batch by itself.
        divisible: Whether ``function`` needs less memory with a smaller budget even if a batch has only one item.
        alone: Whether each item forms a batch by itself, in the order of ``items``.

    Yields:
        Indices of the items in a batch, and the result of ``function`` for the batch.

    Raises:
        ValueError: If the budget is not positive.
        MemoryError: If a single item does not fit into memory.
        WorkerLostError: If every worker that ran a batch was lost, or no worker could be started.
    """
    if budget < 1:
        raise ValueError(f"batch_tokens is {budget}; it must be at least 1")
    order = list(range(len(lengths))) if alone else sorted(range(len(lengths)), key=lambda index: lengths[index])
    while order:
        plan = [[index] for index in order] if alone else _batches(order, lengths, budget)
        calls = [([items[i] for i in batch], budget) for batch in plan]
        results = executor.map(function, calls)
        for batch in plan:
            n_tokens = len(batch) * lengths[batch[-1]]
            try:
                result = next(results)
            except WorkerLostError as error:
                raise WorkerLostError(f"while {', '.join(names[i] for i in batch)} was run: {error}") from error
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                if len(batch) == 1 and (budget == 1 or not divisible):
                    raise MemoryError(f"memory ran out on a single prompt of {n_tokens:,} tokens ({error})") from error
                budget = max(1, min(budget, n_tokens) // 2)
            else:
                order = order[len(batch) :]
                yield batch, result
                continue
            # Inside the ``except`` block, the error keeps the tensors of the failed pass alive. Memory is therefore
            # released here.
            release_memory()
            warnings.warn(
                f"memory ran out on {len(batch)} prompts of {n_tokens:,} tokens; going on with {budget:,} tokens per "
                f"batch (batch_tokens={budget} avoids this)",
                stacklevel=2,
            )
            break


def _batches(order: Sequence[int], lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Divide items, sorted by length, into batches. Every batch of two or more items is within the budget."""
    plan: list[list[int]] = []
    for index in order:
        if plan and (len(plan[-1]) + 1) * lengths[index] <= budget:
            plan[-1].append(index)
        else:
            plan.append([index])
    return plan


def release_memory() -> None:
    """Release the memory that a failed pass still occupies."""
    gc.collect()
    import torch  # imported here so that ``focuslens --help`` does not import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error reports that memory ran out: a dedicated error, or a ``RuntimeError`` with a known message."""
    import torch

    known = isinstance(error, RuntimeError) and any(words in str(error) for words in _OUT_OF_MEMORY)
    return known or isinstance(error, MemoryError | torch.OutOfMemoryError)
