"""Compare the speed and memory of FocusLens with the plain model, the paper's procedure and TransformerLens.

    python experiments/bench.py --out runs/bench --docs docs

The contestants take turns, in a different order in each round. Noise of the machine therefore affects all contestants,
and no contestant always runs after the slowest one. A ratio is the median of the ratios within each round, because a
machine is not equally fast in all rounds. Peak memory is measured in separate processes, by the operating system on a
CPU and by PyTorch on a GPU. The memory in use before a run, including the loaded model, is subtracted.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from bench_contestants import CONTESTANTS as TASKS
from bench_contestants import WORK, PaperTraining, focus_training
from bench_families import FAMILIES, FAMILY_TITLES, family_bench
from bench_model import SHORTEST, Bench, Contestant
from bench_overhead import OVERHEAD, OVERHEAD_TITLES, SHORT_ROUNDS, overhead_bench
from bench_page import DEMO_BAR, TITLES, table, write
from bench_real import REAL, REAL_DOCUMENTS, REAL_TITLES, RealBench
from tqdm.auto import tqdm

from focuslens.directions import training_state
from focuslens.interventions import directions
from focuslens.util.files import versions, write_atomically
from focuslens.util.record_file import RecordFile

CONTESTANTS = {**TASKS, **OVERHEAD, **REAL, **FAMILIES}
LENGTHS = (1024, 4096, 16384, 32768)
DTYPES = {"cpu": "float32", "cuda": "bfloat16"}
FORMULA = "samples * (caching + heads * epochs * step)"


# --- time ---


def in_order(names: Sequence[str], number: int) -> list[str]:
    """Names in the order of round ``number``, by a Williams design.

    Over every ``2 * len(names)`` rounds, each name has every place equally often. Each name also directly follows every
    other name equally often.
    """
    n = len(names)
    places = [(i + 1) // 2 if i % 2 else -(i // 2) for i in range(n)]  # 0, 1, -1, 2, -2, ...
    if number // n % 2:
        places.reverse()
    return [names[(place + number) % n] for place in places]


def seconds_of(run: Callable[[], Any], device: str) -> float:
    """Wall time of one call of ``run``."""
    start = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def extrapolated(caching: float, step: float) -> float:
    """Seconds of the paper's whole training, computed by :data:`FORMULA` from the seconds of its parts."""
    return WORK["samples"] * (caching + WORK["heads"] * WORK["epochs"] * step)


def timed_work(contestant: Contestant, run: Any, device: str) -> dict[str, float]:
    """Seconds of one contestant's whole work, under the key ``whole``.

    The time of the paper's training is extrapolated from two timed parts, which are also in the result.
    """
    if not isinstance(run, PaperTraining):
        return {"whole": seconds_of(run, device) * contestant.times}
    caching = seconds_of(run.cache_activations, device)
    run.load()
    step = seconds_of(run.step, device)
    return {"whole": extrapolated(caching, step), "caching": caching, "step": step}


def time_work(bench: Bench, work: str, rounds: int) -> dict[str, dict[str, Any]]:
    """Measure the times of all contestants of one task in interleaved rounds, after one warm-up round."""
    contestants = {name: one for name, one in CONTESTANTS[work].items() if bench.device == "cuda" or not one.on_gpu}
    runs = {name: contestant.prepare(bench) for name, contestant in contestants.items()}
    taken: dict[str, list[dict[str, float]]] = {name: [] for name in runs}
    for number in tqdm(range(rounds + 1), desc=work, unit="round"):
        for name in in_order(list(runs), number):
            seconds = timed_work(contestants[name], runs[name], bench.device)
            if number:
                taken[name].append(seconds)
    first = [seconds["whole"] for seconds in taken[next(iter(contestants))]]
    return {name: timing(contestants[name], rounds_, first) for name, rounds_ in taken.items()}


def timing(contestant: Contestant, taken: Sequence[Mapping[str, float]], first: Sequence[float]) -> dict[str, Any]:
    """Summary of the times of one contestant. ``first`` are the first contestant's seconds in the same rounds."""
    seconds = [times["whole"] for times in taken]
    parts = {name: [times[name] for times in taken] for name in taken[0] if name != "whole"}
    return {
        "seconds": statistics.median(seconds),
        "ratio": statistics.median(own / other for own, other in zip(seconds, first, strict=True)),
        "rounds": seconds,
        "measured": contestant.part or "all of it",
        "times": contestant.times,
        **({"parts": parts, "formula": FORMULA} if parts else {}),
    }


@contextmanager
def one_thread() -> Generator[None]:
    """Run models in one thread in a ``with`` block."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def overhead(options: argparse.Namespace, device: str, dtype: str) -> dict[str, Any]:
    """Times of the tasks that are almost nothing but calls."""
    with tempfile.TemporaryDirectory() as folder, one_thread():
        bench = overhead_bench(Path(folder) / "model", device, dtype)
        bench.make_checkpoint()
        return {work: time_work(bench, work, SHORT_ROUNDS * options.rounds) for work in OVERHEAD_TITLES}


def families(options: argparse.Namespace, device: str, dtype: str) -> dict[str, Any]:
    """Times on random models of other families."""
    found: dict[str, Any] = {}
    for family in FAMILY_TITLES:
        with tempfile.TemporaryDirectory() as folder:
            bench = family_bench(family, Path(folder), options.length, device, dtype)
            found[family] = time_work(bench, family, options.rounds)
    return found


def real(options: argparse.Namespace, device: str, dtype: str) -> dict[str, Any] | str:
    """Times on the real model, and the tokens of the prompts; the reason in words if the model cannot be had."""
    found: dict[str, Any] = {}
    for documents, work in zip(REAL_DOCUMENTS, REAL_TITLES, strict=True):
        try:
            bench = RealBench.of(documents, device, dtype)
        except FileNotFoundError as error:
            return f"The real model could not be had: {error}"
        found[work] = {"tokens": len(bench.encoded().tokens), "time": time_work(bench, work, options.rounds)}
    return found


def demo_seconds() -> float:
    """Wall time of ``make demo`` after installation, in a new process without cached bytecode."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "focuslens", "demo", "--out", str(Path(folder) / "demo")]
        start = time.perf_counter()
        output_of(command, PYTHONPYCACHEPREFIX=str(Path(folder) / "modules"))
        return time.perf_counter() - start


def output_of(command: Sequence[str], **environment: str) -> str:
    """Standard output of a command.

    Raises:
        RuntimeError: If the command fails.
    """
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **environment})
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed with status {done.returncode}:\n{done.stderr[-2000:]}")
    return done.stdout


# --- memory and disk ---


def _status(field: str) -> int:
    """Memory of this process in bytes: the current value for ``VmRSS``, the peak for ``VmHWM``."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def _give_back_memory() -> None:
    """Return freed memory to the operating system, so that it is not counted as memory of the model."""
    gc.collect()
    with suppress(OSError, AttributeError):  # only glibc has malloc_trim
        ctypes.CDLL(None).malloc_trim(0)


def peak_here(bench: Bench, work: str, name: str) -> dict[str, int]:
    """Peak memory of one contestant, measured in this process; see :func:`peak_of`."""
    return peak_of(CONTESTANTS[work][name].prepare(bench), bench.device)


def peak_of(run: Callable[[], Any], device: str) -> dict[str, int]:
    """Peak memory of one call of ``run``, in bytes.

    ``total_bytes`` is the peak. ``bytes`` is the peak minus the memory in use before the call.
    """
    _give_back_memory()
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        total = torch.cuda.max_memory_allocated()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak, which loading the model raised
        before = _status("VmRSS")
        run()
        total = _status("VmHWM")
    return {"bytes": total - before, "total_bytes": total}


def peak(options: argparse.Namespace, bench: Bench, work: str, name: str, processes: int) -> dict[str, Any]:
    """Median peak memory over separate processes, and the measurements of each process."""
    command = [sys.executable, __file__, "--peak", work, name, "--checkpoint", str(bench.directory)]
    command += ["--length", str(bench.length), "--device", bench.device, "--dtype", bench.dtype]
    command += ["--threads", str(options.threads)]
    measurements: list[dict[str, float]] = []
    for _ in range(processes):
        start = time.perf_counter()
        measured = json.loads(output_of(command).splitlines()[-1])
        measurements.append({**measured, "process_seconds": time.perf_counter() - start})
    medians = {key: statistics.median(numbers[key] for numbers in measurements) for key in ("bytes", "total_bytes")}
    return {**medians, "processes": measurements}


def slope(points: Mapping[int, float]) -> float:
    """Least-squares slope of log memory against log length."""
    xs, ys = [math.log(length) for length in points], [math.log(size) for size in points.values()]
    x, y = statistics.mean(xs), statistics.mean(ys)
    return sum((a - x) * (b - y) for a, b in zip(xs, ys, strict=True)) / sum((a - x) ** 2 for a in xs)


def by_length(options: argparse.Namespace, bench: Bench, name: str) -> dict[str, Any]:
    """Peak memory of scoring at each prompt length, from one process per length, and the memory's :func:`slope`."""
    peaks: dict[int, dict[str, Any]] = {}
    for length in tqdm(options.lengths, desc=f"lengths, {name}", unit="process"):
        long = Bench(bench.directory, length, bench.device, bench.dtype)
        peaks[length] = peak(options, long, "score", name, 1)
    return {"slope": slope({length: numbers["bytes"] for length, numbers in peaks.items()}), "lengths": peaks}


@contextmanager
def counted_writes() -> Generator[dict[str, list[int]]]:
    """Context manager that yields, for each file name, the sizes of all writes while directions are trained and saved.

    Writes that are later overwritten count too.
    """
    sizes: dict[str, list[int]] = defaultdict(list)

    def counted(path: str | Path, content: bytes) -> None:
        sizes[Path(path).name].append(len(content))
        write_atomically(path, content)

    def counted_records(file: RecordFile, path: Path, entries: Sequence[dict[str, Any]]) -> None:
        before = path.stat().st_size if path.exists() else 0
        write_records(file, path, entries)
        sizes[path.name].append(path.stat().st_size - before)

    write_records = RecordFile.write
    with (
        patch.object(training_state, "write_atomically", counted),
        patch.object(directions, "write_atomically", counted),
        patch.object(RecordFile, "write", counted_records),
    ):
        yield sizes


def written_bytes(bench: Bench) -> dict[str, Any]:
    """Bytes that the whole training writes to disk with ``focuslens train`` and with the paper's procedure.

    The checkpoint of FocusLens contains no activations and is written once per epoch, or once a minute. The responses
    that the directions are trained on are written once.
    """
    with tempfile.TemporaryDirectory() as folder, counted_writes() as writes:
        focus_training("hooked", checkpoint=Path(folder) / "checkpoint.pt")(bench)().save(folder)
    return {
        "FocusLens": sum(sum(sizes) for sizes in writes.values()),
        "the paper's procedure": WORK["samples"] * PaperTraining(bench).cache_activations(),
        "writes of FocusLens": dict(writes),
    }


def measure(options: argparse.Namespace, bench: Bench) -> dict[str, Any]:
    """Run all measurements on one device."""
    times = {work: time_work(bench, work, options.rounds) for work in TITLES}
    memory = {
        name: peak(options, bench, "score", name, options.processes)
        for name in tqdm(CONTESTANTS["score"], desc="memory", unit="contestant")
    }
    focuslens = ("FocusLens, HookedTransformer", "FocusLens, TransformerBridge")
    lengths = {name: by_length(options, bench, name) for name in focuslens}
    return {
        "time": times,
        "overhead": overhead(options, bench.device, bench.dtype),
        "families": families(options, bench.device, bench.dtype),
        "real": real(options, bench.device, bench.dtype),
        "memory": memory,
        "length": lengths,
        "written": written_bytes(bench),
    }


# --- output ---


def processor() -> str:
    """Name of the processor."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def commit() -> dict[str, Any] | None:
    """Current commit, and whether the working tree is clean; ``None`` outside a repository."""

    def git(*arguments: str) -> str:
        return output_of(["git", "-C", str(Path(__file__).parent), *arguments])

    try:
        return {"id": git("rev-parse", "HEAD").strip(), "clean": not git("status", "--porcelain").strip()}
    except (OSError, RuntimeError):
        return None


def description(options: argparse.Namespace, directory: Path) -> dict[str, Any]:
    """Description of the measurement: settings, model, machine and versions."""
    left_out = ("out", "docs", "checkpoint", "peak", "device", "dtype")
    settings = {name: value for name, value in vars(options).items() if name not in left_out}
    return {
        "settings": {**settings, "short_rounds": SHORT_ROUNDS * options.rounds, **WORK},
        "model": json.loads((directory / "config.json").read_text()),
        "processor": processor(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": versions(),
        "commit": commit(),
    }


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="folder for bench.json, .md and .png")
    parser.add_argument("--docs", type=Path, help="a second folder for the same files, e.g. docs")
    parser.add_argument(
        "--rounds",
        type=int,
        default=5,
        help="timed rounds (default 5); three times as many for the tasks of the model with 28 layers",
    )
    parser.add_argument("--processes", type=int, default=3, help="processes that memory is the median of (default 3)")
    parser.add_argument("--length", type=int, default=3072, help="prompt tokens (default 3072)")
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS), help="lengths that memory is taken at")
    parser.add_argument("--device", choices=DTYPES, help="run on this device only; default: cpu, and cuda if available")
    parser.add_argument("--dtype", help="of the weights; default: float32 on cpu, bfloat16 on cuda")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--checkpoint", type=Path, help="new or empty folder for the random model; default: a temporary folder"
    )
    parser.add_argument("--peak", nargs=2, metavar=("WORK", "NAME"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if min(options.length, *options.lengths) < SHORTEST or len(set(options.lengths)) < 2:
        parser.error(f"--length and --lengths are {SHORTEST} tokens or more, and --lengths at least two different ones")
    if min(options.rounds, options.processes) < 1:
        parser.error("--rounds and --processes are 1 or more")
    return options


def run_all(options: argparse.Namespace, directory: Path) -> dict[str, Any]:
    """Write a random model to ``directory``, and run all measurements with this model on every device."""
    Bench(directory).make_checkpoint()
    results = description(options, directory)
    results["demo"] = {"seconds": demo_seconds(), "bar": DEMO_BAR}
    results["results"] = {}
    chosen = [options.device] if options.device else ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    for device in chosen:
        dtype = options.dtype or DTYPES[device]
        results["results"][f"{device}, {dtype}"] = measure(options, Bench(directory, options.length, device, dtype))
    return results


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    if options.peak:
        dtype = options.dtype or DTYPES[options.device]
        print(json.dumps(peak_here(Bench(options.checkpoint, options.length, options.device, dtype), *options.peak)))
        return
    try:
        with tempfile.TemporaryDirectory() as folder:
            results = run_all(options, options.checkpoint or Path(folder))
    except FileExistsError as error:
        raise SystemExit(f"bench.py: {error}") from None
    for folder in (options.out, options.docs):
        if folder is not None:
            write(results, folder)
    print(table(results))


if __name__ == "__main__":
    main()
