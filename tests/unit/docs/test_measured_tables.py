"""The tables of speed and memory say what the files of their measurements hold: none is typed."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.paths import ROOT

sys.path.insert(0, str(ROOT / "experiments"))

bench: Any = pytest.importorskip("bench", reason="the experiments are not here")
DOCS = ROOT / "docs"


def tables(text: str) -> list[list[str]]:
    """Tables of a page in Markdown, each its lines."""
    found: list[list[str]] = [[]]
    for line in text.splitlines():
        if line.startswith("|"):
            found[-1].append(line)
        elif found[-1]:
            found.append([])
    return [table for table in found if table]


def measured(path: Path) -> dict[str, Any]:
    """Results as they were before they were written: lengths, the names of memory by length, are numbers."""

    def numbers(found: dict[str, Any]) -> dict[Any, Any]:
        return {int(name) if name.isdigit() else name: value for name, value in found.items()}

    return json.loads(path.read_text(), object_hook=numbers)


def test_the_benchmark_s_page_is_its_file_s() -> None:
    assert (DOCS / "bench.md").read_text() == bench.table(measured(DOCS / "bench.json"))


def test_readme_s_benchmark_is_that_of_the_file() -> None:
    section = (ROOT / "README.md").read_text().partition("## What it costs beside others")[2].partition("\n## ")[0]
    shown, known = tables(section), tables(bench.table(measured(DOCS / "bench.json")))
    assert len(shown) >= 4
    for table in shown:
        assert table in known, "\n".join(table)
    page = bench.table(measured(DOCS / "bench.json"))
    (demo,) = (line for line in page.splitlines() if line.startswith("`make demo`"))
    assert demo in section.splitlines()


def test_the_gpu_s_page_is_its_file_s() -> None:
    found = measured(DOCS / "gpu.json")
    lengths = found["length_bytes"]
    header = ["", *(f"{length:,}" for length in next(iter(lengths.values())))]
    above = [[name, *(f"{size / 2**20:.0f}" for size in sizes.values())] for name, sizes in lengths.items()]
    known = [*tables("\n".join(bench.shared_tables(found))), bench.rows_of(header, above)]
    assert tables((DOCS / "gpu.md").read_text()) == known
    for rows in found["time"].values():
        first = next(iter(rows.values()))["seconds"]
        for row in rows.values():
            assert row["seconds"] == sorted(row["rounds"])[len(row["rounds"]) // 2]
            assert row["ratio"] == pytest.approx(row["seconds"] / first)
