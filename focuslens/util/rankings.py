"""Files with rankings of heads, read without torch, so that a command can check them before its work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeGuard

from focuslens.util.shipped import shipped_names, shipped_ranking

__all__ = ["ranking_path", "read_ranking"]


def ranking_path(source: str | Path) -> Path:
    """Path of a ranking: the path itself, or that of the ranking that ships with the package under this name.

    Raises:
        FileNotFoundError: If there is neither a file nor a ranking of this name.
    """
    path = shipped_ranking(source) or Path(source)
    if not path.exists():
        names = ", ".join(shipped_names("rankings"))
        raise FileNotFoundError(f"there is no file {str(source)!r}; rankings that ship with FocusLens are: {names}")
    return path


def read_ranking(path: str | Path) -> list[list[int]]:
    """``[layer, head]`` pairs of a ranking file, best first; :func:`focuslens.load_ranking` describes the formats.

    Raises:
        FileNotFoundError: If there is neither a file nor a ranking of this name.
        ValueError: If the file is in neither format.
    """
    try:
        entries = json.loads(ranking_path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not a ranking of heads: it is not JSON ({error})") from error
    if isinstance(entries, dict):
        entries = entries.get("heads")  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
    if not _are_heads(entries):
        raise ValueError(f"{path} is not a ranking of heads: expected JSON [[layer, head], ...], best first")
    return entries


def _are_heads(entries: Any) -> TypeGuard[list[list[int]]]:
    return isinstance(entries, list) and all(map(_is_head, entries))  # pyright: ignore[reportUnknownArgumentType]


def _is_head(entry: Any) -> bool:
    return isinstance(entry, list) and [type(number) for number in entry] == [int, int]  # pyright: ignore[reportUnknownVariableType]
