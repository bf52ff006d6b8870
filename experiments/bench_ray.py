"""Compare the time of a sweep on two Ray workers, on one Ray worker, and in this process, with one core per model.

    python experiments/bench_ray.py --out runs/bench

The contestants take turns, in a different order in each round, and a ratio compares two runs of one round. Noise of the
machine therefore affects all contestants. All contestants must write the same bytes. Workers load their models before
the timing starts. The first round is a warm-up.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from bench import commit, in_order, processor
from tqdm.auto import tqdm

import focuslens as fl
from focuslens.model.execution import executor_for
from focuslens.util.files import versions, write_json

BAR = 1.7
"""Required ratio of the throughput of two workers to the throughput of one worker."""


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="directory for ray.json")
    parser.add_argument("--model", default="demo", help="directory, hub name or 'demo' (default)")
    parser.add_argument("--samples", type=int, default=48, help="default 48")
    parser.add_argument("--documents", type=int, default=20, help="of a prompt (default 20)")
    parser.add_argument("--new-tokens", type=int, default=16, help="of a response (default 16)")
    parser.add_argument("--batch-tokens", type=int, default=2048, help="prompt tokens run together (default 2048)")
    parser.add_argument("--rounds", type=int, default=5, help="default 5")
    return parser.parse_args(arguments)


@contextmanager
def contestants(model: str) -> Generator[dict[str, Any]]:
    """Context manager that yields three contestants: this process, one worker and two workers.

    Each model has one thread. Only one contestant runs at a time.
    """
    import ray

    torch.set_num_threads(1)
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0", "OMP_WAIT_POLICY": "PASSIVE"}
    ray.init(address="local", num_cpus=3, include_dashboard=False, log_to_driver=False, object_store_memory=2**28)
    settings: dict[str, Any] = {"gpus_per_worker": 0, "threads": 1, "device": "cpu"}
    try:
        with ExitStack() as stack:
            single, double = (stack.enter_context(fl.RayPool(model, workers=n, **settings)) for n in (1, 2))
            here = fl.FocusModel.demo(device="cpu") if model == "demo" else fl.FocusModel.from_pretrained(model)
            yield {"one process": here, "one worker": single, "two workers": double}
    finally:
        ray.shutdown()


def settings_of(model: Any) -> list[fl.Setting]:
    """Settings of the sweep: a baseline, and split-softmax on a quarter of the heads."""
    shape = executor_for(model).shape
    heads = [(layer, head) for layer in range(shape.n_layers) for head in range(0, shape.n_heads, 4)]
    return [fl.Setting("baseline"), *fl.split_softmax_settings(heads, [0.1], [len(heads)])]


def time_rounds(
    models: Mapping[str, Any], samples: Sequence[fl.MultiDocSample], options: argparse.Namespace
) -> dict[str, list[float]]:
    """Seconds of every contestant in every round after the warm-up.

    Raises:
        ValueError: If the contestants' records differ.
    """
    taken: dict[str, list[float]] = {name: [] for name in models}
    with tempfile.TemporaryDirectory() as folder:
        for number in tqdm(range(options.rounds + 1), desc="rounds", unit="round"):
            written: dict[str, bytes] = {}
            for name in in_order(list(models), number):
                path = Path(folder) / f"{number} {name}.jsonl"
                start = time.perf_counter()
                fl.run_sweep(
                    models[name],
                    samples,
                    settings_of(models[name]),
                    max_new_tokens=options.new_tokens,
                    batch_tokens=options.batch_tokens,
                    out=path,
                )
                if number:
                    taken[name].append(time.perf_counter() - start)
                written[name] = path.read_bytes()
            if len(set(written.values())) > 1:
                raise ValueError(f"the records of {', '.join(written)} differ in round {number}")
    return taken


def ratios(taken: Mapping[str, Sequence[float]], slower: str, faster: str) -> dict[str, Any]:
    """Time of the slower contestant divided by the faster contestant's time: per round, and the median over rounds."""
    rounds = [a / b for a, b in zip(taken[slower], taken[faster], strict=True)]
    return {"median": statistics.median(rounds), "rounds": rounds}


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    samples = fl.load_synthetic(
        options.samples, num_documents=options.documents, gold_positions=[options.documents // 2], split="test"
    )
    load_before = os.getloadavg()
    with contestants(options.model) as models:
        taken = time_rounds(models, list(samples), options)
    results = {
        "what": "throughput of a sweep; the records of all contestants are the same bytes",
        "options": {name: value for name, value in vars(options).items() if name != "out"},
        "seconds": {name: {"median": statistics.median(all_), "rounds": all_} for name, all_ in taken.items()},
        "two workers over one worker": {**ratios(taken, "one worker", "two workers"), "bar": BAR},
        "one worker over one process": ratios(taken, "one process", "one worker"),
        "load average": {"before": load_before, "after": os.getloadavg()},
        "processor": processor(),
        "commit": commit(),
        "versions": {**versions(), "ray": _ray_version()},
    }
    write_json(options.out / "ray.json", results)
    shown = ("two workers over one worker", "one worker over one process", "seconds", "load average")
    print(json.dumps({name: results[name] for name in shown}, indent=2))


def _ray_version() -> str:
    from importlib.metadata import version

    return version("ray")


if __name__ == "__main__":
    main()
