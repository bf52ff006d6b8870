"""The workers of a pool: who is there, what each of them does, and what is done about those that are lost."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from focuslens.model.batching import WorkerLostError
from focuslens.model.cluster.worker import Facts, Failure

if TYPE_CHECKING:
    from focuslens.model.focus_model import FocusModel

__all__ = ["Crew", "Work"]

ATTEMPTS = 3
"""Times that a call is asked, and that a worker is started, before it is given up."""

AHEAD = 4
"""Calls a worker that may be done before those whose turn it is: what a kill of this process can lose."""

PATIENCE = 120.0
"""Seconds without any worker after which a warning says what is being waited for."""


@dataclass(eq=False)
class _Unit:
    """One call: its place among all, its arguments, and how many workers were lost with it."""

    work: Work
    place: int
    arguments: tuple[Any, ...]
    losses: int = 0


@dataclass(eq=False)
class Work:
    """One function's calls, and their answers as far as they are there and their turn has not come.

    Attributes:
        function: Where the function lies in the cluster.
        calls: Its arguments after the model.
        ahead: Calls that may be taken beyond the one whose turn it is.
    """

    function: Any
    calls: Sequence[tuple[Any, ...]]
    ahead: int
    answers: dict[int, tuple[_Unit, Any]] = field(default_factory=dict[int, "tuple[_Unit, Any]"])
    again: deque[_Unit] = field(default_factory=deque[_Unit])
    turn: int = 0
    taken: int = 0

    def take(self) -> _Unit | None:
        """What is to be asked next, if anything: first what was lost."""
        if self.again:
            return self.again.popleft()
        if self.taken >= min(len(self.calls), self.turn + self.ahead):
            return None
        unit = _Unit(self, self.taken, self.calls[self.taken])
        self.taken += 1
        return unit

    def lost(self, unit: _Unit, error: Exception) -> None:
        """Ask a call again, or give it up."""
        unit.losses += 1
        if unit.losses < ATTEMPTS:
            self.again.appendleft(unit)
            return
        said = str(error).strip().splitlines()
        final = WorkerLostError(
            f"{unit.losses} workers were lost, one after the other ({said[0] if said else type(error).__name__}); if "
            "their machines ran out of memory, smaller batches or fewer workers on a machine need less"
        )
        self.answers[unit.place] = unit, Failure(final, str(error))


@dataclass(eq=False)
class _Member:
    """A worker: its actor, what it has been asked and for which call (none while it loads its model)."""

    actor: Any
    asked: Any = None
    unit: _Unit | None = None
    payload: Any = None


class RemoteError(Exception):
    """Where an error was raised, in another process."""


class Crew:
    """Starts workers, hands out calls, takes answers, and replaces who is lost.

    Args:
        ray: The module.
        hire: Starts an actor.
        size: How many workers there are to be.
        load: Opens the model, on each of them.
        versions: Of this process, which every worker's must equal.
    """

    def __init__(
        self,
        ray: Any,
        hire: Callable[[], Any],
        size: int,
        load: Callable[[], FocusModel],
        versions: Mapping[str, str],
    ) -> None:
        self._ray, self._hire, self._load, self._versions = ray, hire, load, versions
        self._members: list[_Member] = []
        self._failed_starts = 0
        self._size = size
        self._facts: Facts | None = None

    def start(self) -> None:
        """Start the workers, and wait for the first that has loaded its model.

        Raises:
            WorkerLostError: If none can be started.
            Exception: What opening the model raised.
        """
        for _ in range(self._size):
            self._start_one()
        if not self._collect(PATIENCE):
            warnings.warn(
                f"none of {self._size} workers has loaded its model in {PATIENCE:.0f} s; if they ask for more CPUs or "
                "GPUs than are free, they wait for them",
                stacklevel=2,
            )
        while self._facts is None:
            self._collect(None)

    @property
    def facts(self) -> Facts:
        """What the first worker said of its model, and all must say."""
        if self._facts is None:
            raise RuntimeError("no worker has loaded the model")
        return self._facts

    def answer(self, work: Work) -> Any:
        """The answer whose turn it is, as packed by the worker.

        Raises:
            WorkerLostError: If it was lost too often, or no worker is left.
            Exception: What the call raised.
        """
        while True:
            self._collect(0)
            self._hand_out(work)
            if work.turn not in work.answers:
                if not self._collect(None):
                    raise RuntimeError("no worker runs what is waited for")
                continue
            unit, answer = work.answers.pop(work.turn)
            if isinstance(answer, Failure):
                raise answer.error from RemoteError(answer.traceback)
            try:
                content = self._ray.get(answer)
            except self._ray.exceptions.RayError as error:  # gone with the machine that held it
                work.lost(unit, error)
                continue
            work.turn += 1
            self._hand_out(work)
            return content

    def dismiss(self) -> None:
        """End all workers."""
        for member in self._members:
            self._ray.kill(member.actor)
        self._members.clear()

    def _start_one(self) -> None:
        actor = self._hire()
        self._members.append(_Member(actor, actor.open.remote(self._load)))

    def _hand_out(self, work: Work) -> None:
        for member in self._members:
            if member.asked is not None:
                continue
            unit = work.take()
            if unit is None:
                return
            member.unit = unit
            # The first return says how it ended, and is small; the second stays where it was made until its turn.
            run = member.actor.run.options(num_returns=2)
            member.asked, member.payload = run.remote(work.function, unit.arguments)

    def _collect(self, timeout: float | None) -> bool:
        """Take what workers have to say, waiting for the first to say anything; whether any did."""
        asked = {member.asked: member for member in self._members if member.asked is not None}
        if not asked:
            return False
        most = len(asked) if timeout == 0 else 1
        said, _ = self._ray.wait(list(asked), num_returns=most, timeout=timeout, fetch_local=False)
        for one in said:
            self._hear(asked[one])
        return bool(said)

    def _hear(self, member: _Member) -> None:
        asked, unit, payload = member.asked, member.unit, member.payload
        member.asked = member.unit = member.payload = None
        try:
            said = self._ray.get(asked)
        except self._ray.exceptions.RayTaskError as error:  # it could not even be begun
            said = Failure(RuntimeError(str(error).strip().splitlines()[-1]), str(error))
        except self._ray.exceptions.RayError as error:
            self._replace(member, unit, error)
            return
        if unit is None:
            self._admit(member, said)
        else:
            unit.work.answers[unit.place] = unit, payload if said is None else said

    def _admit(self, member: _Member, said: Facts | Failure) -> None:
        """Let a worker that has loaded its model take part, if it is the same model under the same versions."""
        error = said.error if isinstance(said, Failure) else self._difference(said)
        if error is None and isinstance(said, Facts):
            self._failed_starts, self._facts = 0, self._facts or said
            return
        self._ray.kill(member.actor)
        self._members.remove(member)
        trace = RemoteError(said.traceback) if isinstance(said, Failure) else None
        if error is not None and (self._facts is None or not self._members):
            raise error from trace
        warnings.warn(f"a worker cannot take part, and the others go on without it: {error}", stacklevel=2)

    def _difference(self, facts: Facts) -> ValueError | None:
        """What of a worker is not as in this process or with the first worker."""
        expected = {f"version of {name}": number for name, number in self._versions.items() if name != "python"}
        found = {f"version of {name}": facts.versions.get(name) for name in self._versions}
        if self._facts is not None:
            expected |= self._facts.description
            found |= facts.description
        for what, wanted in expected.items():
            if found.get(what) != wanted:
                return ValueError(
                    f"the {what} is {found.get(what)!r} on {facts.where}, and {wanted!r} elsewhere; results would not "
                    "be those of one process"
                )
        return None

    def _replace(self, member: _Member, unit: _Unit | None, error: Exception) -> None:
        """Put another worker in the place of a lost one, whose call is asked again."""
        self._members.remove(member)
        if unit is not None:
            unit.work.lost(unit, error)
        else:
            self._failed_starts += 1
        if self._failed_starts < ATTEMPTS:
            self._start_one()
        elif not self._members:
            raise WorkerLostError(f"no worker can be started: {str(error).strip()}") from error
