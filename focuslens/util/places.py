"""Directories of models on this machine, which result files do not name, because they can be published."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

from focuslens.util.cache import cache_folder
from focuslens.util.files import write_json

__all__ = ["remember_place", "remembered_place"]


def remember_place(weights: str, directory: Path) -> None:
    """Note where the model with a digest of weights is. If the cache folder cannot be written, do nothing."""
    if remembered_place(weights) != directory:
        with suppress(OSError):
            write_json(_path(weights), {"directory": str(directory)})


def remembered_place(weights: str) -> Path | None:
    """Directory of the model with a digest of weights; ``None`` if it is not known or no longer there."""
    try:
        directory = Path(json.loads(_path(weights).read_text(encoding="utf-8"))["directory"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return directory if directory.is_dir() else None


def _path(weights: str) -> Path:
    return cache_folder() / "places" / f"{weights}.json"
