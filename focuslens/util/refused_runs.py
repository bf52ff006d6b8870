"""Refusal of a run whose result file belongs to a run with a different model, different data or different settings."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

__all__ = ["OtherResultsError", "require_same_run"]


class OtherResultsError(ValueError):
    """Error for a result file that belongs to a run with a different model, different data or different settings."""


def require_same_run(path: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Check that the header of a result file equals the header of the run that would continue the file.

    Raises:
        OtherResultsError: If the headers differ. The message names the difference.
    """
    differing_keys = sorted(key for key in {**old, **new} if old.get(key) != new.get(key))
    if differing_keys:
        key, before, now = _first_difference(differing_keys[0], old, new)
        raise OtherResultsError(
            f"{path} holds results of a different run ({', '.join(differing_keys)} differ; {key} was "
            f"{_short(before)}, is now {_short(now)}); name another file, or delete it"
        )


def _first_difference(key: str, old_header: Any, new_header: Any) -> tuple[str, Any, Any]:
    """First nested key below ``key`` at which two headers differ, such as ``model.weights``, with both values."""
    old, new = old_header.get(key), new_header.get(key)
    while isinstance(old, dict) and isinstance(new, dict):
        old_object, new_object = cast("dict[str, Any]", old), cast("dict[str, Any]", new)
        names = {**old_object, **new_object}
        inner = min(name for name in names if old_object.get(name) != new_object.get(name))
        key, old, new = f"{key}.{inner}", old_object.get(inner), new_object.get(inner)
    return key, old, new


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 120 else text[:117] + "..."
