"""Progress bars: the one place that decides whether they are shown, and how.

A bar is shown where someone may watch: where standard error is a terminal, and in a notebook. In order, the first that
says something else decides:

- the environment variable ``FOCUSLENS_PROGRESS_BARS``: ``0`` for none, ``1`` for all, also into a file;
- :func:`disable_progress_bars`, until :func:`enable_progress_bars`;
- the ``progress`` argument of the function that works: ``False`` for none, ``True`` for one, also into a file.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Generator, Sequence
from typing import Any, TypeVar

from tqdm import TqdmWarning

with warnings.catch_warnings():
    warnings.simplefilter("ignore", TqdmWarning)  # a notebook without ipywidgets gets bars of text
    from tqdm.auto import tqdm

__all__ = [
    "ENVIRONMENT",
    "disable_progress_bars",
    "enable_progress_bars",
    "progress_bar",
    "progress_bars_disabled",
    "track",
]

ENVIRONMENT = "FOCUSLENS_PROGRESS_BARS"
_ANSWERS = {"0": False, "false": False, "off": False, "no": False, "1": True, "true": True, "on": True, "yes": True}

_PATIENCE = 1.0
"""Seconds after which a bar of something in passing is shown."""

_T = TypeVar("_T")

_disabled = False


def disable_progress_bars() -> None:
    """Show no progress bars from here on; the environment variable ``FOCUSLENS_PROGRESS_BARS`` has the last word."""
    global _disabled
    _disabled = True


def enable_progress_bars() -> None:
    """Show progress bars again where someone may watch."""
    global _disabled
    _disabled = False


def progress_bars_disabled() -> bool:
    """Whether :func:`disable_progress_bars` was the last that was said."""
    return _disabled


def progress_bar(
    label: str,
    total: int,
    *,
    unit: str = "sample",
    done: int = 0,
    show: bool | None = None,
    passing: bool = False,
) -> tqdm[Any]:
    """A bar with the time that is left, to be used as a context; ``update(n)`` moves it on.

    A bar inside another vanishes when it is full.

    Args:
        label: What is being done.
        total: Units of work in all.
        unit: What is counted; ``B``, bytes, are written short.
        done: How many were done before.
        show: As the ``progress`` argument of the function that works; ``None`` leaves it to who may watch.
        passing: Of many short steps beside the work itself: shown if it takes longer than a second, gone when full.

    Raises:
        ValueError: If ``FOCUSLENS_PROGRESS_BARS`` is neither a yes nor a no.
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
        delay=_PATIENCE if passing else 0,
        disable=_silenced(show),
    )


def track(items: Sequence[_T], label: str, *, unit: str = "sample", show: bool | None = None) -> Generator[_T]:
    """The items one after the other, with a bar in passing; see :func:`progress_bar`."""
    with progress_bar(label, len(items), unit=unit, show=show, passing=True) as bar:
        for item in items:
            yield item
            bar.update()


def _silenced(show: bool | None) -> bool | None:
    """What tqdm calls ``disable``: ``None`` for silence unless standard error is a terminal."""
    wanted = os.environ.get(ENVIRONMENT, "").strip().lower()
    if wanted:
        if wanted not in _ANSWERS:
            raise ValueError(f"{ENVIRONMENT} is {wanted!r}; it must be 0 (no bars) or 1 (bars, also into a file)")
        return not _ANSWERS[wanted]
    if _disabled:
        return True
    if show is not None:
        return not show
    return False if _in_notebook() else None


def _in_notebook() -> bool:
    """Whether a Jupyter kernel runs this: someone watches, though its standard error is no terminal."""
    shell = sys.modules.get("IPython")
    running = None if shell is None else shell.get_ipython()
    return running is not None and "IPKernelApp" in running.config
