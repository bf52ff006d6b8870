"""Times FocusLens beside the plain model, the paper's procedure and plain TransformerLens, and prints ratios.

    python experiments/bench.py --out runs/bench

Contestants run in turn, so that a noisy machine is noisy to all; medians of the rounds are compared. Peak memory is the
operating system's, of a process of its own for each contestant, above what the process had with the model loaded.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench_contestants import CONTESTANTS, EPOCHS, HEADS, N_SETTINGS, SAMPLES, Bench, Contestant, PaperTraining
from tqdm.auto import tqdm

from focuslens.files import versions, write_atomically, write_json

TITLES = {
    "score": "Generate 16 tokens and score all heads",
    "sweep": f"{N_SETTINGS} split-softmax settings on one sample",
    "train": f"Train {HEADS} heads, {SAMPLES} samples, {EPOCHS} epochs",
    "steer": "Generate 16 tokens steered at the rotary site",
}
LENGTHS = (1024, 4096, 16384, 32768)


def seconds_of(run: Callable[[], Any], device: str) -> float:
    """Wall time of one run."""
    start = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def timed_work(contestant: Contestant, run: Any, device: str) -> float:
    """Seconds for the whole work; the paper's training is put together from its parts."""
    if not isinstance(run, PaperTraining):
        return seconds_of(run, device) * contestant.times
    caching, step = seconds_of(run.cache_activations, device), seconds_of(run.step, device)
    return SAMPLES * (caching + HEADS * EPOCHS * step)


def time_work(bench: Bench, work: str, rounds: int) -> dict[str, dict[str, Any]]:
    """Medians of interleaved rounds; one round before them warms up."""
    contestants = CONTESTANTS[work]
    runs = {name: one.prepare(bench) for name, one in contestants.items()}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in tqdm(range(rounds + 1), desc=work, unit="round"):
        for name, run in runs.items():
            taken = timed_work(contestants[name], run, bench.device)
            if number:
                seconds[name].append(taken)
    floor = statistics.median(seconds[next(iter(contestants))])
    return {
        name: {
            "seconds": statistics.median(all_),
            "spread": [min(all_), max(all_)],
            "ratio": statistics.median(all_) / floor,
            "measured": contestants[name].part or "all of it",
        }
        for name, all_ in seconds.items()
    }


def _status(field: str) -> int:
    """Memory of this process in bytes: ``VmRSS`` now, ``VmHWM`` at its peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def peak_here(bench: Bench, work: str, name: str) -> int:
    """Bytes that one run takes at its peak, above what there was before it."""
    run = CONTESTANTS[work][name].prepare(bench)
    if bench.device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of loading
    before = _status("VmRSS")
    run()
    return _status("VmHWM") - before


def peak(options: argparse.Namespace, bench: Bench, work: str, name: str) -> dict[str, float]:
    """The same in a process of its own, and its wall time."""
    command = [sys.executable, __file__, "--peak", work, name, "--checkpoint", str(bench.directory)]
    command += ["--length", str(bench.length), "--device", bench.device, "--dtype", bench.dtype]
    command += ["--threads", str(options.threads)]
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{name} failed at {bench.length} tokens:\n{done.stderr[-2000:]}")
    return {"bytes": json.loads(done.stdout.splitlines()[-1]), "process_seconds": time.perf_counter() - start}


def slope(points: dict[int, float]) -> float:
    """Least-squares slope of the logarithm of memory over that of length."""
    xs, ys = [math.log(length) for length in points], [math.log(size) for size in points.values()]
    x, y = statistics.mean(xs), statistics.mean(ys)
    return sum((a - x) * (b - y) for a, b in zip(xs, ys, strict=True)) / sum((a - x) ** 2 for a in xs)


def written_bytes(bench: Bench) -> dict[str, float]:
    """Bytes that training 100 samples writes to disk."""
    trained = CONTESTANTS["train"]["FocusLens, HookedTransformer"].prepare(bench)()
    with tempfile.TemporaryDirectory() as folder:
        trained.save(Path(folder) / "directions")
        ours = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
    return {"FocusLens": ours, "the paper's procedure": SAMPLES * PaperTraining(bench).cache_activations()}


def run_all(options: argparse.Namespace, bench: Bench) -> dict[str, Any]:
    """Everything that is measured."""
    results: dict[str, Any] = {"time": {}, "memory": {}, "length": {}}
    for work in TITLES:
        results["time"][work] = time_work(bench, work, options.rounds)
    for name in tqdm(CONTESTANTS["score"], desc="memory", unit="process"):
        results["memory"][name] = peak(options, bench, "score", name)
    for name in ("FocusLens, HookedTransformer", "FocusLens, TransformerBridge"):
        sizes: dict[int, float] = {}
        for length in tqdm(options.lengths, desc=f"lengths, {name}", unit="process"):
            long = Bench(bench.directory, length, bench.device, bench.dtype)
            results["length"].setdefault(name, {})[length] = found = peak(options, long, "score", name)
            sizes[length] = found["bytes"]
        results["length"][name]["slope"] = slope(sizes)
    results["written"] = written_bytes(bench)
    return results


def table(results: dict[str, Any], length: int, device: str) -> str:
    """Markdown of what was measured."""
    lines = [f"Prompts of {length:,} tokens, {device}; medians of interleaved rounds.", ""]
    for work, rows in results["time"].items():
        floor = next(iter(rows))
        lines += [f"**{TITLES[work]}**", "", f"| | seconds | over {floor} |", "|---|---|---|"]
        lines += [f"| {name} | {row['seconds']:.2f} | {row['ratio']:.2f} |" for name, row in rows.items()]
        lines.append("")
    least = next(iter(results["memory"].values()))["bytes"]
    lines += ["**Peak memory of the first, above the loaded model**", "", "| | MiB | over the first |", "|---|---|---|"]
    lines += [
        f"| {name} | {row['bytes'] / 2**20:.0f} | {row['bytes'] / least:.2f} |"
        for name, row in results["memory"].items()
    ]
    lengths = [length for length in next(iter(results["length"].values())) if length != "slope"]
    lines += ["", "**Peak memory by length, MiB**", "", f"| | {' | '.join(f'{n:,}' for n in lengths)} | slope |"]
    lines.append("|---" * (len(lengths) + 2) + "|")
    for name, row in results["length"].items():
        sizes = " | ".join(f"{row[n]['bytes'] / 2**20:.0f}" for n in lengths)
        lines.append(f"| {name} | {sizes} | {row['slope']:.2f} |")
    ours, theirs = results["written"].values()
    lines += ["", f"Training writes {ours / 2**20:.2f} MiB; the paper's procedure {theirs / 2**20:,.0f} MiB."]
    return "\n".join(lines) + "\n"


def draw(results: dict[str, Any], path: Path) -> None:
    """Ratios of every work as bars, on a logarithmic axis."""
    import matplotlib.pyplot as plt

    from focuslens.viz import save_figure

    figure, all_axes = plt.subplots(len(TITLES), 1, figsize=(8, 8), layout="constrained")
    for axes, (work, rows) in zip(all_axes, results["time"].items(), strict=True):
        names, ratios = list(rows), [row["ratio"] for row in rows.values()]
        bars = axes.barh(names[::-1], ratios[::-1], color="#0072B2")
        axes.bar_label(bars, fmt="%.2f", padding=3, fontsize=8)
        # From one half on whatever the ratios are: limits drawn tight would make 1.02 look like a multiple of 1.
        limits = (0.5, max(4.0, 3 * max(ratios)))
        axes.set(xscale="log", xlim=limits, title=TITLES[work], xlabel=f"time over that of {names[0]}")
    save_figure(all_axes[0], path)
    plt.close(figure)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="folder for bench.json, .md and .png")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds (default 5)")
    parser.add_argument("--length", type=int, default=3072, help="prompt tokens (default 3072)")
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS), help="lengths that memory is taken at")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16" if torch.cuda.is_available() else "float32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--checkpoint", type=Path, help="folder of the random checkpoint; a temporary one by default")
    parser.add_argument("--peak", nargs=2, metavar=("WORK", "NAME"), help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    if options.peak:
        bench = Bench(options.checkpoint, options.length, options.device, options.dtype)
        print(peak_here(bench, *options.peak))
        return
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(options.checkpoint or Path(folder), options.length, options.device, options.dtype)
        bench.make_checkpoint()
        results = run_all(options, bench)
    settings = {name: value for name, value in vars(options).items() if name not in ("out", "checkpoint", "peak")}
    written = table(results, options.length, options.device)
    write_json(options.out / "bench.json", {"settings": settings, "versions": versions(), **results})
    write_atomically(options.out / "bench.md", written.encode())
    draw(results, options.out / "bench.png")
    print(written)


if __name__ == "__main__":
    main()
