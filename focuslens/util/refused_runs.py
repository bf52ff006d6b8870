"""Refusal of a run whose result file belongs to a run with a different model, different data or different settings."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

__all__ = ["OtherResultsError", "require_same_run", "same_run", "without_defaults"]

_DEFAULTS: Mapping[str, Any] = {"distractors": "random", "rank": 0, "objective": "score"}
"""Entries that earlier versions did not write, and the value that their absence stands for."""


class OtherResultsError(ValueError):
    """Error for a result file that belongs to a run with a different model, different data or different settings."""


def require_same_run(path: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Check that the header of a result file equals the header of the run that would continue the file.

    Raises:
        OtherResultsError: If the headers differ. The message names the difference.
    """
    before, now = without_defaults(old), without_defaults(new)
    differing_keys = sorted(key for key in {**before, **now} if before.get(key) != now.get(key))
    if differing_keys:
        key, before, now = _first_difference(differing_keys[0], old, new)
        raise OtherResultsError(
            f"{path} holds results of a different run ({', '.join(differing_keys)} differ; {key} was "
            f"{_short(before)}, is now {_short(now)}); name another file, or delete it"
        )


def same_run(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """Whether two descriptions of runs are equal as JSON values, also if an earlier version wrote one of them."""
    before, now = (json.loads(json.dumps(without_defaults(header))) for header in (old, new))
    return before == now


def without_defaults(value: Any) -> Any:
    """A JSON value without the entries whose absence means the same, such as distractors that are drawn at random."""
    if isinstance(value, Mapping):
        entries = cast("Mapping[str, Any]", value)
        return {key: without_defaults(entry) for key, entry in entries.items() if not _is_default(key, entry)}
    if isinstance(value, list | tuple):
        return [without_defaults(entry) for entry in cast("list[Any] | tuple[Any, ...]", value)]
    return value


def _is_default(key: str, entry: Any) -> bool:
    return key in _DEFAULTS and entry == _DEFAULTS[key]


def _first_difference(key: str, old_header: Any, new_header: Any) -> tuple[str, Any, Any]:
    """First nested key below ``key`` at which two headers differ, such as ``model.weights``, with both values."""
    old, new = old_header.get(key), new_header.get(key)
    while isinstance(old, dict) and isinstance(new, dict):
        old_object, new_object = cast("dict[str, Any]", old), cast("dict[str, Any]", new)
        names = {**old_object, **new_object}
        values = {name: [side.get(name, _DEFAULTS.get(name)) for side in (old_object, new_object)] for name in names}
        inner = min(name for name, (before, now) in values.items() if before != now)
        key, (old, new) = f"{key}.{inner}", values[inner]
    return key, old, new


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 120 else text[:117] + "..."
