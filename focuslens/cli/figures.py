"""Figures of commands. Without the libraries that draw them, results are written all the same."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["can_draw", "note_figures", "save_drawn"]

_LOG = logging.getLogger(__name__)


def note_figures(out: object) -> None:
    """Say before any work starts that figures will be left out of ``--out``, and what to install for them."""
    if out is not None and (missing := _missing()) is not None:
        _LOG.warning("figures are left out: %s", missing)


def can_draw() -> bool:
    """Whether the libraries for figures are installed."""
    return _missing() is None


def save_drawn(draw: Callable[[], Any], path: Path) -> list[Path]:
    """Save the figure that ``draw`` returns, and return its path. Without the libraries for figures, return no path."""
    if not can_draw():
        return []
    from focuslens.viz import save_figure

    save_figure(draw(), path)
    return [path]


def _missing() -> str | None:
    """What is not installed, with the command that installs it; ``None`` if nothing is missing."""
    try:
        import focuslens.viz  # noqa: F401  # pyright: ignore[reportUnusedImport]
    except ImportError as error:
        return str(error)
    return None
