"""Committed notebooks are readable, contain their figures, and contain nothing about the machine that ran them.

No kernel is needed. `make test-notebooks` runs the notebooks.
"""

from __future__ import annotations

import ast
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest

from tests.support.paths import ROOT

running = pytest.importorskip("run_notebooks", reason="the experiments are not here")

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MOST_BYTES = 3_000_000
ELSEWHERE = re.compile(
    r"(?<![\w.<])/(?:home|root|tmp|work|usr|var|opt|mnt|private|Users)/|\b[A-Z]:\\| at 0x[0-9a-f]{6,}"
)
MEASURED = re.compile(r"\b0\.\d\d")
"""A number with two or more decimals, which may change when the embedded model is trained again."""

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def read(path: Path) -> Any:
    notebook: Any = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    return notebook


def code_cells(path: Path) -> list[Any]:
    return [cell for cell in read(path).cells if cell.cell_type == "code"]


def texts(outputs: list[Any]) -> list[str]:
    """All text in the outputs of a cell."""
    said: list[str] = []
    for one in outputs:
        said.append(one.get("text", ""))
        said += [content for kind, content in one.get("data", {}).items() if kind.startswith("text/")]
    return said


def test_there_are_seven_and_they_are_numbered():
    assert [path.stem.partition("_")[0] for path in NOTEBOOKS] == ["01", "02", "03", "04", "05", "06", "07"]


@each_notebook
def test_it_begins_with_what_it_is_for_and_ends_with_what_it_does_not_show(path: Path):
    cells = read(path).cells
    number = int(path.stem.partition("_")[0])
    first, last = cells[0], cells[-1]
    assert first.cell_type == last.cell_type == "markdown"
    assert first.source.startswith(f"# {number}. ")
    assert "?" in first.source or "asks" in first.source
    assert len(first.source.split()) > 60
    assert last.source.startswith("## What this does not show")


@each_notebook
def test_it_was_run_from_top_to_bottom_without_an_error(path: Path):
    cells = code_cells(path)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        for one in cell.outputs:
            assert one.output_type != "error", cell.source
            assert one.get("name") != "stderr", (cell.source, one.text)


@each_notebook
def test_every_figure_and_view_is_there(path: Path):
    drawn = 0
    for cell in code_cells(path):
        last = ast.parse(cell.source).body[-1]
        shows = isinstance(last, ast.Expr) and re.match(r"(fl\.viz|figures|ax)\.", ast.unparse(last))
        if shows:
            kinds = {kind for one in cell.outputs for kind in one.get("data", {})}
            assert kinds & {"image/png", "text/html"}, cell.source
            drawn += 1
    # Notebook 05 shows objects and no figures.
    assert drawn >= (0 if path.stem.startswith("05") else 1)


@each_notebook
def test_it_says_nothing_of_the_machine_it_ran_on(path: Path):
    for cell in code_cells(path):
        for text in texts(cell.outputs):
            assert not ELSEWHERE.search(text), ELSEWHERE.search(text)
            if len(platform.node()) > 5:
                assert platform.node() not in text


@each_notebook
def test_it_is_tidy_and_of_a_size_that_can_be_kept(path: Path):
    assert path.stat().st_size < MOST_BYTES
    notebook, again = read(path), read(path)
    running.tidy(again)
    assert notebook == again, f"run it again: make notebooks NOTEBOOKS=notebooks/{path.name}"


@each_notebook
def test_prose_restates_no_measured_figure(path: Path):
    for cell in read(path).cells:
        if cell.cell_type == "markdown":
            assert not MEASURED.search(cell.source), MEASURED.search(cell.source)


@pytest.mark.parametrize("command", [("check",), ("format", "--check")], ids=["check", "format"])
def test_code_in_notebooks_passes_ruff(command: tuple[str, ...]):
    pytest.importorskip("ruff", reason="ruff comes with the dev extra")
    done = subprocess.run(
        [sys.executable, "-m", "ruff", *command, "--no-cache", str(ROOT / "notebooks")],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_what_differs_from_run_to_run_is_not_kept():
    shown = {"text/plain": "bar", "application/vnd.jupyter.widget-view+json": {"model_id": "1f"}}
    cell: Any = nbformat.v4.new_code_cell(  # pyright: ignore[reportPrivateImportUsage]
        "1 + 1",
        execution_count=1,
        metadata={"execution": {"iopub.status.busy": "2024-01-01T00:00:00Z"}},
        outputs=[
            nbformat.v4.new_output("display_data", shown),  # pyright: ignore[reportPrivateImportUsage]
            nbformat.v4.new_output("execute_result", {"text/plain": "2"}, execution_count=1),  # pyright: ignore[reportPrivateImportUsage]
        ],
    )
    notebook: Any = nbformat.v4.new_notebook(  # pyright: ignore[reportPrivateImportUsage]
        cells=[cell], metadata={"widgets": {"state": {}}, "language_info": {"name": "python", "version": "3.11.9"}}
    )
    running.tidy(notebook)
    (left,) = notebook.cells
    assert (left.id, left.metadata, left.execution_count) == ("cell-00", {}, 1)
    assert [one.data for one in left.outputs] == [{"text/plain": "2"}]
    assert "widgets" not in notebook.metadata
    assert "version" not in notebook.metadata.language_info
    nbformat.validate(notebook)
