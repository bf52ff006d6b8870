"""Batches of similar length within a budget of tokens, which halves itself when memory runs out."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Generator, Sequence
from typing import TypeVar

__all__ = ["BATCH_TOKENS", "in_batches", "is_out_of_memory"]

BATCH_TOKENS = 2**14
"""Prompt tokens that are run together by default; a longer prompt is run alone."""

_T = TypeVar("_T")

_OUT_OF_MEMORY = ("can't allocate memory", "MPS backend out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
"""What the CPU's allocator, Apple's GPUs and cuBLAS say in a plain ``RuntimeError``."""


def in_batches(
    lengths: Sequence[int], budget: int, run: Callable[[list[int], int], _T], *, divisible: bool = False
) -> Generator[tuple[list[int], _T]]:
    """Run items in batches of similar length, shortest first.

    When memory runs out, the budget becomes half of what the batch held, a warning says so, and the batch is begun
    again; an item that is too large alone is an error.

    Args:
        lengths: Tokens of each item.
        budget: Most tokens of a batch, padding included; an item that has more is a batch of its own.
        run: Gets the indices of a batch and the budget as it is by then, and gives its result.
        divisible: Whether ``run`` does less at a time for a smaller budget even if it gets a single item.

    Raises:
        ValueError: If the budget is not positive.
        MemoryError: If one item alone does not fit into memory.
    """
    if budget < 1:
        raise ValueError(f"batch_tokens is {budget}; it must be at least 1")
    order = sorted(range(len(lengths)), key=lambda index: lengths[index])
    while order:
        size = max((n for n in range(1, len(order) + 1) if n * lengths[order[n - 1]] <= budget), default=1)
        batch, held = order[:size], size * lengths[order[size - 1]]
        try:
            made = run(batch, budget)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            if len(batch) == 1 and (budget == 1 or not divisible):
                raise MemoryError(f"memory ran out on a single prompt of {held:,} tokens ({error})") from error
            budget = max(1, min(budget, held) // 2)
        else:
            order = order[size:]
            yield batch, made
            continue
        # Outside the handler, which keeps the failed pass and all its tensors alive.
        gc.collect()
        import torch  # not at the top, so that the command's help does without it

        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        warnings.warn(
            f"memory ran out on {len(batch)} prompts of {held:,} tokens; going on with {budget:,} tokens a batch "
            f"(batch_tokens={budget} begins there)",
            stacklevel=2,
        )


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error says that memory ran out: CUDA has an error of its own, others raise a ``RuntimeError``."""
    import torch

    said = isinstance(error, RuntimeError) and any(words in str(error) for words in _OUT_OF_MEMORY)
    return said or isinstance(error, MemoryError | torch.OutOfMemoryError)
