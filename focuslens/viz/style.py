"""Style of all figures, legible in greyscale and to colour-blind readers, and helpers to create and save figures."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from focuslens.util.files import write_atomically

__all__ = ["COLOURS", "DASHES", "HATCHES", "MARKERS", "legend_beside", "line_look", "new_axes", "save_figure", "style"]

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Colours of Okabe and Ito, roughly from dark to light. Colour-blind readers can distinguish them."""

MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES: tuple[Any, ...] = ("-", "--", "-.", (0, (1, 1)), (0, (6, 2, 1, 2, 1, 2)))
HATCHES = ("", "//", "..", "xx", "--", "oo")

_STYLE: Any = {
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": "medium",
    "axes.titleweight": "bold",
    "figure.figsize": (6.4, 4.0),
    "font.family": "DejaVu Sans",  # bundled with matplotlib, so that figures are the same on every machine
    "font.size": 10,
    "grid.alpha": 0.6,
    "grid.color": "#D0D0D0",
    "grid.linewidth": 0.6,
    "legend.fontsize": "small",
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
}


@contextmanager
def style() -> Generator[None]:
    """Context manager that gives figures the style of FocusLens."""
    # `matplotlib.rc_context` restores every setting on exit, including interactive mode. In a notebook, the first
    # figure loads a backend that turns interactive mode on. Turning this mode off on exit would hide all later figures.
    before = {name: plt.rcParams[name] for name in _STYLE}
    try:
        plt.rcParams.update(_STYLE)
        yield
    finally:
        plt.rcParams.update(before)


def line_look(index: int) -> dict[str, Any]:
    """Colour, marker and dash pattern of line number ``index``. The first 168 lines all look different."""
    return {
        "color": COLOURS[index % len(COLOURS)],
        "marker": MARKERS[index % len(MARKERS)],
        "ls": DASHES[index // len(COLOURS) % 4],
    }


def new_axes(width: float = 6.4, height: float = 4.0) -> Axes:
    """Axes of a new figure. ``width`` and ``height`` are in inches."""
    return plt.subplots(figsize=(width, height), layout="constrained")[1]


def legend_beside(ax: Axes, handles: Sequence[Artist] | None = None) -> None:
    """Add a legend to the right of the axes, for all labelled artists or for ``handles``."""
    ax.legend(handles=handles, loc="upper left", bbox_to_anchor=(1.0, 1.0), borderaxespad=0.2)


def save_figure(figure: Axes | Figure, path: str | Path) -> Path:
    """Write a figure atomically as a PNG with 150 dots per inch, and return its path.

    For axes, the whole figure that contains them is written. Equal figures give equal bytes.

    Raises:
        ValueError: If ``path`` does not end in ``.png``, or the axes no longer belong to a figure.
    """
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise ValueError(f"figures are written as PNG, and {path.name!r} does not end in .png")
    whole = figure.get_figure(root=True) if isinstance(figure, Axes) else figure
    if whole is None:
        raise ValueError("these axes are not part of a figure any more, so there is nothing to save")
    buffer = BytesIO()
    # The "Software" entry contains matplotlib's version, so the file would change with every release.
    whole.savefig(buffer, format="png", dpi=150, bbox_inches="tight", facecolor="white", metadata={"Software": None})
    write_atomically(path, buffer.getvalue())
    return path
