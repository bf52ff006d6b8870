"""Directories of models on this machine, which result files do not name, because they can be published."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from focuslens.util.cache import cache_folder
from focuslens.util.files import write_json

__all__ = ["remember_place", "remembered_place"]


def remember_place(description: Mapping[str, Any], directory: Path) -> None:
    """Note where the model of a description is. If the cache folder cannot be written, do nothing."""
    if remembered_place(description) != directory:
        with suppress(OSError):
            write_json(_path(description), {"directory": str(directory)})


def remembered_place(description: Mapping[str, Any]) -> Path | None:
    """Directory of the model with these weights and this configuration; ``None`` if it is not known or not there."""
    try:
        directory = Path(json.loads(_path(description).read_text(encoding="utf-8"))["directory"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return directory if directory.is_dir() else None


def _path(description: Mapping[str, Any]) -> Path:
    name = "-".join(str(description.get(key)) for key in ("weights", "config"))
    return cache_folder() / "places" / f"{name}.json"
