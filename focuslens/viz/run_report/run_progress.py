"""Progress of unfinished runs, from their result files alone."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from focuslens.util.record_file import unfinished_path

__all__ = ["SET_ASIDE", "FileProgress", "result_files", "unfinished_files"]

_DEPTH = 6
"""Number of folder levels to search for files, including the run's folder."""

_SUFFIXES = (".json", ".jsonl", ".unfinished", ".html")

SET_ASIDE = re.compile(r"\.\d+$")
"""Name ending of record files that a command renamed because their run had a different seed, model or version."""


@dataclass(frozen=True)
class FileProgress:
    """Progress of a run that writes one record per sample.

    Attributes:
        file: Path of the run's file, relative to the searched folder.
        done: Number of finished units.
        wanted: Number of units of the whole run.
        unit: Name of a unit: ``sample``, or ``response`` if each sample is run under several settings.
    """

    file: str
    done: int
    wanted: int
    unit: str

    def __str__(self) -> str:
        return f"{self.file}: {self.done:,} of {self.wanted:,} {self.unit}s"


def result_files(root: Path) -> Iterator[Path]:
    """Result files, and files of unfinished runs, in a folder that may not exist. Hidden folders are skipped."""
    first = len(root.parts)
    for folder, below, names in os.walk(root):
        depth = len(Path(folder).parts) - first
        kept = [name for name in sorted(below) if not name.startswith(".") and not name.endswith("_files")]
        below[:] = kept if depth < _DEPTH - 1 else []
        yield from (Path(folder) / name for name in sorted(names) if name.endswith(_SUFFIXES))


def unfinished_files(root: Path) -> list[FileProgress]:
    """Progress of all runs in a folder that have not finished, as far as their files tell it."""
    paths = {path for path in result_files(root) if path.suffix in (".jsonl", ".unfinished")}
    records = {path if path.suffix == ".jsonl" else path.with_suffix("") for path in paths}
    found = [_progress(root, path) for path in sorted(records) if not SET_ASIDE.search(path.stem)]
    return [progress for progress in found if progress is not None and progress.done < progress.wanted]


def _progress(root: Path, path: Path) -> FileProgress | None:
    """Progress of the run of a file; ``None`` if the file is of another kind, or was removed meanwhile."""
    parts = unfinished_path(path)
    try:
        lines, begun = _lines(path), _lines(parts)
        header: Any = json.loads((lines or begun)[0])["header"]
        samples = int(header["data"]["samples"])
        per_sample = max(1, len(header.get("settings") or header.get("scores") or ()))
        done = max(0, len(lines) - 1)
        if "settings" in header:
            done = done * per_sample + _responses(begun, lines)
    except (ValueError, KeyError, TypeError, IndexError, OSError):
        return None
    unit = "response" if per_sample > 1 else "sample"
    return FileProgress(path.relative_to(root).as_posix(), done, samples * per_sample, unit)


def _lines(path: Path) -> list[bytes]:
    """Complete lines of a file; none if it does not exist."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return []
    return content[: content.rfind(b"\n") + 1].splitlines()


def _responses(begun: list[bytes], lines: list[bytes]) -> int:
    """Number of responses in a file of unfinished samples, without those of samples that have a record."""
    if not begun:
        return 0
    finished = {json.loads(line)["id"] for line in lines[1:]}
    parts: list[Mapping[str, Any]] = [json.loads(line) for line in begun[1:]]
    return len({(part["setting"], name) for part in parts for name in part["results"] if name not in finished})
