"""Rankings of heads and focus directions of real models, which ship with the package under names in place of paths."""

from __future__ import annotations

import os
from importlib import resources
from pathlib import Path

__all__ = ["shipped_directions", "shipped_names", "shipped_ranking"]


def shipped_ranking(name: str | os.PathLike[str]) -> Path | None:
    """Path of the ranking of a name, or ``None`` if no ranking has it. A file of this name comes first."""
    return _shipped("rankings", str(name), ".json")


def shipped_directions(name: str | os.PathLike[str]) -> Path | None:
    """Directory of the directions of a name, or ``None`` if no directions have it. A path that exists comes first."""
    return _shipped("directions", str(name))


def shipped_names(kind: str) -> list[str]:
    """Names of the ``rankings`` or ``directions`` that ship with the package."""
    return sorted(path.name.removesuffix(".json") for path in _folder(kind).iterdir()) if _folder(kind).is_dir() else []


def _shipped(kind: str, name: str, suffix: str = "") -> Path | None:
    return _folder(kind) / f"{name}{suffix}" if name in shipped_names(kind) and not Path(name).exists() else None


def _folder(kind: str) -> Path:
    return Path(str(resources.files("focuslens"))) / "assets" / kind
