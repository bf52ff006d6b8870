"""Progress bars, and the rules that decide whether they are shown.

By default, bars are shown in notebooks and when standard error is a terminal. Three settings override the default. If
several settings are used, the earliest setting in this list applies:

- the environment variable ``FOCUSLENS_PROGRESS_BARS``: ``0`` hides all bars, and ``1`` shows all bars, even if standard
  error is a file;
- :func:`disable_progress_bars`, until :func:`enable_progress_bars` is called;
- the ``progress`` argument of a function: ``False`` hides the function's bar, and ``True`` shows the function's bar,
  even if standard error is a file.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Generator, Sequence
from typing import Any, TypeVar

from tqdm import TqdmWarning

with warnings.catch_warnings():
    warnings.simplefilter("ignore", TqdmWarning)  # without ipywidgets, tqdm warns and shows text bars
    from tqdm.auto import tqdm

__all__ = [
    "ENVIRONMENT",
    "bars_hidden",
    "disable_progress_bars",
    "enable_progress_bars",
    "progress_bar",
    "progress_bars_disabled",
    "track",
]

ENVIRONMENT = "FOCUSLENS_PROGRESS_BARS"
_BOOLEANS = {"0": False, "false": False, "off": False, "no": False, "1": True, "true": True, "on": True, "yes": True}

_MINOR_DELAY = 1.0
"""Seconds before the bar of a minor step appears."""

_T = TypeVar("_T")

_disabled = False


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


def progress_bar(
    label: str,
    total: int,
    *,
    unit: str = "sample",
    done: int = 0,
    show: bool | None = None,
    passing: bool = False,
) -> tqdm[Any]:
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
    return tqdm(
        total=total,
        initial=done,
        desc=label,
        unit=unit,
        unit_scale=unit == "B",
        unit_divisor=1024 if unit == "B" else 1000,
        dynamic_ncols=True,
        leave=False if passing else None,
        delay=_MINOR_DELAY if passing else 0,
        disable=_silenced(show),
    )


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
    if show is not None:
        return not show
    return False if _in_notebook() else None


def _in_notebook() -> bool:
    """Whether this process is a Jupyter kernel. Notebooks show a kernel's standard error, which is not a terminal."""
    shell = sys.modules.get("IPython")
    instance = None if shell is None else shell.get_ipython()
    return instance is not None and "IPKernelApp" in instance.config
