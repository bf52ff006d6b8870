"""Batches of prompts of similar length, within a token budget that is halved when memory runs out."""

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
"""Default maximum of prompt tokens in a batch, padding included. A longer prompt is a batch of its own."""


@dataclass(frozen=True)
class RunOptions:
    """Options of a run over many prompts, in batches.

    Attributes:
        max_new_tokens: Maximum length of a response, in tokens.
        batch_tokens: Maximum number of prompt tokens in a batch; halved when memory runs out.
        progress: Whether to show progress bars; ``None`` applies the rules of :mod:`focuslens.util.progress`.
    """

    max_new_tokens: int
    batch_tokens: int = BATCH_TOKENS
    progress: bool | None = None


_T = TypeVar("_T")

_OUT_OF_MEMORY = ("can't allocate memory", "MPS backend out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
"""Words by which to recognise a plain ``RuntimeError`` from the CPU's allocator, Apple's GPUs or cuBLAS."""


class WorkerLostError(ChildProcessError):
    """Error for a call that failed because every worker that ran it was lost, or because no worker could be started."""


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
    """Run items in batches of similar length, shortest first. Batches and their order do not depend on the executor.

    When a batch runs out of memory, a warning is given and the budget becomes half of the batch's tokens. The items of
    the batch are then run again in smaller batches.

    Args:
        executor: Executor that runs the batches, possibly several at a time.
        function: Function of the model, the items of a batch and the current budget, which returns the batch's result.
        items: Arguments of ``function``, such as encoded prompts.
        names: Name of each item, for errors.
        lengths: Length of each item, in tokens.
        budget: Maximum number of tokens in a batch, padding included. A longer item is a batch of its own.
        divisible: Whether ``function`` uses less memory with a smaller budget even on a single item.
        alone: Whether each item is a batch of its own, in the order of ``items``.

    Yields:
        The indices of a batch's items, and the result of ``function``.

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
            # Memory is released outside the handler, because the error keeps the failed pass's tensors alive inside it.
            release_memory()
            warnings.warn(
                f"memory ran out on {len(batch)} prompts of {n_tokens:,} tokens; going on with {budget:,} tokens per "
                f"batch (batch_tokens={budget} avoids this)",
                stacklevel=2,
            )
            break


def _batches(order: Sequence[int], lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Batches of items, shortest first; every batch of two items or more is within the budget."""
    plan: list[list[int]] = []
    for index in order:
        if plan and (len(plan[-1]) + 1) * lengths[index] <= budget:
            plan[-1].append(index)
        else:
            plan.append([index])
    return plan


def release_memory() -> None:
    """Release the memory that a failed pass still holds."""
    gc.collect()
    import torch  # imported here, so that the command's help does not import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error reports that memory ran out. CUDA has its own error; other devices raise a ``RuntimeError``."""
    import torch

    known = isinstance(error, RuntimeError) and any(words in str(error) for words in _OUT_OF_MEMORY)
    return known or isinstance(error, MemoryError | torch.OutOfMemoryError)
