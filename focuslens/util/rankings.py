"""Files with rankings of heads, read without torch, so that a command can check them before its work."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, TypeGuard, cast

from focuslens.util.ranking_files import PATTERN
from focuslens.util.shipped import shipped_names, shipped_ranking

__all__ = ["ranking_path", "read_ranking"]


def ranking_path(source: str | Path) -> Path:
    """Path of a ranking: the path itself, or that of the ranking that ships with the package under this name.

    The directory of a pattern of DuoAttention becomes the file in it.

    Raises:
        FileNotFoundError: If there is neither a file nor a ranking of this name.
    """
    path = shipped_ranking(source) or Path(source)
    if (path / PATTERN).is_file():
        return path / PATTERN
    if not path.exists():
        names = ", ".join(shipped_names("rankings"))
        raise FileNotFoundError(f"there is no file {str(source)!r}; rankings that ship with FocusLens are: {names}")
    return path


def read_ranking(path: str | Path, group: int | None = None) -> list[list[int]]:
    """``[layer, head]`` pairs of a ranking file, best first; :func:`focuslens.load_ranking` describes the formats.

    Args:
        path: The file, or the name of a ranking that ships with the package.
        group: Number of query heads per key-value head, for a pattern of DuoAttention.

    Raises:
        FileNotFoundError: If there is neither a file nor a ranking of this name.
        ValueError: If the file is in none of the formats, or is a pattern of DuoAttention and ``group`` is not given.
    """
    import yaml

    place = ranking_path(path)
    text, is_yaml = place.read_text(encoding="utf-8"), place.suffix in (".yaml", ".yml")
    if place.suffix == ".tsv":
        return _ranked_groups(path, text, group)
    try:
        entries = yaml.safe_load(text) if is_yaml else json.loads(text)
    except (ValueError, yaml.YAMLError) as error:
        kind = "YAML" if is_yaml else "JSON"
        raise ValueError(f"{path} is not a ranking of heads: it is not {kind} ({error})") from error
    heads = _ranked(entries)
    if not _are_heads(heads):
        raise ValueError(
            f"{path} is not a ranking of heads: expected JSON [[layer, head], ...], best first, or one of the formats "
            "that fl.load_ranking describes"
        )
    return heads


def _ranked_groups(path: str | Path, text: str, group: int | None) -> list[list[int]]:
    """Query heads of DuoAttention's key-value heads, the largest value first. Heads with the value 0 are left out."""
    try:
        rows = [[float(value) for value in line.split("\t")] for line in text.splitlines() if line.strip()]
    except ValueError as error:
        raise ValueError(f"{path} is not a pattern of DuoAttention: {error}") from error
    if not rows or len({len(row) for row in rows}) > 1:
        raise ValueError(f"{path} is not a pattern of DuoAttention: it must have one row per layer, of equal length")
    if group is None:
        raise ValueError(
            f"{path} has one value per key-value head; say how many query heads share one: "
            "fl.load_ranking(path, shape=model.shape). Commands read rankings of query heads, which fl.save_ranking "
            "writes from it"
        )
    places = [(layer, head) for layer, row in enumerate(rows) for head, value in enumerate(row) if value > 0]
    ranked = sorted(places, key=lambda place: -rows[place[0]][place[1]])  # equal values keep the file's order
    return [[layer, head * group + i] for layer, head in ranked for i in range(group)]


def _ranked(entries: Any) -> Any:
    """The list of heads in the content of a file; anything else if it is in no known format."""
    if not isinstance(entries, dict):
        return entries
    table = cast("dict[Any, Any]", entries)
    for key, pattern in _TEXTS.items():
        if key in table:
            return [[int(layer), int(head)] for layer, head in re.findall(pattern, str(table[key]))]
    if "heads" in table or not table:
        return table.get("heads")
    if all(_NAME.fullmatch(str(name)) for name in table):
        values = {name: _mean(value) for name, value in table.items()}
        if None in values.values():
            return None
        ranked = sorted(table, key=lambda name: -cast("float", values[name]))  # equal values keep the file's order
        return [[int(number) for number in str(name).split("-")] for name in ranked]
    if all(str(layer).isdigit() and isinstance(heads, list) for layer, heads in table.items()):
        return [[int(layer), head] for layer, heads in table.items() for head in heads]
    return None


_TEXTS = {"attn_head_set": r"(\d+)-(\d+)", "selected_heads": r"[(\[]\s*(\d+)\s*,\s*(\d+)\s*[)\]]"}
"""Patterns of heads in the configurations of QRHead and DySCO, by key."""

_NAME = re.compile(r"\d+-\d+")
"""Name of a head in the files of CoRe and of retrieval heads: ``layer-head``."""


def _mean(value: Any) -> float | None:
    """A score, or the mean of a list of scores; ``None`` for anything else."""
    scores = cast("list[Any]", value) if isinstance(value, list) else [value]
    if not scores or not all(isinstance(score, int | float) and not isinstance(score, bool) for score in scores):
        return None
    return sum(scores) / len(scores)


def _are_heads(entries: Any) -> TypeGuard[list[list[int]]]:
    return isinstance(entries, list) and all(map(_is_head, entries))  # pyright: ignore[reportUnknownArgumentType]


def _is_head(entry: Any) -> bool:
    return isinstance(entry, list) and [type(number) for number in entry] == [int, int]  # pyright: ignore[reportUnknownVariableType]
