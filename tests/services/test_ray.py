"""Results on a local Ray cluster of two workers equal those of one process bit for bit, even if a worker is killed."""

from __future__ import annotations

import dataclasses
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
from focuslens.cli.main import main

ray: Any = pytest.importorskip("ray")

ALL_HEADS = [(layer, head) for layer in range(3) for head in range(4)]
HEADS = [(2, 3), (0, 1), (2, 0)]


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Use one thread in this process, like the workers, because a score's last bits can depend on the thread count."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """A local Ray cluster with two CPUs and no usage reports. Functions of this module are pickled by value."""
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
    quiet: dict[str, Any] = {"include_dashboard": False, "log_to_driver": False, "logging_level": logging.ERROR}
    ray.init(address="local", num_cpus=2, object_store_memory=100 * 2**20, **quiet)
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def pool(cluster: None, checkpoint: Any) -> Iterator[fl.RayPool]:
    with fl.RayPool(str(checkpoint("llama")), workers=2, threads=1, backend="bridge", stop_strings=()) as pool:
        yield pool


@pytest.fixture(scope="module")
def model(one_thread: None, load_model: Any) -> fl.FocusModel:
    return load_model("llama")


@pytest.fixture(scope="module")
def many(samples: list[fl.MultiDocSample]) -> list[fl.MultiDocSample]:
    """Twelve samples of unequal length."""
    return [dataclasses.replace(sample, question_id=f"{i}{sample.question_id}") for i in range(3) for sample in samples]


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
    """Whether two dataclasses are equal, with tensors compared bit for bit."""
    fields = [field.name for field in dataclasses.fields(one)]
    return type(one) is type(other) and all(
        a.numpy().tobytes() == b.numpy().tobytes() if isinstance(a, torch.Tensor) else a == b
        for a, b in ((getattr(one, name), getattr(other, name)) for name in fields)
    )


# --- identical results ---


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
    path.write_bytes(whole.read_bytes()[: len(whole.read_bytes()) // 2])  # cut in the middle of a line
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
    effects = [fl.document_effects(runs, many[:4], **arguments) for runs in (model, pool)]
    assert all(torch.equal(a, b) for a, b in zip(*(item.effects for item in effects), strict=True))


def test_copy_scores_are_the_same_to_the_bit(pool: fl.RayPool, model: fl.FocusModel) -> None:
    text = "The river runs to the harbour. A lantern hangs there. " * 10
    needles = [fl.Needle("where?", "The queen sleeps in the tower.", "tower")]
    samples = fl.needle_samples(model, text, needles, [40, 60], [0.0, 1.0])
    responses = [model.generate(sample.prompt, max_new_tokens=12).text for sample in samples]
    samples = [
        dataclasses.replace(sample, reference=response if re.search("[a-z0-9]", response) else "tower")
        for sample, response in zip(samples, responses, strict=True)
    ]
    arguments: dict[str, Any] = {"span": "needle", "max_new_tokens": 12, "batch_tokens": 150}
    assert same(*(fl.retrieval_scores(runs, samples, **arguments) for runs in (model, pool)))


@pytest.mark.parametrize(("site", "memory_gb"), [("rotary", 1.0), ("projection", 0.0)])
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


# --- killed workers ---


@dataclasses.dataclass(frozen=True)
class Deadly:
    """An intervention without effect that logs each use and, once in the middle of a run, kills its process."""

    folder: Path
    heads = ()
    changes_prompt = False

    def describe(self) -> dict[str, Any]:
        return {"kind": "deadly"}

    def hooks(self, model: Any, prompt: Any = None, *, cursor: Any = None) -> list[Any]:
        with (self.folder / "asked").open("a") as file:
            file.write(f"{os.getpid()}\n")
        if len(self.asked()) > 2 and not (self.folder / "killed").exists():
            (self.folder / "killed").write_text(str(os.getpid()))
            os.kill(os.getpid(), signal.SIGKILL)
        return []

    def asked(self) -> list[str]:
        return (self.folder / "asked").read_text().splitlines()


def test_a_worker_killed_in_mid_run_costs_its_batch_and_changes_no_byte(
    pool: fl.RayPool, model: fl.FocusModel, many: list[fl.MultiDocSample], tmp_path: Path
) -> None:
    written: list[bytes] = []
    asked: list[list[str]] = []
    for name, runs in (("one", model), ("pool", pool)):
        folder = tmp_path / name
        folder.mkdir()
        if runs is model:
            (folder / "killed").write_text("nobody")
        deadly = Deadly(folder)
        chosen = [*settings(), fl.Setting("deadly", (deadly,))]
        fl.run_sweep(runs, many, chosen, max_new_tokens=3, batch_tokens=300, out=folder / "records.jsonl")
        written.append((folder / "records.jsonl").read_bytes())
        asked.append(deadly.asked())
    assert written[0] == written[1]
    victim = (tmp_path / "pool" / "killed").read_text()
    # The intervention is used once per batch, so exactly one batch was run twice.
    assert len(asked[1]) == len(asked[0]) + 1 > 8
    assert len(set(asked[1])) > 1
    assert int(victim) not in set(pool.map(pid_of, [()] * 4))


# --- errors and abandoned maps ---


@dataclasses.dataclass(frozen=True)
class Refusing:
    """An intervention that changes nothing, and that refuses prompts above a length."""

    longest: int
    heads: tuple[fl.Head, ...] = ()
    changes_prompt: bool = False

    def describe(self) -> dict[str, Any]:
        return {"kind": "refusing", "longest": self.longest}

    def hooks(self, model: Any, prompt: Any = None, *, cursor: Any = None) -> list[Any]:
        width = model.batch(prompt).width
        if width > self.longest:
            raise ValueError(f"a prompt of {width} tokens is refused")
        return []


def test_an_error_is_raised_in_order_and_earlier_results_are_kept(
    pool: fl.RayPool, model: fl.FocusModel, many: list[fl.MultiDocSample], tmp_path: Path
) -> None:
    long = dataclasses.replace(many[0], question="where is " + "the river " * 150 + "?", question_id="long")
    longest = max(len(model.encode(sample.prompt()).tokens) for sample in many)
    errors: list[ValueError] = []
    paths = [tmp_path / "one.jsonl", tmp_path / "pool.jsonl"]
    for runs, path in zip((model, pool), paths, strict=True):
        with pytest.raises(ValueError, match=r"a prompt of \d+ tokens is refused") as caught:
            fl.evaluate(runs, [*many, long], [Refusing(longest)], max_new_tokens=2, batch_tokens=300, out=path)
        errors.append(caught.value)
    assert str(errors[0]) == str(errors[1])
    assert "in hooks" in str(errors[1].__cause__)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert len(paths[1].read_bytes().splitlines()) == 1 + len(many)


def logged(model: Any, number: int, log: Path) -> int:
    """Log the call to a file, and return the square of the number."""
    with log.open("a") as file:
        file.write(f"{number}\n")
    time.sleep(0.05)
    return number * number


def test_maps_can_be_given_up_and_interleaved(pool: fl.RayPool, tmp_path: Path) -> None:
    log = tmp_path / "log"
    given_up = pool.map(logged, [(i, log) for i in range(50)])
    assert next(given_up) == 0
    given_up.close()
    one, other = (pool.map(logged, [(i, log) for i in range(start, start + 4)]) for start in (0, 10))
    assert list(zip(one, other, strict=True)) == [(i * i, (i + 10) ** 2) for i in range(4)]
    assert len(log.read_text().splitlines()) < 20  # the first map started only the calls that may run ahead


# --- opening and closing ---


def test_more_workers_than_the_users_own_ray_has_room_for_are_refused(pool: fl.RayPool) -> None:
    with pytest.raises(ValueError, match=r"room for 2 of 5 worker\(s\) of 1 thread\(s\) each"):
        fl.RayPool("demo", workers=5)
    assert ray.is_initialized()


@pytest.mark.slow
def test_the_command_with_a_ray_of_its_own_writes_the_same_files(
    one_thread: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["split-softmax", "--device", "cpu", "--documents", "2", "--samples", "3", "--max-new-tokens", "4"]
    options += ["--tau", "0.1", "--k", "1", "--batch-tokens", "300", "--seed", "3"]
    assert main([*options, "--out", str(tmp_path / "one")]) == 0
    output = capsys.readouterr().out
    command = [sys.executable, "-m", "focuslens", *options, "--ray", "--ray-workers", "1", "--ray-threads", "1"]
    environment = {**os.environ, "TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "ray")], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    for name in ("split_softmax.jsonl", "split_softmax.json", "split_softmax.png"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "ray" / name).read_bytes(), name
    assert "\nRay: 1 worker(s) of 1 thread(s) each\n" in done.stderr
    assert done.stdout.splitlines()[:-1] == output.splitlines()[:-1]


def test_a_closed_pool_leaves_the_users_ray(pool: fl.RayPool) -> None:
    pool.close()
    assert ray.is_initialized()
