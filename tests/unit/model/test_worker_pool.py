"""A pool with results out of order and lost workers, on a stand-in for Ray in this process."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import focuslens as fl
from focuslens.model.batching import map_batches
from focuslens.model.cluster import ray_pool, worker_pool
from focuslens.studies.paper import retrieval

pytest.importorskip("ray")  # The workers use Ray's pickle module.


class Lost(Exception):
    pass


class TaskFailed(Lost):
    pass


class Death(BaseException):
    """Exception that kills the worker that raises it."""


def never(number: int) -> bool:
    return False


class Reference:
    """A stand-in for Ray's ``ObjectRef``. Its task runs when the pool waits for it."""

    def __init__(self, run: Callable[[], Any] | None = None) -> None:
        self.run, self.done, self.lost = run, False, False
        self.value: Any = None

    def settle(self) -> None:
        assert self.run is not None
        try:
            self.value = self.run()
        except Lost as error:
            self.value, self.lost = error, True
        self.done = True


class FakeRay:
    """A stand-in for the part of Ray that a pool uses, on one machine. Tasks run in a random order.

    Args:
        cpus: Number of CPUs of the machine.
        runs: Whether the call with this number loses its worker. Calls are numbered in the order in which they run.
        starts: Whether the worker start with this number fails.
        results: Whether the result with this number is lost after its call has ended.
        broken: Whether Ray fails to begin the call with this number.
    """

    exceptions = SimpleNamespace(RayError=Lost, RayTaskError=TaskFailed)

    def __init__(
        self,
        cpus: int = 2,
        *,
        runs: Callable[[int], bool] = never,
        starts: Callable[[int], bool] = never,
        results: Callable[[int], bool] = never,
        broken: Callable[[int], bool] = never,
    ) -> None:
        self._cpus, self._runs, self._starts, self._results, self._broken = cpus, runs, starts, results, broken
        self.ran = self.started = self.taken = 0
        self._random = random.Random(5)
        self.dead: list[Any] = []
        self.requests: list[dict[str, Any]] = []

    def is_initialized(self) -> bool:
        return True

    def nodes(self) -> list[dict[str, Any]]:
        return [{"Alive": True, "Resources": {"CPU": self._cpus}}, {"Alive": False, "Resources": {"CPU": 64}}]

    def put(self, value: Any) -> Any:
        return value

    def remote(self, kind: Any) -> Any:
        def create_actor(*arguments: Any) -> Any:
            worker = kind(*arguments)
            actor = SimpleNamespace(open=SimpleNamespace(remote=lambda load: Reference(lambda: open_(load))))
            actor.run = SimpleNamespace(options=lambda num_returns: SimpleNamespace(remote=run))

            def open_(load: Any) -> Any:
                self.started += 1
                if self._starts(self.started):
                    raise Lost("the worker died while it started\nand more")
                return worker.open(load)

            def run(function: Any, arguments: Any) -> tuple[Reference, Reference]:
                result = Reference()

                def now() -> Any:
                    assert actor not in self.dead
                    self.ran += 1
                    if self._runs(self.ran):
                        raise Lost("the worker died\nand more")
                    if self._broken(self.ran):
                        raise TaskFailed("Traceback\nModuleNotFoundError: No module named 'x'\n")
                    try:
                        failure, result.value = worker.run(function, arguments)
                    except Death:
                        raise Lost("the worker died\nand more") from None
                    result.done = True
                    return failure

                return Reference(now), result

            return actor

        def options(**request: Any) -> Any:
            self.requests.append(request)
            return SimpleNamespace(remote=create_actor)

        return SimpleNamespace(options=options)

    def wait(
        self, references: list[Reference], *, num_returns: int, timeout: float | None, fetch_local: bool
    ) -> tuple[list[Reference], list[Reference]]:
        if timeout != 0 and not any(reference.done for reference in references):
            self._random.choice(references).settle()
        done = [reference for reference in references if reference.done][:num_returns]
        return done, [reference for reference in references if reference not in done]

    def get(self, reference: Reference) -> Any:
        if reference.run is None:
            self.taken += 1
            if self._results(self.taken):
                raise Lost("the machine that held it is gone")
        if reference.lost:
            raise reference.value
        return reference.value

    def kill(self, actor: Any) -> None:
        self.dead.append(actor)


@pytest.fixture
def model(load_model: Any) -> fl.FocusModel:
    return load_model("llama")


@pytest.fixture
def open_pool(model: fl.FocusModel, monkeypatch: pytest.MonkeyPatch) -> Callable[..., fl.RayPool]:
    """``open_pool(ray)`` opens a pool of two workers on a stand-in for Ray."""

    def open_(ray: FakeRay, load: Callable[[], Any] = lambda: model, workers: int = 2) -> fl.RayPool:
        monkeypatch.setattr(ray_pool, "_require_ray", lambda: ray)
        return fl.RayPool(load, workers=workers)

    return open_


def square(model: Any, number: int) -> int:
    return number * number


def squares(n: int) -> list[int]:
    return [i * i for i in range(n)]


def test_results_come_in_order_and_no_call_runs_far_ahead(open_pool: Any) -> None:
    ray, order, ahead = FakeRay(), list[int](), list[int]()

    def record_order(model: Any, number: int) -> int:
        order.append(number)
        return number * number

    with open_pool(ray) as opened:
        for turn, result in enumerate(opened.map(record_order, ((i,) for i in range(200)))):
            assert result == turn * turn
            ahead.append(max(order) - turn)
        assert sorted(order) == list(range(200))
        assert order != sorted(order)
        assert 1 < max(ahead) < worker_pool.MAX_AHEAD * 2
    assert len(ray.dead) == 2
    assert ray.requests == [{"num_cpus": 1, "num_gpus": 0, "max_restarts": 0, "scheduling_strategy": "SPREAD"}] * 2


@pytest.mark.parametrize("lost", [[1], [2, 3], [1, 4, 9], [5, 6]])
def test_a_lost_call_is_run_again_by_a_new_worker(open_pool: Any, lost: list[int]) -> None:
    ray = FakeRay(runs=lost.__contains__)
    with open_pool(ray) as opened:
        assert list(opened.map(square, [(i,) for i in range(12)])) == squares(12)
    assert ray.ran == 12 + len(lost)
    assert len(ray.requests) == 2 + len(lost)


def test_a_result_that_is_lost_with_its_machine_is_computed_again(open_pool: Any) -> None:
    ray = FakeRay(results=lambda number: number in (1, 5))
    with open_pool(ray) as opened:
        assert list(opened.map(square, [(i,) for i in range(6)])) == squares(6)
    assert ray.ran == 6 + 2


def test_a_call_that_kills_every_worker_ends_the_run_and_earlier_results_are_kept(open_pool: Any) -> None:
    deaths: list[int] = []

    def deadly(model: Any, items: list[int], budget: int) -> list[int]:
        if 3 in items:
            deaths.append(1)
            raise Death
        return items

    names = [f"sample {i}" for i in range(6)]
    with open_pool(FakeRay()) as opened:
        batches = map_batches(opened, deadly, list(range(6)), names, [10] * 6, 10)
        assert [next(batches) for _ in range(3)] == [([i], [i]) for i in range(3)]
        message = r"while sample 3 was run: 3 workers in a row were lost \(the worker died\); if their machines"
        with pytest.raises(fl.WorkerLostError, match=message) as caught:
            next(batches)
        assert isinstance(caught.value, OSError)  # the command line prints an OSError as one line
        assert len(deaths) == worker_pool.MAX_ATTEMPTS == 3
        assert list(map_batches(opened, deadly, [0, 1], names, [10] * 2, 20)) == [([0, 1], [0, 1])]


def test_when_no_worker_can_be_started_the_run_ends(open_pool: Any) -> None:
    ray = FakeRay(starts=lambda number: True)
    with pytest.raises(fl.WorkerLostError, match="no worker can be started: the worker died while it started"):
        open_pool(ray)
    assert ray.started == 2 + worker_pool.MAX_ATTEMPTS - 1
    # One successful start is enough, and it resets the count of failed starts.
    ray = FakeRay(starts=lambda number: number in (1, 2, 4, 5), runs=lambda number: number == 3)
    with open_pool(ray) as opened:
        assert list(opened.map(square, [(i,) for i in range(8)])) == squares(8)
    # The only worker dies, and so does every replacement.
    ray = FakeRay(1, starts=lambda number: number > 1, runs=lambda number: number == 2)
    with (
        open_pool(ray, workers=1) as opened,
        pytest.raises(fl.WorkerLostError, match="no worker can be started: the worker died while"),
    ):
        list(opened.map(square, [(i,) for i in range(8)]))


def test_an_error_of_opening_the_model_is_raised_as_it_is(open_pool: Any, model: fl.FocusModel) -> None:
    opened: list[int] = []

    def missing() -> Any:
        raise FileNotFoundError("there is no directory '/x'")

    def once() -> fl.FocusModel:
        opened.append(1)
        return model if len(opened) == 1 else missing()

    ray = FakeRay()
    with pytest.raises(FileNotFoundError, match="there is no directory '/x'"):
        open_pool(ray, missing)
    assert len(ray.dead) == 2
    with (
        open_pool(FakeRay(), once) as workers,
        pytest.warns(UserWarning, match="one worker was stopped and the others go on: there is no dir"),
    ):
        assert list(workers.map(square, [(i,) for i in range(8)])) == squares(8)


def test_a_call_that_ray_cannot_begin_is_an_error_and_stops_no_worker(open_pool: Any) -> None:
    with open_pool(FakeRay(broken=lambda number: number == 1)) as opened:
        with pytest.raises(RuntimeError, match="ModuleNotFoundError: No module named 'x'"):
            list(opened.map(square, [(1,)]))
        assert list(opened.map(square, [(2,)])) == [4]


def test_a_slow_start_of_the_workers_is_warned_of(open_pool: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_pool, "START_WARNING_SECONDS", 0)
    with pytest.warns(UserWarning, match="none of 2 workers has loaded its model in 0 s"):
        open_pool(FakeRay())


def test_training_rows_that_are_lost_with_workers_are_computed_again(
    open_pool: Any, model: fl.FocusModel, samples: list[fl.MultiDocSample]
) -> None:
    arguments: dict[str, Any] = {"heads": [(2, 3), (0, 1)], "epochs": 2, "max_new_tokens": 3, "batch_tokens": 1}
    expected = fl.train_focus_directions(model, samples, **arguments)
    ray = FakeRay(runs=lambda number: number in (3, 6, 10), results=lambda number: number == 7)
    with open_pool(ray) as opened:
        actual = fl.train_focus_directions(opened, samples, **arguments)
    assert ray.ran > 12
    assert (actual.digest, actual.provenance) == (expected.digest, expected.provenance)


def content(path: Path) -> Any:
    """Content of a file for comparison.

    A safetensors header has no fixed order, so it is parsed. The content is then the header and the remaining bytes.
    """
    written = path.read_bytes()
    if path.suffix != ".safetensors":
        return written
    length = int.from_bytes(written[:8], "little")
    return json.loads(written[8 : 8 + length]), written[8 + length :]


def test_a_reproduction_of_the_paper_is_the_same_on_a_pool(
    open_pool: Any, checkpoint: Any, paper_files: Path, tmp_path: Path
) -> None:
    from tests.support.paper_runs import opened

    here = opened(tmp_path, paper_files, checkpoint("llama"), "here")
    with open_pool(FakeRay(), lambda: here.model) as workers:
        there = dataclasses.replace(opened(tmp_path, paper_files, checkpoint("llama"), "there"), pool=workers)
        settings = fl.split_softmax_settings(here.ranking, [0.1], [1, 3])
        for study in (here, there):
            study.sweep("grid", "test", settings)
            study.scores("test", "gold")
            assert study.directions_at("projection").heads == here.directions_at("projection").heads
            retrieval.run(study)
        assert "model" not in vars(there)
    files = [path.relative_to(here.out) for path in sorted(here.out.rglob("*")) if path.is_file()]
    assert len(files) > 6
    for path in files:
        assert content(here.out / path) == content(there.out / path), path


def test_a_closed_pool_refuses_calls(open_pool: Any) -> None:
    opened = open_pool(FakeRay())
    opened.close()
    opened.close()
    with pytest.raises(RuntimeError, match="the pool is closed; open a new RayPool"):
        list(opened.map(square, [(1,)]))
