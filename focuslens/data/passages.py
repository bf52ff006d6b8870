"""Passages that ship with the package: an oracle file of 144 questions, under a name in place of a path."""

from __future__ import annotations

import os
from importlib import resources
from pathlib import Path

__all__ = ["PASSAGES", "data_name", "data_path"]

PASSAGES = "passages"
"""Name of the passages in place of a path. For a file of this name, write ``./passages``."""


def data_path(name: str | os.PathLike[str]) -> Path:
    """Path of a data file. :data:`PASSAGES` is the name of the file that ships with the package."""
    return _file() if name == PASSAGES else Path(name)


def data_name(path: Path) -> str:
    """Name of a data file in result files: the last component of its path, or :data:`PASSAGES`."""
    return PASSAGES if path == _file() else path.name


def _file() -> Path:
    return Path(str(resources.files("focuslens"))) / "assets" / "passages.jsonl.gz"
