"""Progress bars, and the rules that decide whether they are shown.

By default, bars are shown in notebooks and when standard error is a terminal. Three settings override the default. If
several settings are used, the earliest setting in this list applies:

- the environment variable ``FOCUSLENS_PROGRESS_BARS``: ``0`` hides all bars, and ``1`` shows all bars, even if standard
  error is a file;
- :func:`disable_progress_bars`, until :func:`enable_progress_bars` is called;
- the ``progress`` argument of a function: ``False`` hides the function's bar and all bars inside it, and ``True`` shows
  the function's bar, even if standard error is a file.

Where the default shows no bar, a line once a minute is logged instead, at level INFO. Commands print these lines.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from tqdm import TqdmWarning

with warnings.catch_warnings():
    warnings.simplefilter("ignore", TqdmWarning)  # without ipywidgets, tqdm warns and shows text bars
    from tqdm.auto import tqdm

__all__ = [
    "ENVIRONMENT",
    "ProgressLines",
    "bars_hidden",
    "bars_inside",
    "disable_progress_bars",
    "duration",
    "enable_progress_bars",
    "late_bar",
    "progress_bar",
    "progress_bars_disabled",
    "track",
]

ENVIRONMENT = "FOCUSLENS_PROGRESS_BARS"
_BOOLEANS = {"0": False, "false": False, "off": False, "no": False, "1": True, "true": True, "on": True, "yes": True}

_LOG = logging.getLogger(__name__)

_MINOR_DELAY = 1.0
"""Seconds before the bar of a minor step appears."""

_LINE_SECONDS = 60.0
"""Seconds between two lines, where lines stand in for a bar."""

_LONG_SECONDS = 5.0
"""Expected duration from which a step has a bar of :func:`late_bar`."""

_EARLIEST = 0.5
"""Seconds of a step before its duration is expected from them."""

_T = TypeVar("_T")

_disabled = False
_inside = {True: 0, False: 0}
"""Number of blocks of :func:`bars_inside` that are running, by their value."""


def disable_progress_bars() -> None:
    """Hide progress bars from now on. The environment variable ``FOCUSLENS_PROGRESS_BARS`` takes precedence."""
    global _disabled
    _disabled = True


def enable_progress_bars() -> None:
    """Undo :func:`disable_progress_bars`: show bars in notebooks and when standard error is a terminal."""
    global _disabled
    _disabled = False


def progress_bars_disabled() -> bool:
    """Whether :func:`disable_progress_bars` is in effect."""
    return _disabled


def bars_hidden() -> bool:
    """Whether bars are hidden: by a setting, or because standard error is neither a terminal nor a notebook."""
    silenced = _silenced(None)
    return not sys.stderr.isatty() if silenced is None else silenced


class ProgressLines:
    """Replacement of a progress bar where standard error is no terminal: a line in the log, once a minute.

    Attributes:
        n: Number of units that are finished.
        disable: Always ``True``: there is no bar.
    """

    disable = True

    def __init__(self, label: str, total: int, unit: str, done: int) -> None:
        self._label, self._total, self._unit, self._done = label, total, unit, done
        self.n: float = done
        self._started, self._closed = time.monotonic(), threading.Event()

    def begin(self, started: float) -> None:
        """Begin the lines of a step that started at the time ``started`` of :func:`time.monotonic`."""
        self._started = started
        self.__enter__()

    def __enter__(self) -> ProgressLines:
        # A thread, because a single step can take longer than a minute.
        threading.Thread(target=self._report, name=f"progress of {self._label}", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def update(self, n: float = 1) -> None:
        """Count ``n`` more units as finished."""
        self.n += n

    def close(self) -> None:
        """End the lines."""
        self._closed.set()

    def _report(self) -> None:
        while not self._closed.wait(_LINE_SECONDS):
            _LOG.info("%s", self)

    def __str__(self) -> str:
        seconds, finished = time.monotonic() - self._started, self.n - self._done
        scale, unit = (2**20, "MB") if self._unit == "B" else (1, f"{self._unit}s")
        text = f"{self._label}: {int(self.n) // scale:,} of {self._total // scale:,} {unit} after {duration(seconds)}"
        if not finished:
            return text
        return f"{text}, about {duration(seconds * (self._total - self.n) / finished)} left"


def duration(seconds: float) -> str:
    """A duration in minutes, such as ``12 min`` or ``1 h 5 min``."""
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"


def progress_bar(
    label: str,
    total: int,
    *,
    unit: str = "sample",
    done: int = 0,
    show: bool | None = None,
    passing: bool = False,
) -> tqdm[Any] | ProgressLines:
    """Progress bar that shows the remaining time, for use as a context manager.

    Call ``update(n)`` on the bar after ``n`` units are finished. A bar inside another bar disappears when full.

    Args:
        label: Text before the bar.
        total: Number of units.
        unit: Name of a unit. If the unit is ``B`` (bytes), large numbers are abbreviated.
        done: Number of units that are already finished when the bar starts.
        show: The ``progress`` argument of the calling function; ``None`` applies the default.
        passing: Whether the step is minor. The bar of a minor step appears after one second, and disappears when full.

    Raises:
        ValueError: If ``FOCUSLENS_PROGRESS_BARS`` has an unknown value.
    """
    disable = _silenced(show)
    if disable is None and not sys.stderr.isatty() and _LOG.isEnabledFor(logging.INFO):
        return ProgressLines(label, total, unit, done)
    return (_Silenced if show is False else tqdm)(
        total=total,
        initial=done,
        desc=label,
        unit=unit,
        unit_scale=unit == "B",
        unit_divisor=1024 if unit == "B" else 1000,
        dynamic_ncols=True,
        leave=False if passing else None,
        delay=_MINOR_DELAY if passing else 0,
        disable=disable,
    )


if TYPE_CHECKING:
    _Bar = tqdm[Any]
else:
    _Bar = tqdm


class _Silenced(_Bar):
    """Bar of a function that was called with ``progress=False``. Bars inside it are not shown either."""

    def __enter__(self) -> _Silenced:
        _inside[False] += 1
        return self

    def __exit__(self, *_: object) -> None:
        _inside[False] -= 1
        self.close()


@contextmanager
def bars_inside(show: bool | None) -> Generator[None]:
    """Apply the ``progress`` argument of a function to all bars inside a ``with`` block that have no own argument."""
    if show is None:
        yield
        return
    _inside[show] += 1
    try:
        yield
    finally:
        _inside[show] -= 1


@contextmanager
def late_bar(label: str, total: int, *, unit: str) -> Generator[Callable[[int], None]]:
    """Progress bar of a step that is usually short. It appears only if the step is going to take several seconds.

    Args:
        label: Text before the bar.
        total: Number of units.
        unit: Name of a unit.

    Yields:
        Function to call with the number of units that are finished.
    """
    started, clock = time.monotonic(), time.time()
    bars: list[tqdm[Any] | ProgressLines] = []

    def reach(done: int) -> None:
        seconds = time.monotonic() - started
        if not bars and done > 0 and seconds >= _EARLIEST and seconds * total / done >= _LONG_SECONDS:
            bar = progress_bar(label, total, unit=unit, passing=True)
            if isinstance(bar, ProgressLines):
                bar.begin(started)
            elif not bar.disable:
                bar.start_t = bar.last_print_t = clock  # the remaining time counts from the step's start
                bar.n, bar.delay = done, 0
                bar.refresh()
            bars.append(bar)
        if bars and done > bars[0].n:
            bars[0].update(done - bars[0].n)

    try:
        yield reach
    finally:
        for bar in bars:
            bar.close()


def track(items: Sequence[_T], label: str, *, unit: str = "sample", show: bool | None = None) -> Generator[_T]:
    """Iterate over items, with the bar that :func:`progress_bar` shows for a minor step."""
    with progress_bar(label, len(items), unit=unit, show=show, passing=True) as bar:
        for item in items:
            yield item
            bar.update()


def _silenced(show: bool | None) -> bool | None:
    """Value for tqdm's argument ``disable``. With ``None``, tqdm shows the bar only if standard error is a terminal."""
    value = os.environ.get(ENVIRONMENT, "").strip().lower()
    if value:
        if value not in _BOOLEANS:
            raise ValueError(f"{ENVIRONMENT} is {value!r}; it must be 0 (no bars) or 1 (bars, even in a file)")
        return not _BOOLEANS[value]
    if _disabled:
        return True
    if show is None and (_inside[False] or _inside[True]):
        show = not _inside[False]
    if show is not None:
        return not show
    return False if _in_notebook() else None


def _in_notebook() -> bool:
    """Whether this process is a Jupyter kernel. Notebooks show a kernel's standard error, which is not a terminal."""
    shell = sys.modules.get("IPython")
    instance = None if shell is None else shell.get_ipython()
    return instance is not None and "IPKernelApp" in instance.config
