"""Tables of speed and memory in the docs equal the files of measurements that they are generated from."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.paths import ROOT

sys.path.insert(0, str(ROOT / "experiments"))

bench_page: Any = pytest.importorskip("bench_page", reason="the experiments are not here")
DOCS = ROOT / "docs"
PAPER = "the paper's procedure"


def tables(text: str) -> list[list[str]]:
    """Tables of a Markdown page, each as a list of lines."""
    found: list[list[str]] = [[]]
    for line in text.splitlines():
        if line.startswith("|"):
            found[-1].append(line)
        elif found[-1]:
            found.append([])
    return [table for table in found if table]


def measured(path: Path) -> dict[str, Any]:
    """Results from a JSON file, with keys that are lengths converted back to integers."""

    def numbers(found: dict[str, Any]) -> dict[Any, Any]:
        return {int(name) if name.isdigit() else name: value for name, value in found.items()}

    return json.loads(path.read_text(), object_hook=numbers)


def ratios(found: dict[str, Any], work: str) -> dict[str, str]:
    """Ratios of each contestant's time to that of the first contestant, formatted as on the pages."""
    return {name: f"{row['ratio']:.2f}" for name, row in found["time"][work].items()}


def prose(path: Path) -> str:
    """A page as one line, for sentences that span several lines."""
    return " ".join(path.read_text().split())


def test_the_benchmark_s_page_is_its_file_s() -> None:
    introduction, _, written = (DOCS / "bench.md").read_text().partition(bench_page.MARKER)
    assert written == bench_page.table(measured(DOCS / "bench.json"))
    assert not tables(introduction)


def test_readme_s_times_are_those_of_the_files() -> None:
    results, name = measured(DOCS / "bench.json"), "FocusLens, HookedTransformer"
    cpu, gpu = (
        {work: ratios(found, work) for work in ("score", "sweep", "train")}
        for found in (results["results"]["cpu, float32"], measured(DOCS / "gpu.json"))
    )
    sentences = (
        f"scoring all heads takes {cpu['score'][name]} times as long as a plain generation ({cpu['score'][PAPER]} "
        f"times in the paper's procedure). A sweep of 78 split-softmax settings takes {cpu['sweep'][name]} times as "
        f"long as a plain generation ({cpu['sweep'][PAPER]} times in the paper's procedure). Training takes "
        f"{cpu['train'][PAPER]} times as long in the paper's procedure as in FocusLens. "
        f"The demo runs in {results['demo']['seconds']:.0f} s.",
        f"Scoring all heads takes {gpu['score'][name]} times as long as a plain generation ({gpu['score'][PAPER]} "
        "times in the paper's procedure).",
    )
    for sentence in sentences:
        assert sentence in prose(ROOT / "README.md")


def test_readme_s_accuracies_are_those_of_the_embedded_model_s_card() -> None:
    card = measured(ROOT / "focuslens" / "assets" / "demo" / "measured.json")
    everywhere = {row["name"]: row for row in card["everywhere"]}
    (gold,) = (row for row in card["baselines"] if row["case"] == "gold")
    alone, long, split, steered = (
        f"{row['em']:.3f} ({row['em_low']:.3f} to {row['em_high']:.3f})"
        for row in (gold, everywhere["baseline"], card["split_softmax"], everywhere[card["steering_chosen"]])
    )
    assert card["split_softmax"]["k"] == 6
    assert (
        f"On {card['sizes']['questions']} test questions, exact match is {alone} with the relevant document alone and "
        f"{long} with 20 documents. Split-softmax on six heads raises the second value to {split}, and a focus "
        f"direction raises it to {steered}." in prose(ROOT / "README.md")
    )


def test_the_gpu_s_page_is_its_file_s() -> None:
    found = measured(DOCS / "gpu.json")
    lengths = found["length_bytes"]
    header = ["", *(f"{length:,}" for length in next(iter(lengths.values())))]
    above = [[name, *(f"{size / 2**20:.0f}" for size in sizes.values())] for name, sizes in lengths.items()]
    known = [*tables("\n".join(bench_page.shared_tables(found))), bench_page.rows_of(header, above)]
    assert tables((DOCS / "gpu.md").read_text()) == known
    page = prose(DOCS / "gpu.md").partition("**These figures say little")[0]
    said = {figure for work in ("score", "sweep", "train") for figure in ratios(found, work).values()}
    least = next(iter(found["memory"].values()))["bytes"]
    said |= {f"{row['bytes'] / least:.2f}" for row in found["memory"].values()}
    assert set(re.findall(r"\d+\.\d\d", page)) <= said
    for rows in found["time"].values():
        first = next(iter(rows.values()))["seconds"]
        for row in rows.values():
            assert row["seconds"] == sorted(row["rounds"])[len(row["rounds"]) // 2]
            assert row["ratio"] == pytest.approx(row["seconds"] / first)
