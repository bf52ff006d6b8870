"""Batches of prompts of similar length. The token budget per batch is halved when memory runs out."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from focuslens.util.checks import checked_integer
from focuslens.util.memory import is_out_of_memory, release_memory

if TYPE_CHECKING:
    from focuslens.model.execution import Executor

__all__ = [
    "BATCH_TOKENS",
    "RunOptions",
    "WorkerLostError",
    "map_batches",
    "require_fitting",
]

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

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "batch_tokens"):
            value = checked_integer(getattr(self, name), name)
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
            object.__setattr__(self, name, value)


_T = TypeVar("_T")


class WorkerLostError(ChildProcessError):
    """Error for a call that failed because all workers that ran it were lost, or because no worker could be started."""


def require_fitting(names: Sequence[str], lengths: Sequence[int], n_ctx: int) -> None:
    """Check that every prompt fits the context, before the first one runs.

    Raises:
        ValueError: If a prompt is longer than the context. The message names it.
    """
    too_long = [(length, name) for name, length in zip(names, lengths, strict=True) if length > n_ctx]
    if too_long:
        length, name = max(too_long)
        more = f", and those of {len(too_long) - 1} more do not fit either" if len(too_long) > 1 else ""
        raise ValueError(
            f"the prompt of sample {name} has {length:,} tokens, and the model's context has {n_ctx:,}{more}; leave "
            "such samples out, shorten them, or load the model with a larger n_ctx"
        )


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
