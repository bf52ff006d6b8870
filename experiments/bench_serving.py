"""Compare a folded and an exported checkpoint with the original in the time and peak memory of generation.

    python experiments/bench_serving.py --out runs/bench

Transformers runs all checkpoints without FocusLens. The original is the random model of ``bench.py``. The folded
checkpoint steers twenty heads of this model at the projection site, and the exported checkpoint steers them at the
rotary site. The original is also timed a second time, to measure the noise.

The checkpoints take turns, in a different order in each round, and a ratio compares two runs of one round. Noise of the
machine therefore affects all checkpoints. On a CPU, the processor time of the process is measured too, because other
processes affect it far less than they affect the wall time. Peak memory is measured in separate processes, by the
operating system on a CPU and by PyTorch on a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench import DTYPES, commit, in_order, output_of, peak_of, processor
from bench_contestants import HEADS
from bench_model import SEED, Bench, in_memory
from bench_page import rows_of
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM

import focuslens as fl
from focuslens.evaluation import Interval, percentile_interval
from focuslens.util.files import versions, write_atomically, write_json

ORIGINAL, AGAIN = "original", "original again"
BARS = {"folded": 1.0, "exported": 1.02}
"""Required ratio of each checkpoint's time to the original's time.

For the folded checkpoint, the measured ratio must be equal within noise. For the exported checkpoint, the required
ratio is a maximum.
"""
CONTESTANTS = (ORIGINAL, AGAIN, *BARS)


def make(folder: Path) -> None:
    """Write the original and the two steered checkpoints."""
    original = folder / ORIGINAL
    Bench(original).make_checkpoint()
    config = json.loads((original / "config.json").read_text())
    n_heads, n_layers = config["num_attention_heads"], config["num_hidden_layers"]
    heads = [fl.Head(i % n_layers, (i // n_layers + i) % n_heads) for i in range(HEADS)]
    size = (2, len(heads), config["hidden_size"] // n_heads)
    query, key = torch.randn(*size, generator=torch.Generator().manual_seed(SEED))
    fl.fold(original, fl.FocusSteering(fl.FocusDirections(heads, query, key, "projection"), 1.0), folder / "folded")
    fl.export(original, fl.FocusSteering(fl.FocusDirections(heads, query, None, "rotary"), 1.0), folder / "exported")


def generation(folder: Path, name: str, options: argparse.Namespace) -> Callable[[], torch.Tensor]:
    """Load a checkpoint, and return a function that greedily generates a fixed number of tokens."""
    directory = folder / (ORIGINAL if name == AGAIN else name)
    loading: Any = AutoModelForCausalLM
    model = loading.from_pretrained(
        directory, dtype=getattr(torch, options.dtype), attn_implementation=options.attention, trust_remote_code=True
    )
    model = in_memory(model.eval().to(options.device))
    tokens = Bench(folder / ORIGINAL, options.length).encoded().tokens[None].to(options.device)
    # Without an end token, all responses have the same length. Suppressing the end token would add work to every step.
    model.generation_config.eos_token_id = None
    settings = {"max_new_tokens": options.new_tokens, "do_sample": False}

    def run() -> torch.Tensor:
        with torch.no_grad():
            return model.generate(tokens, attention_mask=torch.ones_like(tokens), pad_token_id=0, **settings)

    return run


def seconds_of(run: Callable[[], Any], device: str) -> dict[str, float]:
    """Wall time of one call of ``run`` and, on a CPU, the processor time of this process."""
    wall, processing = time.perf_counter(), time.process_time()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
        return {"wall": time.perf_counter() - wall}
    return {"wall": time.perf_counter() - wall, "processor": time.process_time() - processing}


def time_rounds(
    runs: Mapping[str, Callable[[], Any]], options: argparse.Namespace
) -> dict[str, list[dict[str, float]]]:
    """Seconds of every contestant in every round after the warm-up."""
    taken: dict[str, list[dict[str, float]]] = {name: [] for name in runs}
    for number in tqdm(range(options.rounds + 1), desc="rounds", unit="round"):
        for name in in_order(list(runs), number):
            seconds = seconds_of(runs[name], options.device)
            if number:
                taken[name].append(seconds)
    return taken


def median_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> Interval:
    """Median ratio of two contestants' measurements, paired by round or process, with its bootstrap interval."""
    ratios = np.array([a / b for a, b in zip(numerators, denominators, strict=True)])
    drawn = np.random.default_rng(SEED).integers(len(ratios), size=(10_000, len(ratios)))
    return percentile_interval(float(np.median(ratios)), np.median(ratios[drawn], axis=1))


def peaks(folder: Path, options: argparse.Namespace) -> dict[str, list[dict[str, int]]]:
    """Peak memory of every contestant in separate processes. The contestants take turns."""
    memory: dict[str, list[dict[str, int]]] = {name: [] for name in CONTESTANTS}
    command = [sys.executable, __file__, "--checkpoints", str(folder), "--device", options.device]
    for name in ("dtype", "attention", "length", "new_tokens", "threads"):
        command += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    for number in tqdm(range(options.processes), desc="memory", unit="round"):
        for name in in_order(CONTESTANTS, number):
            memory[name].append(json.loads(output_of([*command, "--peak", name]).splitlines()[-1]))
    return memory


def results(
    options: argparse.Namespace,
    taken: Mapping[str, Sequence[Mapping[str, float]]],
    memory: Mapping[str, Sequence[Mapping[str, int]]],
    load: Sequence[float],
) -> dict[str, Any]:
    """All measurements, with the settings, the machine and the versions."""
    clocks = list(taken[ORIGINAL][0])
    seconds = {name: {clock: [times[clock] for times in rounds] for clock in clocks} for name, rounds in taken.items()}
    sizes = {name: [numbers["total_bytes"] for numbers in processes] for name, processes in memory.items()}
    left_out = ("out", "checkpoints", "peak")
    return {
        "settings": {name: value for name, value in vars(options).items() if name not in left_out},
        "bars": BARS,
        "contestants": {
            name: {
                "seconds": {clock: statistics.median(seconds[name][clock]) for clock in clocks},
                "ratio": {
                    clock: median_ratio(seconds[name][clock], seconds[ORIGINAL][clock]).to_dict() for clock in clocks
                },
                "rounds": seconds[name],
                "peak_bytes": statistics.median(sizes[name]),
                "peak_ratio": median_ratio(sizes[name], sizes[ORIGINAL]).to_dict(),
                "processes": memory[name],
            }
            for name in CONTESTANTS
        },
        "load average": {"before": list(load), "after": list(os.getloadavg())},
        "processor": processor(),
        "gpu": torch.cuda.get_device_name() if options.device == "cuda" else None,
        "commit": commit(),
        "versions": versions(),
    }


def table(measured: Mapping[str, Any]) -> str:
    """Markdown text with all measurements."""
    settings, contestants = measured["settings"], measured["contestants"]
    clocks = list(contestants[ORIGINAL]["seconds"])
    header = [
        "",
        *(f"{clock} time in seconds" for clock in clocks),
        *(f"ratio of {clock} time to original" for clock in clocks),
        "required ratio",
    ]
    header += ["peak memory in MiB", "ratio of peak memory to original"]
    body = [
        [
            name,
            *(f"{contestant['seconds'][clock]:.3f}" for clock in clocks),
            *(interval_text(contestant["ratio"][clock]) for clock in clocks),
            "-" if name not in BARS else f"{BARS[name]:.2f}",
            f"{contestant['peak_bytes'] / 2**20:.0f}",
            interval_text(contestant["peak_ratio"]),
        ]
        for name, contestant in contestants.items()
    ]
    lines = [
        f"Each checkpoint generates {settings['new_tokens']} greedy tokens after a prompt of {settings['length']:,} "
        f"tokens, with {settings['attention']} attention and {settings['dtype']} weights, on "
        f"{measured['gpu'] or measured['processor']} with {settings['threads']} threads. Each time is the median over "
        f"{settings['rounds']} rounds. Each peak memory is the median over {settings['processes']} processes. Each "
        "ratio is the median of the ratios of single rounds or processes. Brackets contain the 95 % bootstrap "
        "confidence interval of the ratio. For the folded checkpoint, the ratio of times must equal the required ratio "
        "within noise. For the exported checkpoint, the required ratio is a maximum.",
        "",
        *rows_of(header, body),
    ]
    return "\n".join(lines) + "\n"


def interval_text(ratio: Mapping[str, float]) -> str:
    return f"{ratio['mean']:.3f} [{ratio['low']:.3f}, {ratio['high']:.3f}]"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="folder for serving.json and serving.md")
    parser.add_argument("--rounds", type=int, default=15, help="timed rounds (default 15)")
    parser.add_argument("--processes", type=int, default=3, help="processes that memory is taken in (default 3)")
    parser.add_argument("--length", type=int, default=1024, help="prompt tokens (default 1024)")
    parser.add_argument("--new-tokens", type=int, default=32, help="of a response (default 32)")
    parser.add_argument("--device", choices=DTYPES, default="cpu")
    parser.add_argument("--dtype", help="of the weights; default: float32 on cpu, bfloat16 on cuda")
    parser.add_argument("--attention", default="sdpa", help="attention implementation (default sdpa)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--checkpoints", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--peak", choices=CONTESTANTS, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.dtype = options.dtype or DTYPES[options.device]
    if min(options.rounds, options.processes, options.new_tokens) < 1:
        parser.error("--rounds, --processes and --new-tokens are 1 or more")
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    if options.peak:
        print(json.dumps(peak_of(generation(options.checkpoints, options.peak, options), options.device)))
        return
    load = os.getloadavg()
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder))
        memory = peaks(Path(folder), options)
        taken = time_rounds({name: generation(Path(folder), name, options) for name in CONTESTANTS}, options)
    measured = results(options, taken, memory, load)
    write_json(options.out / "serving.json", measured)
    write_atomically(options.out / "serving.md", table(measured).encode())
    print(table(measured))


if __name__ == "__main__":
    main()
