"""What a killed run loses: batches of about a minute, and settings that are kept as soon as they are finished."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from focuslens import FocusModel, MultiDocSample, Setting, contextual_scores, run_sweep
from focuslens.evaluation import recorded_runs
from focuslens.evaluation.recorded_runs import RecordedRun, Task
from focuslens.heads import ModelShape
from focuslens.model import batching
from focuslens.util import record_file
from focuslens.util.record_file import RecordFile
from focuslens.util.refused_runs import OtherResultsError
from tests.unit.evaluation.test_sweeps import settings, steering

HEADER = {"model": "m"}
SHAPE = ModelShape(n_layers=2, n_heads=2, n_key_value_heads=2, d_head=4, d_model=8, d_vocab=10, n_ctx=100)


class Clock:
    """A clock that moves when work is done."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    for module in (recorded_runs, record_file):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=clock))
    return clock


class Work:
    """A model that takes ``seconds`` per sample and setting, and is killed after ``lifetime`` settings."""

    def __init__(self, clock: Clock, seconds: float, names: Sequence[str] = ("a", "b"), lifetime: int = 10**6) -> None:
        self.clock, self.seconds, self.names, self.lifetime = clock, seconds, names, lifetime
        self.batches: list[int] = []
        self.shares: list[float] = []

    def __call__(
        self, model: Any, samples: Sequence[Any], budget: int, skip: frozenset[str], share: float
    ) -> Iterable[tuple[str, Sequence[Any]]]:
        self.batches.append(len(samples))
        self.shares.append(share)
        for name in self.names:
            if name in skip:
                continue
            if not self.lifetime:
                raise KeyboardInterrupt
            self.lifetime -= 1
            self.clock.now += self.seconds * len(samples)
            yield name, [f"{name}{sample}" for sample in samples]


def run(work: Work, path: Path | None, n: int, budget: int = 80, timed: float | None = None) -> list[list[str]]:
    """Run ``n`` samples of 10 tokens. ``timed`` is the duration of a token that a timed pass gives."""

    def mapped(function: Any, calls: Any) -> Any:
        if function is batching._seconds_per_token:
            assert timed is not None
            return iter([timed])
        return (function(None, *call) for call in calls)

    executor: Any = SimpleNamespace(shape=SHAPE, device=torch.device("cpu"), map=mapped)
    store = None if path is None else RecordFile(path, HEADER)
    done = {} if store is None else store.records
    parts = {} if store is None else store.parts
    todo = [str(i) for i in range(n) if str(i) not in done]
    tasks = [Task(name, name, 10, dict(parts.get(name, {})), name) for name in todo]
    record = lambda sample, results: {"id": sample, "results": dict(results)}  # noqa: E731
    recorded = RecordedRun(executor, work, tuple(work.names), record, store, 1, 1)
    return [[record["id"] for record in batch] for batch in recorded.run(tasks, budget, "work", n_done=n - len(todo))]


def test_batches_are_cut_to_a_minute_as_it_is_measured(clock: Clock, tmp_path: Path) -> None:
    # A sample takes 20 s under both settings: the first batch takes 160 s, and the others 40 s.
    work = Work(clock, 10.0)
    run(work, tmp_path / "r.jsonl", 14)
    assert work.batches == [8, 2, 2, 2]
    assert work.shares == [1, 1, 1, 1]
    work.seconds = 1.0  # faster: the next batch is measured, and then whole batches fit
    run(work, tmp_path / "fast.jsonl", 20)
    assert work.batches[4:] == [8, 8, 4]


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every model be one that may be slow, so that a pass is timed."""
    monkeypatch.setattr(batching, "_CPU_SPEED", 1.0)


@pytest.mark.usefixtures("slow")
def test_all_batches_are_small_on_a_model_that_is_slow(clock: Clock, tmp_path: Path) -> None:
    # A prompt token takes one pass and 2 settings of 1 response token per 10 prompt tokens: 1.2 tokens of 2 s.
    work = Work(clock, 1.0)
    run(work, tmp_path / "r.jsonl", 10, timed=2.0)
    assert work.batches == [2, 2, 2, 2, 2]
    first = json.loads((tmp_path / "r.jsonl").read_text().splitlines()[0])
    assert first == {"header": HEADER, "seconds_per_token": pytest.approx(2.4)}
    run(quick := Work(clock, 1.0), tmp_path / "quick.jsonl", 10, timed=0.1)
    assert quick.batches == [8, 2]


@pytest.mark.usefixtures("slow")
def test_a_resumed_run_has_the_batches_it_was_planned_with(clock: Clock, tmp_path: Path) -> None:
    whole, path = tmp_path / "whole.jsonl", tmp_path / "killed.jsonl"
    run(Work(clock, 5.0), whole, 10, timed=1.0)
    for lifetime in (1, 2):
        with pytest.raises(KeyboardInterrupt):
            run(Work(clock, 5.0, lifetime=lifetime), path, 10, timed=1.0)
    resumed = Work(clock, 5.0)
    run(resumed, path, 10, timed=None)  # no pass is timed again
    assert resumed.batches == [4, 2]
    assert path.read_bytes() == whole.read_bytes()


@pytest.mark.usefixtures("slow")
def test_a_sample_of_more_than_a_minute_runs_a_part_of_its_settings_at_a_time(clock: Clock, tmp_path: Path) -> None:
    work = Work(clock, 60.0, names=("a", "b", "c", "d"))
    run(work, tmp_path / "r.jsonl", 3, budget=10, timed=24 / 1.4)
    assert work.batches == [1, 1, 1]
    assert work.shares == pytest.approx([0.25, 0.25, 0.25])


def test_a_run_that_writes_nothing_keeps_its_batches(clock: Clock) -> None:
    work = Work(clock, 1000.0)
    run(work, None, 14)
    assert work.batches == [8, 6]


def test_a_killed_run_keeps_the_finished_settings_of_its_batch(clock: Clock, tmp_path: Path) -> None:
    whole, path = tmp_path / "whole.jsonl", tmp_path / "killed.jsonl"
    run(Work(clock, 1.0, ("a", "b", "c")), whole, 16)
    parts = tmp_path / "killed.jsonl.unfinished"
    with pytest.raises(KeyboardInterrupt):
        run(Work(clock, 5.0, ("a", "b", "c"), lifetime=5), path, 16, budget=80)
    assert len(path.read_text().splitlines()) == 1 + 8
    # Two settings of the second batch are finished, at 15 s or more from the last write each.
    _, *kept = map(json.loads, parts.read_text().splitlines())
    assert [(entry["setting"], len(entry["results"])) for entry in kept] == [("a", 4), ("b", 4)]
    work = Work(clock, 1.0, ("a", "b", "c"))
    run(work, path, 16)
    assert path.read_bytes() == whole.read_bytes()
    assert not parts.exists()
    assert clock.now == pytest.approx(48 + 8 * 15 + 4 * 10 + 4 * 1 + 4 * 3)


def test_parts_of_another_run_are_refused(clock: Clock, tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    with pytest.raises(KeyboardInterrupt):
        run(Work(clock, 60.0, lifetime=1), path, 2)
    assert not path.exists()
    with pytest.raises(OtherResultsError, match=r"r\.jsonl\.unfinished holds results of a different run"):
        RecordFile(path, {"model": "other"})
    parts = path.with_name("r.jsonl.unfinished")
    content = parts.read_bytes()
    parts.write_bytes(content + content.splitlines()[-1][:-5])  # killed while a line was written
    assert RecordFile(path, HEADER).parts == {"0": {"a": "a0"}, "1": {"a": "a1"}}
    assert parts.read_bytes() == content


def test_quick_runs_write_no_file_of_parts(clock: Clock, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(Work(clock, 1.0, lifetime=1), tmp_path / "r.jsonl", 2)
    assert list(tmp_path.iterdir()) == []


def test_samples_that_only_lack_a_record_get_it(clock: Clock, tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    store = RecordFile(path, HEADER)
    clock.now += 20
    store.append_part("a", {"0": "a0", "1": "a1"})
    clock.now += 20
    store.append_part("b", {"0": "b0"})
    work = Work(clock, 1.0)
    assert run(work, path, 2) == [["0"], ["1"]]
    assert [json.loads(line)["results"] for line in path.read_text().splitlines()[1:]] == [
        {"a": "a0", "b": "b0"},
        {"a": "a1", "b": "b1"},
    ]
    complete = RecordFile(tmp_path / "c.jsonl", HEADER)
    clock.now += 20
    complete.append_part("a", {"0": "a0"})
    clock.now += 20
    complete.append_part("b", {"0": "b0"})
    assert run(Work(clock, 1.0, lifetime=0), tmp_path / "c.jsonl", 1) == [["0"]]


@pytest.mark.parametrize("killed_after", [1, 3, 5])
def test_a_sweep_killed_between_settings_resumes_to_the_same_bytes(
    load_model: Any,
    samples: list[MultiDocSample],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    killed_after: int,
) -> None:
    loaded = load_model("llama")
    model = FocusModel(loaded.hooked, loaded.tokenizer, stop_strings=(), stop_tokens=(), name="tiny")
    chosen = [*settings(), Setting("steered more", (steering(2.0),))]
    options: dict[str, Any] = {"max_new_tokens": 2, "batch_tokens": 700}
    run_sweep(model, samples, chosen, out=tmp_path / "whole.jsonl", **options)
    monkeypatch.setattr(record_file, "_PART_SECONDS", 0.0)
    decode, n_decoded = model.decode, 0

    def dying(*args: Any, **named: Any) -> Any:
        nonlocal n_decoded
        n_decoded += 1
        if n_decoded > killed_after:
            raise KeyboardInterrupt
        return decode(*args, **named)

    path = tmp_path / "killed.jsonl"
    with monkeypatch.context() as patch:
        patch.setattr(model, "decode", dying)
        with pytest.raises(KeyboardInterrupt):
            run_sweep(model, samples, chosen, out=path, **options)
    finished = RecordFile(path, json.loads((tmp_path / "whole.jsonl").read_text().splitlines()[0])["header"])
    assert finished.parts or finished.records
    n_decoded = -(10**6)
    monkeypatch.setattr(model, "decode", dying)
    run_sweep(model, samples, chosen, out=path, **options)
    assert path.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert [file.name for file in sorted(tmp_path.iterdir())] == ["killed.jsonl", "whole.jsonl"]


def test_small_batches_give_the_records_of_large_ones(
    load_model: Any, samples: list[MultiDocSample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load_model("llama")
    model = FocusModel(loaded.hooked, loaded.tokenizer, stop_strings=(), stop_tokens=(), name="tiny")
    run_sweep(model, samples, settings(), out=tmp_path / "whole.jsonl", max_new_tokens=2)
    monkeypatch.setattr(batching, "_BATCH_SECONDS", 1e-9)
    sizes: list[int] = []
    batch = model.batch
    monkeypatch.setattr(model, "batch", lambda prompts: sizes.append(len(prompts)) or batch(prompts))
    run_sweep(model, samples, settings(), out=tmp_path / "cut.jsonl", max_new_tokens=2)
    assert set(sizes) == {1}
    lines = [(tmp_path / f"{name}.jsonl").read_text().splitlines() for name in ("cut", "whole")]
    assert lines[0][1:] == lines[1][1:]


def test_killed_scores_of_a_slow_model_are_resumed_to_the_same_bytes(
    load_model: Any, samples: list[MultiDocSample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batching, "_CPU_SPEED", 1.0)
    monkeypatch.setattr(batching, "_seconds_per_token", lambda _: 0.1)
    model, many = load_model("llama"), [*samples, *(dataclasses.replace(one, name="again") for one in samples)]
    options: dict[str, Any] = {"max_new_tokens": 2}
    contextual_scores(model, many, out=tmp_path / "whole.jsonl", **options)
    append, path = RecordFile.append, tmp_path / "killed.jsonl"

    def dying(self: RecordFile, records: Any) -> None:
        append(self, records)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RecordFile, "append", dying)
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                contextual_scores(model, many, out=path, **options)
    assert len(path.read_text().splitlines()) < len(many)
    contextual_scores(model, many, out=path, **options)
    assert path.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
