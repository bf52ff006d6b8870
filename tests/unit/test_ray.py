"""On a local Ray cluster of two workers: the bytes of one process, also when a worker is killed in mid-run."""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import focuslens as fl
from focuslens.batching import map_batches
from focuslens.cli import main
from focuslens.evaluation import records

ray: Any = pytest.importorskip("ray")

ALL_HEADS = [(layer, head) for layer in range(3) for head in range(4)]
HEADS = [(2, 3), (0, 1), (2, 0)]


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """As workers have: the last bits of a score can depend on it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """A Ray of two CPUs that reports to nobody; functions of this module are sent as they are."""
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
    quiet: dict[str, Any] = {"include_dashboard": False, "log_to_driver": False, "logging_level": logging.ERROR}
    ray.init(address="local", num_cpus=2, object_store_memory=100 * 2**20, **quiet)
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def pool(cluster: None, checkpoint: Any) -> Iterator[fl.RayPool]:
    with fl.RayPool(str(checkpoint("llama")), workers=2, threads=1, backend="bridge") as pool:
        yield pool


@pytest.fixture(scope="module")
def model(one_thread: None, load_model: Any) -> fl.FocusModel:
    return load_model("llama")


@pytest.fixture(scope="module")
def many(samples: list[fl.MultiDocSample]) -> list[fl.MultiDocSample]:
    """Twelve samples of several lengths."""
    return [dataclasses.replace(one, question_id=f"{i}{one.question_id}") for i in range(3) for one in samples]


def settings() -> list[fl.Setting]:
    query = 3 * torch.randn(12, 16, generator=torch.Generator().manual_seed(3))
    steering = fl.FocusSteering(fl.FocusDirections(ALL_HEADS, query), 1.0)
    return [
        fl.Setting("baseline"),
        fl.Setting("gold", case="gold"),
        fl.Setting("split", (fl.SplitSoftmax(ALL_HEADS, 0.0),), parameters={"tau": 0.0}),
        fl.Setting("steered", (steering,), parameters={"alpha": 1.0}),
    ]


def pid_of(model: Any) -> int:
    return os.getpid()


def same(one: Any, other: Any) -> bool:
    """Whether two values with tensors in them are the same to the bit."""
    fields = [field.name for field in dataclasses.fields(one)]
    return type(one) is type(other) and all(
        a.numpy().tobytes() == b.numpy().tobytes() if isinstance(a, torch.Tensor) else a == b
        for a, b in ((getattr(one, name), getattr(other, name)) for name in fields)
    )


def kill_after(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, victim: int, calls: int = 1) -> list[int]:
    """Kill a process when a function of this process has been called so many times."""
    original, seen = getattr(owner, name), list[int]()

    @functools.wraps(original)
    def call(*arguments: Any, **options: Any) -> Any:
        result = original(*arguments, **options)
        seen.append(1)
        if len(seen) == calls:
            os.kill(victim, signal.SIGKILL)
        return result

    monkeypatch.setattr(owner, name, call)
    return seen


# --- the same bytes ---


def test_the_pool_knows_the_model(pool: fl.RayPool, model: fl.FocusModel, many: list[fl.MultiDocSample]) -> None:
    assert isinstance(pool, fl.Executor)
    assert (pool.description, pool.shape, pool.name) == (model.description, model.shape, model.name)
    prompt = many[0].prompt("long")
    assert torch.equal(pool.encode(prompt).tokens, model.encode(prompt).tokens)
    assert pool.encode(prompt).spans == model.encode(prompt).spans
    assert pool.tokenizer("a river").input_ids == model.tokenizer("a river").input_ids
    assert (pool.shares.workers, pool.shares.threads, str(pool.device)) == (2, 1, "cpu")


def test_a_sweep_writes_the_bytes_of_one_process(
    pool: fl.RayPool, model: fl.FocusModel, many: list[fl.MultiDocSample], tmp_path: Path
) -> None:
    paths = [tmp_path / "one.jsonl", tmp_path / "pool.jsonl"]
    one, spread = (
        fl.run_sweep(runs, many, settings(), max_new_tokens=3, batch_tokens=400, out=path, seed=5)
        for runs, path in zip((model, pool), paths, strict=True)
    )
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert one.evaluations == spread.evaluations
    assert one.header == spread.header
    assert len({one[setting.name].responses for setting in settings()}) == 4


def test_a_sweep_begun_by_one_process_is_finished_by_the_pool(
    pool: fl.RayPool, model: fl.FocusModel, many: list[fl.MultiDocSample], tmp_path: Path
) -> None:
    whole, path = tmp_path / "whole.jsonl", tmp_path / "begun.jsonl"
    arguments: dict[str, Any] = {"max_new_tokens": 3, "batch_tokens": 1}
    fl.evaluate(model, many, out=whole, **arguments)
    path.write_bytes(whole.read_bytes()[: len(whole.read_bytes()) // 2])  # in the middle of a line
    fl.evaluate(pool, many, out=path, **arguments)
    assert path.read_bytes() == whole.read_bytes()


def test_scores_are_the_same_to_the_bit(pool: fl.RayPool, model: fl.FocusModel, many: list[fl.MultiDocSample]) -> None:
    arguments: dict[str, Any] = {"max_new_tokens": 3, "batch_tokens": 400}
    split = [fl.SplitSoftmax(HEADS, 0.1)]
    given = ["the river", "", *["a stone lantern"] * 10]
    varied: list[dict[str, Any]] = [{"interventions": split}, {"case": "gold"}, {"responses": given}]
    for changed in varied:
        merged: dict[str, Any] = {**arguments, **changed}
        assert same(*(fl.contextual_scores(runs, many, **merged) for runs in (model, pool)))
    assert same(*(fl.attention_budget(runs, many[:4], **arguments) for runs in (model, pool)))
    one, spread = (fl.document_scores(runs, many[:4], **arguments) for runs in (model, pool))
    assert all(torch.equal(a, b) for a, b in zip(one.scores, spread.scores, strict=True))
    assert one.responses == spread.responses


def test_copy_scores_are_the_same_to_the_bit(pool: fl.RayPool, model: fl.FocusModel) -> None:
    text = "The river runs to the harbour. A lantern hangs there. " * 10
    needles = [fl.Needle("where?", "The queen sleeps in the tower.", "tower")]
    samples = fl.needle_samples(model, text, needles, [40, 60], [0.0, 1.0])
    responses = [model.generate(one.prompt, max_new_tokens=12).text for one in samples]
    samples = [
        dataclasses.replace(one, reference=said if re.search("[a-z0-9]", said) else "tower")
        for one, said in zip(samples, responses, strict=True)
    ]
    arguments: dict[str, Any] = {"span": "needle", "max_new_tokens": 12, "batch_tokens": 150}
    assert same(*(fl.retrieval_scores(runs, samples, **arguments) for runs in (model, pool)))


@pytest.mark.parametrize("site", ["rotary", "projection"])
@pytest.mark.parametrize("memory_gb", [1.0, 0.0])
def test_directions_are_the_same_to_the_bit(
    pool: fl.RayPool, model: fl.FocusModel, many: list[fl.MultiDocSample], site: Any, memory_gb: float, tmp_path: Path
) -> None:
    arguments: dict[str, Any] = {"site": site, "epochs": 2, "max_new_tokens": 3, "memory_gb": memory_gb}
    one, spread = (
        fl.train_focus_directions(runs, many, HEADS, batch_tokens=300, checkpoint=tmp_path / f"{i}.pt", **arguments)
        for i, runs in enumerate((model, pool))
    )
    one.save(tmp_path / "one")
    spread.save(tmp_path / "spread")
    for name in ("directions.safetensors", "directions.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "spread" / name).read_bytes()


# --- workers that are lost ---


def test_a_worker_killed_in_mid_run_changes_no_byte(
    pool: fl.RayPool,
    model: fl.FocusModel,
    many: list[fl.MultiDocSample],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    paths = [tmp_path / "one.jsonl", tmp_path / "killed.jsonl"]
    arguments: dict[str, Any] = {"max_new_tokens": 3, "batch_tokens": 300}
    one = fl.run_sweep(model, many, settings(), out=paths[0], **arguments)
    (victim,) = pool.map(pid_of, [()])
    written = kill_after(monkeypatch, records.RecordFile, "append", victim, calls=2)
    killed = fl.run_sweep(pool, many, settings(), out=paths[1], **arguments)
    assert len(written) >= 6
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert one.evaluations == killed.evaluations
    assert victim not in set(pool.map(pid_of, [()] * 4))


def logged(model: Any, number: int, log: Path, deadly: int = -1) -> int:
    """Says in a file that it is run; one number kills the first worker that runs it."""
    first = str(deadly) not in runs_of(log)
    with log.open("a") as file:
        file.write(f"{number}\n")
    if number == deadly and first:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.05)
    return number * number


def runs_of(log: Path) -> list[str]:
    return log.read_text().splitlines() if log.exists() else []


def test_a_killed_worker_costs_what_it_was_running_and_no_more(pool: fl.RayPool, tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert list(pool.map(logged, [(i, log, 7) for i in range(20)])) == [i * i for i in range(20)]
    assert sorted(runs_of(log), key=int) == sorted([*map(str, range(20)), "7"], key=int)


# --- errors, and work that is given up ---


def test_an_error_comes_when_its_turn_does_and_what_was_before_is_kept(
    pool: fl.RayPool, model: fl.FocusModel, many: list[fl.MultiDocSample], tmp_path: Path
) -> None:
    long = dataclasses.replace(many[0], question="where is " + "the river " * 2000 + "?", question_id="long")
    errors: list[ValueError] = []
    paths = [tmp_path / "one.jsonl", tmp_path / "pool.jsonl"]
    for runs, path in zip((model, pool), paths, strict=True):
        with pytest.raises(ValueError, match="tokens do not fit the model's context of 1024") as caught:
            fl.evaluate(runs, [*many, long], max_new_tokens=2, batch_tokens=300, out=path)
        errors.append(caught.value)
    assert str(errors[0]) == str(errors[1])
    assert "in require_room" in str(errors[1].__cause__)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert len(paths[1].read_bytes().splitlines()) == 1 + len(many)


def test_memory_that_runs_out_on_a_worker_makes_smaller_batches(
    pool: fl.RayPool, model: fl.FocusModel, many: list[fl.MultiDocSample]
) -> None:
    def narrow(model: Any, items: list[int], budget: int) -> list[int]:
        if len(items) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return items

    made: list[Any] = []
    for runs in (fl.InProcess(model), pool):
        with pytest.warns(UserWarning, match="memory ran out on 8 prompts of 80 tokens; going on with 40"):
            made.append(list(map_batches(runs, narrow, list(range(9)), [""] * 9, [10] * 9, 80)))
    assert made[0] == made[1]
    assert [batch for batch, _ in made[0]][-1] == [8]


def test_maps_can_be_given_up_and_interleaved(pool: fl.RayPool, tmp_path: Path) -> None:
    log = tmp_path / "log"
    given_up = pool.map(logged, [(i, log) for i in range(50)])
    assert next(given_up) == 0
    given_up.close()
    one, other = (pool.map(logged, [(i, log) for i in range(start, start + 4)]) for start in (0, 10))
    assert list(zip(one, other, strict=True)) == [(i * i, (i + 10) ** 2) for i in range(4)]
    assert len(runs_of(log)) < 20  # of the first no more was begun than may be ahead


# --- opening and closing ---


def test_what_the_users_own_ray_has_no_room_for_is_refused(pool: fl.RayPool) -> None:
    with pytest.raises(ValueError, match=r"room for 2 of 5 worker\(s\) of 1 thread\(s\) each"):
        fl.RayPool("demo", workers=5)
    assert ray.is_initialized()


def test_the_command_with_a_ray_of_its_own_writes_the_same_files(
    one_thread: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["split-softmax", "--device", "cpu", "--documents", "2", "--samples", "3", "--max-new-tokens", "4"]
    options += ["--tau", "0.1", "--k", "1", "--batch-tokens", "300", "--seed", "3"]
    assert main([*options, "--out", str(tmp_path / "one")]) == 0
    said = capsys.readouterr().out
    command = [sys.executable, "-m", "focuslens.cli", *options, "--ray", "--ray-workers", "1", "--ray-threads", "1"]
    environment = {**os.environ, "TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "ray")], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    for name in ("split_softmax.jsonl", "split_softmax.json", "split_softmax.png"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "ray" / name).read_bytes(), name
    assert done.stdout.startswith("Ray: 1 worker(s) of 1 thread(s) each\n")
    assert done.stdout.splitlines()[1:-1] == said.splitlines()[:-1]


def test_a_closed_pool_leaves_the_users_ray(pool: fl.RayPool) -> None:
    pool.close()
    assert ray.is_initialized()
