"""Atomic file writes, and the package versions that are stored in result files."""

from __future__ import annotations

import csv
import glob
import io
import json
import os
import platform
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, cast

__all__ = [
    "file_sizes",
    "require_writable",
    "umask",
    "versions",
    "without_folders",
    "write_atomically",
    "write_csv",
    "write_json",
]

_ABANDONED_AGE = 3600.0
"""Age in seconds above which a temporary file is assumed to be left over from a killed process."""


def file_sizes(folder: Path, suffix: str = "") -> list[int]:
    """Sizes in bytes of the files below a folder whose names end in ``suffix``.

    Another process may write there. Files and folders that it removes meanwhile are left out.
    """
    sizes: list[int] = []
    for inner, _, names in os.walk(folder):  # unlike Path.rglob, it passes over folders that are gone
        for name in names:
            if name.endswith(suffix):
                with suppress(OSError):
                    sizes.append(os.lstat(Path(inner, name)).st_size)
    return sizes


def write_atomically(path: str | Path, content: bytes) -> None:
    """Write a file atomically, so that readers never see a partial file.

    The content is written to a temporary file in the same folder. The temporary file is then renamed to ``path``.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(path)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp creates files that only their owner can read. Result files get the default permissions instead.
        Path(temporary).chmod(0o666 & ~umask())
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _remove_abandoned(path: Path) -> None:
    """Delete old temporary files of killed processes. Recent files are kept, because a process may be writing them."""
    for temporary in path.parent.glob(f".{glob.escape(path.name)}.????????"):
        with suppress(OSError):
            if time.time() - temporary.stat().st_mtime > _ABANDONED_AGE:
                temporary.unlink()


def require_writable(path: str | Path) -> None:
    """Check that a file can be written, before the work whose result goes into it. Its folder may not exist yet.

    Raises:
        ValueError: If the path is that of a directory, or below a file.
        PermissionError: If its folder cannot be written to.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{str(path)!r} is a directory; name a file in it")
    there = next(folder for folder in (*path.parents, Path()) if folder.exists())
    if not there.is_dir():
        raise ValueError(f"{str(there)!r} is a file, so there can be no {str(path)!r}; name another")
    if not os.access(there, os.W_OK):
        raise PermissionError(f"{str(there)!r} cannot be written to; name another folder")


def umask() -> int:
    """File mode creation mask of this process: the permission bits that new files do not get."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_json(path: str | Path, content: Any) -> None:
    """Write ``content`` as indented JSON, atomically."""
    write_atomically(path, (json.dumps(content, indent=2, allow_nan=False) + "\n").encode())


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Sequence[str | int | float]]) -> Path:
    """Write a table as CSV, atomically, and return its path. Numbers are written with all their digits."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    write_atomically(path, text.getvalue().encode())
    return path


def without_folders(value: Any) -> Any:
    """A JSON value in which every absolute path is its last component, because folders belong to one machine."""
    if isinstance(value, Mapping):
        return {key: without_folders(entry) for key, entry in cast("Mapping[str, Any]", value).items()}
    if isinstance(value, list | tuple):
        return [without_folders(entry) for entry in cast("Sequence[Any]", value)]
    return Path(value).name if isinstance(value, str) and _is_in_a_folder(value) else value


def _is_in_a_folder(text: str) -> bool:
    """Whether a text is an absolute path of two components or more. A single one, such as ``/``, can be a token."""
    return "\n" not in text and Path(text).is_absolute() and len(Path(text).parts) > 2


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that affect results."""
    package_versions = {"python": platform.python_version()}
    for name in ("focuslens", "torch", "transformer-lens", "transformers", "tokenizers"):
        try:
            package_versions[name] = version(name)
        except PackageNotFoundError:
            package_versions[name] = "not installed"
    return package_versions
