"""Runs notebooks in place, so that what they show is what their code gives: make notebooks.

python experiments/run_notebooks.py notebooks/*.ipynb

What differs from run to run without meaning anything (times, widgets of progress bars, the kernel's version) is not
kept: a notebook run again on the same versions differs where a result does.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

from focuslens.util.files import write_atomically

WIDGET = "application/vnd.jupyter.widget-view+json"
QUIET = {
    "FOCUSLENS_PROGRESS_BARS": "0",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",  # of loading weights
    "PYTHONWARNINGS": "ignore:IProgress not found",  # tqdm wants ipywidgets for a bar that is not kept
}
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"file_extension": ".py", "mimetype": "text/x-python", "name": "python"},
}


def main() -> None:
    """Run every notebook named, and write it back if it ran to its end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", nargs="+", type=Path)
    parser.add_argument("--timeout", type=int, default=300, help="seconds that a cell may take")
    args = parser.parse_args()
    for path in args.notebooks:
        started, used = time.perf_counter(), os.times().children_user
        run(path, args.timeout)
        spent = f"{time.perf_counter() - started:.0f} s, {os.times().children_user - used:.0f} s of processor time"
        print(f"{path}: {spent}, {path.stat().st_size / 1e6:.2f} MB", flush=True)


def run(path: Path, timeout: int = 300) -> None:
    """Run one notebook in its own directory and write it back with its outputs, whole or not at all.

    Raises:
        nbclient.exceptions.CellExecutionError: If a cell fails; the file is then as it was.
    """
    notebook: Any = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=timeout,
        kernel_name="python3",
        record_timing=False,
        resources={"metadata": {"path": str(path.parent)}},
    )
    client.execute(env={**os.environ, **QUIET})
    tidy(notebook)
    nbformat.validate(notebook)
    write_atomically(path, (nbformat.writes(notebook).rstrip("\n") + "\n").encode())


def tidy(notebook: Any) -> None:
    """Take out of a notebook what is no result: times, widgets, and the versions of the kernel that ran it."""
    notebook.metadata = nbformat.from_dict(METADATA)
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number:02d}"
        cell.metadata = nbformat.from_dict({})
        if cell.cell_type == "code":
            cell.outputs = [one for one in cell.outputs if WIDGET not in one.get("data", {})]


if __name__ == "__main__":
    main()
