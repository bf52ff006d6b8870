"""Batches of prompts of similar length. Batches are cut smaller when memory runs out, or when they take too long."""

from __future__ import annotations

import math
import time
import warnings
from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from types import GeneratorType
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, cast, runtime_checkable

from focuslens.util.checks import checked_integer
from focuslens.util.estimates import Estimate
from focuslens.util.memory import is_out_of_memory, release_memory

if TYPE_CHECKING:
    from focuslens.model.execution import Executor
    from focuslens.model.focus_model import FocusModel

__all__ = [
    "BATCH_TOKENS",
    "Pace",
    "Parts",
    "PlanRecord",
    "RunOptions",
    "WorkerLostError",
    "assumed_seconds",
    "map_batches",
    "map_parts",
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

_BATCH_SECONDS = 60.0
"""Longest duration of a batch whose results are written to a file. A killed run loses no more work than this."""

_CPU_SPEED, _GPU_SPEED = 1e10, 1e13
"""Floating-point operations per second, of a slow CPU and of a slow GPU."""

_PROBED = 256
"""Number of prompt tokens of the pass that is timed on models that may be slow."""


@runtime_checkable
class PlanRecord(Protocol):
    """File of a run, which keeps the pace that the run was planned with."""

    pace: float | None


@dataclass
class Pace:
    """Duration of batches, from which their size follows.

    The pace is planned before the first batch and kept in the run's file, so that a resumed run has the same batches.
    It only changes if a batch takes much longer than planned.

    Attributes:
        planned: Planned duration of a batch per prompt token, in seconds, under all settings; 0 if batches are short.
        measured: The longest duration per prompt token of a batch that took much longer than planned, or 0.
    """

    planned: float
    measured: float = 0.0

    @classmethod
    def of(cls, executor: Executor, record: PlanRecord, work: float, budget: int) -> Pace:
        """Pace of a run, from its file or, if the file has none, from a timed pass.

        No pass is timed if batches of ``budget`` tokens are short on slow hardware. The batches of such runs depend on
        nothing that is measured.

        Args:
            executor: Executor of the model.
            record: File of the run.
            work: Tokens to compute per prompt token: passes over the prompt, and response tokens of all settings.
            budget: Maximum number of prompt tokens per batch.
        """
        if record.pace is None:
            is_short = budget * work * assumed_seconds(executor) <= _BATCH_SECONDS
            record.pace = 0.0 if is_short else work * next(executor.map(_seconds_per_token, [()]))
        return cls(record.pace)

    def measure(self, n_tokens: int, seconds: float) -> None:
        """Take note of a finished batch of ``n_tokens`` prompt tokens."""
        if seconds > 1.5 * _BATCH_SECONDS:
            self.measured = max(self.measured, seconds / n_tokens)

    def limited(self, budget: int) -> int:
        """Token budget, halved until a batch of this size takes no longer than a minute."""
        while budget > 1 and budget * max(self.planned, self.measured) > _BATCH_SECONDS:
            budget //= 2
        return budget

    def share(self, n_tokens: int) -> float:
        """Fraction of a batch's work, from 0 to 1, that is done within a minute as planned."""
        return min(1.0, _BATCH_SECONDS / max(n_tokens * self.planned, 1e-9))


def assumed_seconds(executor: Executor) -> float:
    """Duration of one token on slow hardware, from the model's sizes alone."""
    shape = executor.shape
    # A layer has about 12 d_model^2 weights, and a token takes one multiplication and one addition per weight.
    operations = 24 * shape.n_layers * shape.d_model**2
    return operations / (_CPU_SPEED if executor.device.type == "cpu" else _GPU_SPEED)


def _seconds_per_token(model: FocusModel) -> float:
    """Measured duration of one prompt token, rounded up to a power of two so that noise rarely changes it."""
    import torch

    from focuslens.prompts.batch import EncodedPrompt

    n = max(1, min(_PROBED, model.shape.n_ctx // 2))
    prompt = EncodedPrompt(1 + torch.arange(n) % (model.shape.d_vocab - 1), {})
    seconds: list[float] = []
    for _ in range(2):  # the first pass warms up
        started = time.monotonic()
        float(model.logits(prompt)[-1, 0])  # waits for a GPU
        seconds.append(time.monotonic() - started)
    return 2.0 ** math.ceil(math.log2(max(seconds[-1] / n, 1e-9)))


class Parts(tuple[Any, ...]):
    """Parts of one result, all at once: what a generator function yielded in another process."""


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
    yield from map_parts(executor, function, items, names, lengths, budget, divisible=divisible, alone=alone)


def map_parts(
    executor: Executor,
    function: Callable[..., Any],
    items: Sequence[Any],
    names: Sequence[str],
    lengths: Sequence[int],
    budget: int,
    *,
    divisible: bool = False,
    alone: bool = False,
    pace: Pace | None = None,
) -> Generator[tuple[list[int], Any]]:
    """Run a function as :func:`map_batches` does, and yield the parts of a batch's result as soon as they are computed.

    Args:
        executor: Executor that runs the batches. Another process returns all parts of a batch at once.
        function: Generator function ``(model, items, budget)`` that yields the parts of a batch's result. Parts that
            were yielded before memory ran out are valid: the batch is run again, in smaller batches.
        items: Items to run. An item can change until its batch starts.
        names: See :func:`map_batches`, as for the other arguments.
        lengths: Length of each item, in tokens.
        budget: Maximum number of tokens per batch.
        divisible: Whether a smaller budget helps a batch of one item.
        alone: Whether each item forms a batch by itself.
        pace: Pace of the run, kept up to date by the caller. Batches are cut so that they take about a minute at most,
            and ``function`` takes one more argument: the fraction of the batch's work that is done within a minute.

    Yields:
        Indices of the items in a batch, and one part of the batch's result.
    """
    if budget < 1:
        raise ValueError(f"batch_tokens is {budget}; it must be at least 1")
    order = list(range(len(lengths))) if alone else sorted(range(len(lengths)), key=lambda index: lengths[index])
    estimate = Estimate(len(lengths), sum(lengths))
    while order:
        started: deque[list[int]] = deque()

        def calls(rest: list[int], budget: int, started: deque[list[int]]) -> Generator[tuple[Any, ...]]:
            while rest:
                limit = 0 if alone else budget if pace is None else pace.limited(budget)
                batch = _first_batch(rest, lengths, limit)
                rest = rest[len(batch) :]
                started.append(batch)
                share = () if pace is None else (pace.share(len(batch) * lengths[batch[-1]]),)
                yield [items[i] for i in batch], budget, *share

        results = executor.map(function, calls(order, budget, started))
        while order:
            try:
                for part in _parts(next(results)):
                    yield started[0], part
            except WorkerLostError as error:
                raise WorkerLostError(f"while {', '.join(names[i] for i in started[0])} was run: {error}") from error
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                batch = started[0]
                n_tokens = len(batch) * lengths[batch[-1]]
                if len(batch) == 1 and (budget == 1 or not divisible):
                    raise MemoryError(f"memory ran out on a single prompt of {n_tokens:,} tokens ({error})") from error
                budget = max(1, min(budget, n_tokens) // 2)
            else:
                at_once, batch = len(started), started.popleft()
                estimate.finish(len(batch), sum(lengths[i] for i in batch), at_once=at_once)
                order = order[len(batch) :]
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


def _parts(result: Any) -> Sequence[Any] | GeneratorType[Any, Any, Any]:
    """Parts of a result: what a generator yields, or the result itself if there is no generator."""
    return cast("Sequence[Any]", result) if isinstance(result, GeneratorType | Parts) else (result,)


def _first_batch(rest: Sequence[int], lengths: Sequence[int], budget: int) -> list[int]:
    """First items of a list, sorted by length, up to the budget. The batch has at least one item."""
    n = 1
    while n < len(rest) and (n + 1) * lengths[rest[n]] <= budget:
        n += 1
    return list(rest[:n])
