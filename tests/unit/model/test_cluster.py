"""Parts of a Ray pool that do not need Ray: the division of machines among workers, and calls sent to a worker."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Callable, Generator, Iterable
from typing import Any

import pytest
import torch

import focuslens as fl
from focuslens.cli.main import main
from focuslens.model.batching import map_batches
from focuslens.model.cluster import ray_pool
from focuslens.model.cluster.placement import Shares, share_out
from focuslens.model.cluster.worker import Failure, Worker, WorkerInfo, unpack
from focuslens.model.cluster.worker_pool import mismatch
from focuslens.model.execution import executor_for
from tests.support.batches import in_batches

HEADS = [(2, 3), (0, 1), (2, 0), (2, 2)]

# --- machines ---

CARDS = {"CPU": 16.0, "GPU": 4.0}


@pytest.mark.parametrize(
    ("machines", "asked", "expected"),
    [
        ([{"CPU": 2.0}], {}, (1, 0, 2)),
        ([{"CPU": 2.0}], {"workers": 2}, (2, 0, 1)),
        ([{"CPU": 8.0}, {"CPU": 8.0}], {}, (2, 0, 8)),
        ([{"CPU": 8.0}, {"CPU": 3.0}], {}, (2, 0, 3)),
        ([{"CPU": 8.0}, {"CPU": 8.0}], {"workers": 5}, (5, 0, 2)),
        ([{"CPU": 8.0}], {"workers": 3, "threads": 1}, (3, 0, 1)),
        ([CARDS, CARDS], {}, (8, 1, 4)),
        ([CARDS, {"CPU": 64.0}], {}, (4, 1, 4)),
        ([CARDS, CARDS], {"gpus_per_worker": 2}, (4, 2, 8)),
        ([CARDS], {"gpus_per_worker": 0.1}, (40, 0.1, 1)),
        ([CARDS], {"gpus_per_worker": 3}, (1, 3, 16)),
        ([CARDS], {"device": "cpu"}, (1, 0, 16)),
        ([CARDS], {"gpus_per_worker": 0, "workers": 4}, (4, 0, 4)),
        ([{"CPU": 4.0}], {"workers": 9, "gpus_per_worker": 1, "grows": True}, (9, 1, 1)),
    ],
)
def test_machines_are_shared_out(machines: Any, asked: dict[str, Any], expected: tuple[int, float, int]) -> None:
    assert share_out(machines, **asked) == Shares(*expected)


@pytest.mark.parametrize(
    ("machines", "asked", "message"),
    [
        (
            [{"CPU": 2.0}],
            {"workers": 3},
            r"room for 2 of 3 worker\(s\) of 1 thread\(s\) each \(CPUs of the machines: 2; GPUs: 0\)",
        ),
        ([{"CPU": 2.0}], {"workers": 2, "threads": 2}, r"room for 1 of 2 worker\(s\) of 2 thread"),
        ([CARDS], {"workers": 5}, r"room for 4 of 5 worker\(s\) of 1 GPU\(s\), 4 thread\(s\) each"),
        ([CARDS], {"gpus_per_worker": 8}, r"no worker fits: each needs 8 GPU\(s\), and the machines have 4"),
        ([{"CPU": 2.0}], {"gpus_per_worker": 1, "grows": True}, "no worker fits"),
        ([], {}, "the cluster has no CPUs"),
        ([CARDS], {"workers": 0}, "workers is 0; it must be at least 1"),
        ([CARDS], {"threads": -1}, "threads is -1"),
        ([CARDS], {"gpus_per_worker": 1.5}, "gpus_per_worker is 1.5; it must be a whole number, or a fraction below 1"),
        ([CARDS], {"gpus_per_worker": -1}, "gpus_per_worker is -1"),
        ([CARDS], {"gpus_per_worker": 1, "device": "cpu"}, "gpus_per_worker is 1, but the device is 'cpu'"),
    ],
)
def test_more_than_the_machines_have_is_refused(machines: Any, asked: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        share_out(machines, **asked)


# --- without Ray ---


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)


@pytest.mark.usefixtures("no_ray")
def test_without_ray_an_error_says_what_to_install(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ImportError, match=r"'ray' is missing: pip install 'focuslens\[ray\]'"):
        fl.RayPool("demo")
    assert main(["heads", "--ray"]) == 1
    assert "pip install 'focuslens[ray]'" in capsys.readouterr().err


def test_options_of_the_cluster_need_a_cluster(capsys: pytest.CaptureFixture[str]) -> None:
    for option in ("--ray-workers", "--ray-gpus-per-worker", "--ray-threads"):
        assert main(["heads", "--model", "no/such/directory", option, "2"]) == 1
        assert f"{option} 2 needs --ray" in capsys.readouterr().err


def test_a_worker_opens_the_model_in_any_directory_and_on_no_gpu_but_its_own(
    checkpoint: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = checkpoint("llama")
    monkeypatch.chdir(directory.parent)
    on_cpu, on_gpu = Shares(1, 0, 1), Shares(1, 1, 1)
    assert ray_pool._loader(directory.name, on_cpu, {}).args == (str(directory), {"device": "cpu"})
    assert ray_pool._loader("user/name", on_gpu, {"dtype": "float16"}).args == ("user/name", {"dtype": "float16"})
    for given in ({"device": "cuda"}, {"device_map": "auto"}):
        assert ray_pool._loader("user/name", on_cpu, given).args == ("user/name", given)
    assert ray_pool._loader("demo", on_cpu, {})().name == "demo"
    assert ray_pool._loader(fl.FocusModel.demo, on_cpu, {"device": "cpu"})().name == "demo"


# --- calls sent to a worker ---


class Sent:
    """An executor with its worker in this process. Functions, arguments and results are pickled and unpickled."""

    def __init__(self, model: fl.FocusModel) -> None:
        self.name, self.description, self.shape = model.name, model.description, model.shape
        self.tokenizer, self.device, self.encode = model.tokenizer, torch.device("cpu"), model.encode
        self._worker = Worker(torch.get_num_threads())
        assert isinstance(self._worker.open(lambda: model), WorkerInfo)

    def map(self, function: Callable[..., Any], calls: Iterable[tuple[Any, ...]]) -> Generator[Any]:
        for call in calls:
            failure, content = self._worker.run(*pickle.loads(pickle.dumps((function, call))))
            if failure is not None:
                raise failure.error
            yield unpack(content, self.device)


@pytest.mark.parametrize("name", ["qwen3", "mistral_window"])
@pytest.mark.parametrize("site", ["rotary", "projection"])
def test_directions_trained_away_from_the_model_are_the_same(
    load_model: Any, backend: str, name: str, site: Any, samples: list[fl.MultiDocSample]
) -> None:
    pytest.importorskip("ray")
    model = load_model(name, backend)
    settings: dict[str, Any] = {"site": site, "epochs": 2, "batch_size": 2, "max_new_tokens": 3}
    here, sent = (fl.train_focus_directions(executor, samples, HEADS, **settings) for executor in (model, Sent(model)))
    assert here.digest == sent.digest
    assert here.provenance == sent.provenance


def test_tables_that_depend_on_the_length_cannot_be_recorded(
    load_model: Any, samples: list[fl.MultiDocSample], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray")
    model = load_model("llama")
    rotary = model.backend.rotary

    def scaled(layer: int, length: int) -> Any:
        tables = rotary(layer, length)
        return type(tables)(tables.cos * (1 + 1e-6 * length), tables.sin, tables.adjacent_pairs, None, None)

    monkeypatch.setattr(model.backend, "rotary", scaled)
    with pytest.raises(ValueError, match="depends on how long a sequence is"):
        fl.train_focus_directions(Sent(model), samples, HEADS, site="projection", epochs=1, max_new_tokens=2)
    fl.train_focus_directions(Sent(model), samples, HEADS, site="rotary", epochs=1, max_new_tokens=2)


def picky(model: Any, items: list[int], budget: int) -> tuple[list[int], int]:
    """Return the batch, or raise an out-of-memory error if it has more than 28 tokens."""
    if sum(items) > 28:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")
    return items, budget


def test_running_out_of_memory_on_a_worker_makes_the_same_batches_as_in_this_process(load_model: Any) -> None:
    pytest.importorskip("ray")
    lengths = [10, 12, 8, 20, 9, 11, 25, 10]

    def run(executor: Any) -> list[Any]:
        with pytest.warns(UserWarning, match="memory ran out") as caught:
            result = list(map_batches(executor, picky, lengths, [""] * 8, lengths, 100, divisible=True))
        return [result, [str(warning.message) for warning in caught]]

    with pytest.warns(UserWarning, match="memory ran out"):
        expected = list(
            in_batches(lengths, 100, lambda batch, now: picky(None, [lengths[i] for i in batch], now), divisible=True)
        )
    model = load_model("llama")
    here, sent = run(model), run(Sent(model))
    assert here[0] == sent[0] == expected
    assert here[1] == sent[1]
    assert [(len(items), budget) for _, (items, budget) in expected][:2] == [(3, 36), (1, 18)]
    with pytest.raises(MemoryError, match=r"single prompt of 60 tokens \(CUDA out of memory. Tried to allocate\)"):
        list(map_batches(Sent(load_model("llama")), picky, [60], ["x"], [60], 100))


class TwoArguments(ValueError):
    """An exception that cannot be unpickled."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} and {two}")


def test_errors_are_sent_as_they_are_or_by_name(load_model: Any) -> None:
    pytest.importorskip("ray")
    worker = Worker(torch.get_num_threads())

    def missing() -> Any:
        raise FileNotFoundError("there is no directory '/x'")

    failed = worker.open(missing)
    assert isinstance(failed, Failure)
    assert isinstance(failed.error, FileNotFoundError)
    assert "in missing" in failed.traceback

    def bad(model: Any) -> None:
        raise TwoArguments(1, 2)

    failure, content = worker.run(bad, ())
    assert failure is not None
    assert (type(failure.error), str(failure.error), content) == (RuntimeError, "TwoArguments: 1 and 2", b"")


def test_a_worker_with_another_model_or_other_versions_is_told_from_the_first(load_model: Any) -> None:
    model = load_model("llama")

    def info(**changed: Any) -> WorkerInfo:
        versions = {"python": "3.12.1", "torch": "2.13.0", "focuslens": "1", **changed.pop("versions", {})}
        description = {"name": "m", "weights": "abc", "device": "cuda", **changed}
        return WorkerInfo("m", description, model.shape, model.encoder, versions, "node7, process 5")

    def message(worker: WorkerInfo, first: WorkerInfo | None) -> str:
        return str(mismatch(worker, {"python": "3.12.9", "torch": "2.13.0", "focuslens": "1"}, first))

    assert message(info(), None) == message(info(), info()) == "None"
    assert "the version of torch is '2.6.0' on node7, process 5, and '2.13.0' elsewhere" in message(
        info(versions={"torch": "2.6.0"}), None
    )
    assert "the weights is 'abd' on node7" in message(info(weights="abd"), info())
    assert "the device is 'cpu' on node7" in message(info(device="cpu"), info())


def test_the_model_itself_is_the_default_executor(load_model: Any) -> None:
    model = load_model("llama")
    executor = executor_for(model)
    assert isinstance(executor, fl.Executor)
    assert executor is model
    assert fl.InProcess(model) is model
    assert executor_for(executor) is executor
    assert (executor.name, executor.description, executor.shape) == (model.name, model.description, model.shape)
    assert (executor.tokenizer, executor.device) == (model.tokenizer, torch.device("cpu"))
    ran: list[int] = []
    results = executor.map(lambda given, i: (given, ran.append(i), i), [(1,), (2,)])
    assert ran == []
    assert next(results) == (model, None, 1)
    assert ran == [1]
