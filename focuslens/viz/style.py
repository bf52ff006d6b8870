"""The style of all figures, readable in greyscale and by colour-blind readers, and a function that saves figures."""

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
"""Okabe and Ito's colours, darkest first. Colour-blind readers can tell them apart."""

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
    "font.family": "DejaVu Sans",  # comes with matplotlib, so a picture is the same on every machine
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
    # matplotlib's own context manager restores every setting at its end, interactive mode included. A notebook's
    # backend switches interactive mode on when the first figure loads it. Switching it off again would hide all later
    # figures.
    before = {name: plt.rcParams[name] for name in _STYLE}
    try:
        plt.rcParams.update(_STYLE)
        yield
    finally:
        plt.rcParams.update(before)


def line_look(index: int) -> dict[str, Any]:
    """Colour, marker and dash of the line with an index. The first dozens of lines differ in at least one of these."""
    return {
        "color": COLOURS[index % len(COLOURS)],
        "marker": MARKERS[index % len(MARKERS)],
        "ls": DASHES[index // len(COLOURS) % 4],
    }


def new_axes(width: float = 6.4, height: float = 4.0) -> Axes:
    """Axes of a new figure."""
    return plt.subplots(figsize=(width, height), layout="constrained")[1]


def legend_beside(ax: Axes, handles: Sequence[Artist] | None = None) -> None:
    """Add a legend to the right of the axes, for all labelled artists or for ``handles``."""
    ax.legend(handles=handles, loc="upper left", bbox_to_anchor=(1.0, 1.0), borderaxespad=0.2)


def save_figure(figure: Axes | Figure, path: str | Path) -> Path:
    """Write a figure, or the figure that contains some axes, atomically as a PNG with 150 dots per inch.

    Equal data give equal bytes.

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
    # The "Software" entry would change the file with every release of matplotlib.
    whole.savefig(buffer, format="png", dpi=150, bbox_inches="tight", facecolor="white", metadata={"Software": None})
    write_atomically(path, buffer.getvalue())
    return path
