"""Files with rankings of heads, read without torch, so that a command can check them before its work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeGuard

__all__ = ["read_ranking"]


def read_ranking(path: str | Path) -> list[list[int]]:
    """``[layer, head]`` pairs of a ranking file, best first; :func:`focuslens.load_ranking` describes the formats.

    Raises:
        ValueError: If the file is in neither format.
    """
    try:
        entries = json.loads(Path(path).read_text(encoding="utf-8"))
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
