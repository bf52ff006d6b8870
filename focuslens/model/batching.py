"""Batches of similar length within a budget of tokens, which halves itself when memory runs out."""

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
"""Prompt tokens that are run together by default; a longer prompt is run alone."""


@dataclass(frozen=True)
class RunOptions:
    """Options of a run over many prompts, in batches.

    Attributes:
        max_new_tokens: Maximum length of a response, in tokens.
        batch_tokens: Prompt tokens per batch; halved when memory runs out.
        progress: Whether to show progress bars; ``None`` leaves it to the rules of :mod:`focuslens.util.progress`.
    """

    max_new_tokens: int
    batch_tokens: int = BATCH_TOKENS
    progress: bool | None = None


_T = TypeVar("_T")

_OUT_OF_MEMORY = ("can't allocate memory", "MPS backend out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
"""What the CPU's allocator, Apple's GPUs and cuBLAS say in a plain ``RuntimeError``."""


class WorkerLostError(ChildProcessError):
    """Whoever ran a piece of work was lost with it, time and again."""


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
    """Run items in batches of similar length, shortest first: the same batches in the same order, whoever runs them.

    When memory runs out, the budget becomes half of what the batch held, a warning says so, and the batch is begun
    again; an item that is too large alone is an error.

    Args:
        executor: Runs the batches, perhaps several at a time.
        function: Gets the model, the items of a batch and the budget as it is by then, and gives the batch's result.
        items: What is run.
        names: What an error calls each.
        lengths: Tokens of each.
        budget: Most tokens of a batch, padding included; an item that has more is a batch of its own.
        divisible: Whether ``function`` does less at a time for a smaller budget even if it gets a single item.
        alone: Whether each item is run by itself, and in the order given.

    Raises:
        ValueError: If the budget is not positive.
        MemoryError: If one item alone does not fit into memory.
        WorkerLostError: If a batch was lost with whoever ran it, time and again.
    """
    if budget < 1:
        raise ValueError(f"batch_tokens is {budget}; it must be at least 1")
    order = list(range(len(lengths))) if alone else sorted(range(len(lengths)), key=lambda index: lengths[index])
    while order:
        plan = [[index] for index in order] if alone else _batches(order, lengths, budget)
        work = [([items[i] for i in batch], budget) for batch in plan]
        results = executor.map(function, work)
        for batch in plan:
            held = len(batch) * lengths[batch[-1]]
            try:
                made = next(results)
            except WorkerLostError as error:
                raise WorkerLostError(f"while {', '.join(names[i] for i in batch)} was run: {error}") from error
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                if len(batch) == 1 and (budget == 1 or not divisible):
                    raise MemoryError(f"memory ran out on a single prompt of {held:,} tokens ({error})") from error
                budget = max(1, min(budget, held) // 2)
            else:
                order = order[len(batch) :]
                yield batch, made
                continue
            # Outside the handler, which keeps the failed pass and all its tensors alive.
            release_memory()
            warnings.warn(
                f"memory ran out on {len(batch)} prompts of {held:,} tokens; going on with {budget:,} tokens a batch "
                f"(batch_tokens={budget} begins there)",
                stacklevel=2,
            )
            break


def _batches(order: Sequence[int], lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Items, shortest first, cut into batches that are within the budget where they hold more than one."""
    plan: list[list[int]] = []
    for index in order:
        if plan and (len(plan[-1]) + 1) * lengths[index] <= budget:
            plan[-1].append(index)
        else:
            plan.append([index])
    return plan


def release_memory() -> None:
    """Give back what a pass that failed has left."""
    gc.collect()
    import torch  # not at the top, so that the command's help does without it

    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error says that memory ran out: CUDA has an error of its own, others raise a ``RuntimeError``."""
    import torch

    said = isinstance(error, RuntimeError) and any(words in str(error) for words in _OUT_OF_MEMORY)
    return said or isinstance(error, MemoryError | torch.OutOfMemoryError)
