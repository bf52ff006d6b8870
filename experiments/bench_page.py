"""The page and the picture of ``bench.py``: tables of what was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench_contestants import WORK
from bench_families import FAMILY_TITLES
from bench_overhead import OVERHEAD_TITLES
from bench_real import REAL_TITLES, real_rates

from focuslens.util.files import write_atomically, write_json

__all__ = ["DEMO_BAR", "MARKER", "TITLES", "rows_of", "shared_tables", "table", "write"]

TITLES = {
    "score": f"Generate {WORK['new_tokens']} tokens and score all heads",
    "sweep": f"Run {WORK['sweep_settings']} split-softmax settings on one sample",
    "train": f"Train the directions of {WORK['heads']} heads on {WORK['samples']} samples for {WORK['epochs']} epochs",
    "steer": f"Generate {WORK['new_tokens']} tokens with a HookedTransformer, steered or not",
    "steer_bridge": f"Generate {WORK['new_tokens']} tokens with a TransformerBridge, steered or not",
}
MEMORY_BAR, DEMO_BAR = 24 * 2**30, 90
"""Upper limits for results: bytes of peak memory at every prompt length, and seconds of the demo."""
MARKER = "<!-- `make bench` writes the rest of this page -->\n\n"
"""Last line of the introduction in ``bench.md``. This script does not generate the introduction."""


def rows_of(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table."""
    return [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows)]


def shared_tables(measured: Mapping[str, Any]) -> list[str]:
    """Markdown tables of all times, and of the peak memory of scoring."""
    lines: list[str] = []
    for work, rows in measured["time"].items():
        lines += times_table(TITLES[work], rows)
    memory = measured["memory"]
    least = next(iter(memory.values()))["bytes"]
    body = [[name, f"{row['bytes'] / 2**20:.0f}", f"{row['bytes'] / least:.2f}"] for name, row in memory.items()]
    header = ["", "MiB", f"ratio to {next(iter(memory))}"]
    caption = "**Peak memory of generation and scoring, above the memory of the loaded model**"
    return [*lines, caption, "", *rows_of(header, body), ""]


def times_table(title: str, rows: Mapping[str, Any], digits: int = 2) -> list[str]:
    """Markdown table of the times of one task."""
    header = ["", "seconds", f"ratio to {next(iter(rows))}", "timed part"]
    body = [
        [name, f"{row['seconds']:.{digits}f}", f"{row['ratio']:.2f}", row["measured"]] for name, row in rows.items()
    ]
    return [f"**{title}**", "", *rows_of(header, body), ""]


def decoding_tables(measured: Mapping[str, Any]) -> list[str]:
    """Markdown tables of the tasks that are almost nothing but calls, and of the real model."""
    lines: list[str] = []
    for work, rows in measured["overhead"].items():
        lines += times_table(f"{OVERHEAD_TITLES[work]}, with 28 layers of d_model 64", rows, 3)
    if isinstance(measured["real"], str):
        return [*lines, measured["real"], ""]
    for work, found in measured["real"].items():
        lines += times_table(f"{REAL_TITLES[work]}, {found['tokens']:,} prompt tokens", found["time"])
        caption = f"**Tokens per second, {found['tokens']:,} prompt tokens**"
        body = real_rates(found["time"], found["tokens"])
        lines += [caption, "", *rows_of(["", "prompt", "answer"], body), ""]
    return lines


def family_tables(measured: Mapping[str, Any]) -> list[str]:
    """Markdown tables of the tasks on random models of other families."""
    return [
        line
        for family, rows in measured.get("families", {}).items()
        for line in times_table(FAMILY_TITLES[family], rows)
    ]


def device_tables(measured: Mapping[str, Any]) -> list[str]:
    """Markdown tables of all measurements on one device."""
    lines = [*shared_tables(measured), *family_tables(measured), *decoding_tables(measured)]
    lengths = list(next(iter(measured["length"].values()))["lengths"])
    header = ["", *(f"{length:,}" for length in lengths)]
    above = [
        [name, *(f"{row['lengths'][n]['bytes'] / 2**20:.0f}" for n in lengths), f"{row['slope']:.2f}"]
        for name, row in measured["length"].items()
    ]
    caption = "Peak memory of generation and scoring by prompt length"
    lines += [f"**{caption}, in MiB above the memory of the loaded model**", ""]
    lines += [*rows_of([*header, "slope"], above), ""]
    total = [
        [name, *(f"{row['lengths'][n]['total_bytes'] / 2**30:.2f}" for n in lengths)]
        for name, row in measured["length"].items()
    ]
    lines += [f"**{caption}, in GiB including the loaded model (limit: {MEMORY_BAR / 2**30:.0f} GiB)**", ""]
    lines += [*rows_of(header, total), ""]
    focuslens, paper = (measured["written"][name] / 2**20 for name in ("FocusLens", "the paper's procedure"))
    lines += ["**Data that the training writes to disk, first with FocusLens and then with the paper's procedure**", ""]
    return [*lines, f"Training writes {focuslens:.2f} MiB; the paper's procedure {paper:,.0f} MiB."]


def _rounds(settings: Mapping[str, Any]) -> list[str]:
    times = f"- Each time is the median over {settings['rounds']} interleaved rounds"
    if "short_rounds" not in settings:  # a file of an earlier version, whose ratios compare these medians
        return [f"{times}."]
    return [
        f"{times}, and over {settings['short_rounds']} in the tasks of a model with 28 layers.",
        "- Each ratio of times is the median of the ratios within the rounds.",
    ]


def table(results: Mapping[str, Any]) -> str:
    """Markdown text with all measurements."""
    settings = results["settings"]
    lines = [
        f"- Prompts of {settings['length']:,} tokens were used for all tables except the tables by prompt length.",
        *_rounds(settings),
        f"- Each memory figure is the median over {settings['processes']} processes.",
        "- In the tables by prompt length, the column headings are numbers of tokens. There, each figure is from one",
        "  process.",
        f"- The processor is {results['processor']}, {settings['threads']} threads of which ran the models.",
    ]
    for device, measured in results["results"].items():
        lines += ["", f"### {device}", "", *device_tables(measured)]
    demo = f"{results['demo']['seconds']:.0f} s (bar: {DEMO_BAR})"
    lines += ["", f"After installation, `make demo` takes {demo}. The *bar* is the limit in seconds."]
    return "\n".join(lines) + "\n"


def draw(results: Mapping[str, Any], path: Path) -> None:
    """Draw time ratios as bars on logarithmic axes, with one row of plots per task and one column per device."""
    import matplotlib.pyplot as plt

    from focuslens.viz import save_figure

    devices = results["results"]
    size = (8 * len(devices), 2 * len(TITLES))
    figure, all_axes = plt.subplots(len(TITLES), len(devices), figsize=size, layout="constrained", squeeze=False)
    for column, (device, measured) in enumerate(devices.items()):
        for axes, (work, rows) in zip(all_axes[:, column], measured["time"].items(), strict=True):
            names, ratios = list(rows), [row["ratio"] for row in rows.values()]
            bars = axes.barh(names[::-1], ratios[::-1], color="#0072B2")
            axes.bar_label(bars, fmt="%.2f", padding=3, fontsize=8)
            # With tight limits, a ratio of 1.02 would look several times as large as 1, so the axis starts at 0.5.
            limits = (0.5, max(4.0, 3 * max(ratios)))
            title = f"{TITLES[work]} ({device})"
            axes.set(xscale="log", xlim=limits, title=title, xlabel=f"time, divided by the time of {names[0]}")
    save_figure(figure, path)
    plt.close(figure)


def write(results: Mapping[str, Any], folder: Path) -> None:
    """Write ``bench.json``, ``bench.md`` and ``bench.png``. An existing ``bench.md`` keeps its introduction."""
    write_json(folder / "bench.json", results)
    page = folder / "bench.md"
    old = page.read_text() if page.exists() else ""
    introduction = old[: old.index(MARKER) + len(MARKER)] if MARKER in old else ""
    write_atomically(page, (introduction + table(results)).encode())
    draw(results, folder / "bench.png")
