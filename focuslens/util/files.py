"""Atomic writes of files, and the package versions that result files record."""

from __future__ import annotations

import csv
import glob
import io
import json
import os
import platform
import tempfile
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

__all__ = ["umask", "versions", "write_atomically", "write_csv", "write_json"]

_ABANDONED_AGE = 3600.0
"""Age in seconds above which a temporary file counts as left behind by a killed process."""


def write_atomically(path: str | Path, content: bytes) -> None:
    """Write a temporary file in the same folder, then rename it. Readers never see a partial file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(path)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp creates files that only their owner may read; results get the usual permissions.
        Path(temporary).chmod(0o666 & ~umask())
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _remove_abandoned(path: Path) -> None:
    """Delete temporary files that killed processes left behind. Recent files stay, because they may be in use."""
    for temporary in path.parent.glob(f".{glob.escape(path.name)}.????????"):
        with suppress(OSError):
            if time.time() - temporary.stat().st_mtime > _ABANDONED_AGE:
                temporary.unlink()


def umask() -> int:
    """The permission bits that this process removes from the files it creates."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_json(path: str | Path, content: Any) -> None:
    """Write indented JSON atomically."""
    write_atomically(path, (json.dumps(content, indent=2, allow_nan=False) + "\n").encode())


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Sequence[str | int | float]]) -> Path:
    """Write a table as CSV atomically. Numbers keep all their digits."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    write_atomically(path, text.getvalue().encode())
    return path


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that affect results."""
    package_versions = {"python": platform.python_version()}
    for name in ("focuslens", "torch", "transformer-lens", "transformers", "tokenizers"):
        try:
            package_versions[name] = version(name)
        except PackageNotFoundError:
            package_versions[name] = "not installed"
    return package_versions
