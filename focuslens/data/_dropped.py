"""Warning about accepted answers that were dropped from a data file, at most once per file and process."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

from focuslens.util.notes import MinorWarning

__all__ = ["warn_of_dropped"]

_HANDFUL = 5
"""Largest number of dropped answers that is a detail. The file of the paper has one."""

_told: dict[Path, int] = {}
"""Number of dropped answers that was last reported, by file."""


def warn_of_dropped(path: Path, dropped: Sequence[tuple[int, str]]) -> None:
    """Warn of dropped answers, given as line and answer, unless as many of this file were reported before."""
    place = path.resolve()
    if len(dropped) <= _told.get(place, 0):
        return
    _told[place] = len(dropped)
    line, answer = dropped[0]
    warnings.warn(
        f"{path}: dropped {len(dropped)} accepted answer(s), empty after normalisation. "
        f"Every prediction contains these (first: {answer!r}, line {line}); their questions have other answers",
        MinorWarning if len(dropped) <= _HANDFUL else UserWarning,
        stacklevel=3,
    )
