"""Run notebooks in place, so that their outputs match their code (``make notebooks``).

python experiments/run_notebooks.py notebooks/*.ipynb

The script removes incidental content that differs between runs: times, widgets of progress bars, and the kernel's
version. A difference between two runs with the same package versions is therefore a difference in results.
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
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",  # loading weights would show progress bars
    "PYTHONWARNINGS": "ignore:IProgress not found",  # tqdm asks for ipywidgets, which no stored output needs
}
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"file_extension": ".py", "mimetype": "text/x-python", "name": "python"},
}


def main() -> None:
    """Run each notebook that the command line names, and write it back if all its cells succeed."""
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
    """Run one notebook in the notebook's directory, and write it back atomically with its outputs.

    Raises:
        nbclient.exceptions.CellExecutionError: If a cell fails. In this case, the file is not changed.
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
    """Remove times, widgets and the kernel's version from a notebook, so that only code, text and results remain."""
    notebook.metadata = nbformat.from_dict(METADATA)
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number:02d}"
        cell.metadata = nbformat.from_dict({})
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if WIDGET not in output.get("data", {})]


if __name__ == "__main__":
    main()
