"""Pool of Ray workers that distributes calls, collects results and replaces lost workers."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

from focuslens.model.batching import WorkerLostError
from focuslens.model.cluster.worker import Failure, WorkerInfo

if TYPE_CHECKING:
    from focuslens.model.focus_model import FocusModel

__all__ = ["CallQueue", "WorkerPool"]

MAX_ATTEMPTS = 3
"""Maximum number of attempts to run one call, or to start a worker, before the pool gives up."""

MAX_AHEAD = 4
"""Maximum number of results per worker that are pending or unread. If this process is killed, only these are lost."""

START_WARNING_SECONDS = 120.0
"""Seconds to wait for a first worker before the pool warns that the cluster may have no free resources."""


@dataclass(eq=False)
class _Call:
    """One call of a function, with the number of workers that were lost while they ran the call."""

    queue: CallQueue
    index: int
    arguments: tuple[Any, ...]
    losses: int = 0


@dataclass(eq=False)
class CallQueue:
    """Calls of one function, and the results that have arrived but have not been read.

    Results are read in the order of the calls.

    Attributes:
        function: Ray reference to the function.
        arguments: Iterator over the arguments of the calls, without the model. It is read as calls are submitted.
        max_ahead: Maximum number of submitted calls whose results have not been read.
    """

    function: Any
    arguments: Iterator[tuple[Any, ...]]
    max_ahead: int
    results: dict[int, tuple[_Call, Any]] = field(default_factory=dict[int, "tuple[_Call, Any]"])
    retries: deque[_Call] = field(default_factory=deque[_Call])
    n_read: int = 0
    n_submitted: int = 0
    waiting: list[tuple[Any, ...]] = field(default_factory=list[tuple[Any, ...]])

    def _peek(self) -> bool:
        """Read the next call's arguments into ``waiting``, and return whether there is a next call to submit."""
        if not self.waiting:
            self.waiting.extend(islice(self.arguments, 1))
        return bool(self.waiting)

    @property
    def has_results(self) -> bool:
        """Whether there are results that have not been read, of calls submitted or to be submitted."""
        return self.n_read < self.n_submitted or self._peek()

    def next_call(self) -> _Call | None:
        """Next call to submit, lost calls first; ``None`` if no call may be submitted at the moment."""
        if self.retries:
            return self.retries.popleft()
        if self.n_submitted >= self.n_read + self.max_ahead:
            return None
        if not self._peek():
            return None
        self.n_submitted += 1
        return _Call(self, self.n_submitted - 1, self.waiting.pop())

    def retry(self, call: _Call, error: Exception) -> None:
        """Queue a lost call again. After the last attempt, record a failure as the result of the call."""
        call.losses += 1
        if call.losses < MAX_ATTEMPTS:
            self.retries.appendleft(call)
            return
        lines = str(error).strip().splitlines()
        reason = lines[0] if lines else type(error).__name__
        final_error = WorkerLostError(
            f"{call.losses} workers in a row were lost ({reason}); if their machines ran out of memory, use smaller "
            "batches or fewer workers per machine"
        )
        self.results[call.index] = call, Failure(final_error, str(error))


@dataclass(eq=False)
class _WorkerHandle:
    """State of one worker in the pool.

    Attributes:
        actor: The Ray actor.
        status: Ray reference to the outcome of the task that the worker is running; ``None`` while the worker is idle.
        call: Call that the worker is running; ``None`` while the worker is idle or loading its model.
        result: Ray reference to the result of ``call``.
    """

    actor: Any
    status: Any = None
    call: _Call | None = None
    result: Any = None


class RemoteError(Exception):
    """Cause of an error that was raised on a worker. The message is the traceback on the worker."""


class WorkerPool:
    """Fixed number of workers, each with one copy of the model. Lost workers are replaced.

    Args:
        ray: The module ``ray``.
        create_actor: Function that creates the actor of one worker.
        size: Number of workers.
        load: Function that loads the model. Each worker calls this function.
        versions: Package versions of this process. Every worker must have the same versions.
    """

    def __init__(
        self,
        ray: Any,
        create_actor: Callable[[], Any],
        size: int,
        load: Callable[[], FocusModel],
        versions: Mapping[str, str],
    ) -> None:
        self._ray, self._create_actor, self._load, self._versions = ray, create_actor, load, versions
        self._workers: list[_WorkerHandle] = []
        self._failed_starts = 0
        self._size = size
        self._info: WorkerInfo | None = None

    def start(self) -> None:
        """Start the workers, and wait until one of them has loaded its model.

        Raises:
            WorkerLostError: If no worker can be started.
            Exception: The error that a worker raised while it loaded the model.
        """
        for _ in range(self._size):
            self._start_worker()
        if not self._wait(START_WARNING_SECONDS):
            warnings.warn(
                f"none of {self._size} workers has loaded its model in {START_WARNING_SECONDS:.0f} s; workers that "
                "need more CPUs or GPUs than are free wait until these are free",
                stacklevel=2,
            )
        while self._info is None:
            self._wait(None)

    @property
    def info(self) -> WorkerInfo:
        """Description of the first worker that loaded its model. All other workers must have the same model."""
        if self._info is None:
            raise RuntimeError("no worker has loaded the model")
        return self._info

    def next_result(self, queue: CallQueue) -> Any:
        """Next result of a queue, in the order of the calls, still serialised.

        Raises:
            WorkerLostError: If too many workers were lost while they ran the call, or if no worker can be started.
            Exception: The error that the call raised.
        """
        while True:
            self._wait(0)
            self._submit(queue)
            if queue.n_read not in queue.results:
                if not self._wait(None):
                    raise RuntimeError("no worker is running the call whose result is needed")
                continue
            call, result = queue.results.pop(queue.n_read)
            if isinstance(result, Failure):
                raise result.error from RemoteError(result.traceback)
            try:
                content = self._ray.get(result)
            except self._ray.exceptions.RayError as error:  # the machine that stored the result is lost
                queue.retry(call, error)
                continue
            queue.n_read += 1
            self._submit(queue)
            return content

    def stop(self) -> None:
        """Stop all workers."""
        for worker in self._workers:
            self._ray.kill(worker.actor)
        self._workers.clear()

    def _start_worker(self) -> None:
        actor = self._create_actor()
        self._workers.append(_WorkerHandle(actor, actor.open.remote(self._load)))

    def _submit(self, queue: CallQueue) -> None:
        """Submit one call to each idle worker."""
        for worker in self._workers:
            if worker.status is not None:
                continue
            call = queue.next_call()
            if call is None:
                return
            worker.call = call
            # The task returns a small status and a result. The status is fetched at once. The result is fetched only
            # when the caller reads it.
            task = worker.actor.run.options(num_returns=2)
            worker.status, worker.result = task.remote(queue.function, call.arguments)

    def _wait(self, timeout: float | None) -> bool:
        """Wait until a task finishes, and process all finished tasks. Return ``False`` if no task has finished."""
        busy = {worker.status: worker for worker in self._workers if worker.status is not None}
        if not busy:
            return False
        n_tasks = len(busy) if timeout == 0 else 1
        finished, _ = self._ray.wait(list(busy), num_returns=n_tasks, timeout=timeout, fetch_local=False)
        for status in finished:
            self._receive(busy[status])
        return bool(finished)

    def _receive(self, worker: _WorkerHandle) -> None:
        """Process the outcome of a worker's finished task. The worker becomes idle."""
        reference, call, result = worker.status, worker.call, worker.result
        worker.status = worker.call = worker.result = None
        try:
            outcome = self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:  # Ray could not start the task
            outcome = Failure(RuntimeError(str(error).strip().splitlines()[-1]), str(error))
        except self._ray.exceptions.RayError as error:
            self._replace(worker, call, error)
            return
        if call is None:
            self._accept(worker, outcome)
        else:
            call.queue.results[call.index] = call, result if outcome is None else outcome

    def _accept(self, worker: _WorkerHandle, outcome: WorkerInfo | Failure) -> None:
        """Accept a worker that has loaded the right model with the right package versions. Stop any other worker."""
        error = outcome.error if isinstance(outcome, Failure) else mismatch(outcome, self._versions, self._info)
        if error is None and isinstance(outcome, WorkerInfo):
            self._failed_starts, self._info = 0, self._info or outcome
            return
        self._ray.kill(worker.actor)
        self._workers.remove(worker)
        trace = RemoteError(outcome.traceback) if isinstance(outcome, Failure) else None
        if error is not None and (self._info is None or not self._workers):
            raise error from trace
        warnings.warn(f"one worker was stopped and the others go on: {error}", stacklevel=2)

    def _replace(self, worker: _WorkerHandle, call: _Call | None, error: Exception) -> None:
        """Start a new worker in place of a lost worker, and queue the lost worker's call again."""
        self._workers.remove(worker)
        if call is not None:
            call.queue.retry(call, error)
        else:
            self._failed_starts += 1
        if self._failed_starts < MAX_ATTEMPTS:
            self._start_worker()
        elif not self._workers:
            raise WorkerLostError(f"no worker can be started: {str(error).strip()}") from error


def mismatch(info: WorkerInfo, versions: Mapping[str, str], first: WorkerInfo | None) -> ValueError | None:
    """Error for a worker with different package versions or a different model; ``None`` if everything matches.

    Args:
        info: Description of the worker.
        versions: Package versions of this process, which the worker must have.
        first: Description of the first worker, whose model the worker must have; ``None`` if there is no other worker.
    """
    # The version of Python may differ, because it does not affect results.
    expected = {f"version of {name}": number for name, number in versions.items() if name != "python"}
    actual = {f"version of {name}": info.versions.get(name) for name in versions}
    if first is not None:
        expected |= first.description
        actual |= info.description
    for key, value in expected.items():
        if actual.get(key) != value:
            return ValueError(
                f"the {key} is {actual.get(key)!r} on {info.location}, and {value!r} elsewhere; results would differ "
                "from those of one process"
            )
    return None
