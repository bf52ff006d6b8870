"""Directories of models on this machine, which result files do not name, because they can be published."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from focuslens.util.cache import cache_folder
from focuslens.util.files import write_json

__all__ = ["remember_place", "remembered_place"]


_KEPT = 8
"""Number of directories that are noted for one model, such as the original and copies."""


def remember_place(description: Mapping[str, Any], directory: Path) -> None:
    """Note where the model of a description is. If the cache folder cannot be written, do nothing."""
    places = _places(description)
    if places[:1] != [directory]:
        latest = [directory, *(place for place in places if place != directory)][:_KEPT]
        with suppress(OSError):
            write_json(_path(description), {"directories": [str(place) for place in latest]})


def remembered_place(description: Mapping[str, Any]) -> Path | None:
    """Directory of the model of a description, the latest that is still there; ``None`` if there is none."""
    return next((place for place in _places(description) if place.is_dir()), None)


def _places(description: Mapping[str, Any]) -> list[Path]:
    """All directories noted for a model, the latest first."""
    try:
        content = json.loads(_path(description).read_text(encoding="utf-8"))
        return [Path(place) for place in content["directories"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _path(description: Mapping[str, Any]) -> Path:
    # All that a copy of a checkpoint can change. A report reopens only a model that is the same in all of it.
    keys = ("weights", "config", "dtype", "backend", "prompt_format", "stop_tokens", "decoding")
    content = json.dumps([description.get(key) for key in keys], default=str)
    return cache_folder() / "places" / f"{hashlib.sha256(content.encode()).hexdigest()[:32]}.json"
