"""Estimates of the duration of long runs, from their first batch.

A run over samples that goes on for more than a minute after its first batch logs one line at level INFO: the number of
samples and tokens, the time that is left, and where the results will be. Commands print this line.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["Estimate", "note_place", "results_in"]

_LOG = logging.getLogger(__name__)

_LONG_SECONDS = 60.0
"""Remaining duration from which an estimate is logged."""

_outer = 0
"""Number of ``with`` blocks of estimates. Inside them, only their own estimates are logged."""

_place = ""
"""End of the line: the place of the results."""


class Estimate:
    """Estimate of the remaining time of a run, which begins now.

    An estimate is a context manager for runs that consist of other runs, such as chunks of samples. Inside its ``with``
    block, the other runs log nothing.

    Args:
        n: Number of units.
        n_tokens: Number of prompt tokens of all units; 0 if it is unknown. Then every unit counts as much as any other.
        unit: Name of a unit.
    """

    def __init__(self, n: int, n_tokens: int = 0, *, unit: str = "sample") -> None:
        self._n, self._n_tokens, self._unit = n, n_tokens, unit
        self._is_known, self._is_outer, self._started = False, False, time.monotonic()

    def __enter__(self) -> Estimate:
        global _outer
        _outer += 1
        self._is_outer = True
        return self

    def __exit__(self, *_: object) -> None:
        global _outer
        _outer -= 1

    def finish(self, n: int, n_tokens: int = 0, *, at_once: float = 1.0) -> None:
        """Note a finished batch. The first one gives the estimate, and all others are ignored.

        Args:
            n: Number of units of the batch.
            n_tokens: Number of prompt tokens of the batch.
            at_once: Number of batches of this size that run at the same time.
        """
        if self._is_known or not n or (_outer and not self._is_outer):
            return
        from focuslens.util.progress import duration  # tqdm is not imported before a command runs

        self._is_known = True
        seconds = time.monotonic() - self._started
        whole, part = (self._n_tokens, n_tokens) if self._n_tokens and n_tokens else (self._n, n)
        left = seconds * max(0.0, whole / part - at_once) / at_once
        if left < _LONG_SECONDS:
            return
        tokens = f" with {self._n_tokens:,} prompt tokens" if self._n_tokens else ""
        _LOG.info(
            "%s%s: about %s left, by the first %s in %s%s",
            _counted(self._n, self._unit),
            tokens,
            duration(left),
            _counted(n, self._unit),
            f"{seconds:.0f} s" if seconds < 90 else duration(seconds),
            f"; {_place}" if _place else "",
        )


def _counted(n: int, unit: str) -> str:
    return f"{n:,} {unit}{'' if n == 1 else 's'}"


@contextmanager
def results_in(place: str | Path | None) -> Generator[None]:
    """Name the place of a command's results in estimates, inside a ``with`` block.

    Args:
        place: Path of the results; ``None`` if they are only printed.
    """
    global _place
    before = _place
    _place = "the results are only printed: --out DIRECTORY keeps them"
    try:
        if place is not None:
            note_place(place)
        yield
    finally:
        _place = before


def note_place(path: str | Path) -> None:
    """Name another place of the results of the running command, such as a default one. Do nothing outside commands."""
    global _place
    if _place:
        _place = f"results go to {path}"
