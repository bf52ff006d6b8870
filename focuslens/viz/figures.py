"""Figures, in one style: readable in grey and by the colour-blind, with units on every axis.

Every function draws on the axes it is given, or on new ones, and returns them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from io import BytesIO
from itertools import cycle
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import matplotlib.pyplot as plt
import numpy as np
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator

from focuslens.files import write_atomically

__all__ = [
    "Curve",
    "IntervalLike",
    "direction_curves",
    "head_groups",
    "head_map",
    "loss_curves",
    "save_figure",
    "split_softmax_curves",
    "style",
    "sweep_curves",
]

# Okabe and Ito's colours, darkest first; each line also has a marker and a dash of its own.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_DASHES = ("-", "--", "-.", (0, (1, 1)))
_BASELINES = (("#000000", "--"), ("#5A5A5A", ":"), ("#8A8A8A", "-."), ("#5A5A5A", (0, (6, 2, 1, 2, 1, 2))))
# As different in grey as in colour.
_GROUPS = ("#EDEDED", "#E69F00", "#0072B2", "#000000")
_MOST_NAMED_LINES = 8

_STYLE: Any = {
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": "medium",
    "axes.titleweight": "bold",
    "figure.figsize": (6.4, 4.0),
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same picture on every machine
    "font.size": 10,
    "grid.alpha": 0.6,
    "grid.color": "#D0D0D0",
    "grid.linewidth": 0.6,
    "legend.fontsize": "small",
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
}


@runtime_checkable
class IntervalLike(Protocol):
    """A number with its confidence interval, such as :class:`focuslens.evaluation.Interval`."""

    @property
    def mean(self) -> float:
        """The estimate."""
        ...

    @property
    def low(self) -> float:
        """The interval's lower end."""
        ...

    @property
    def high(self) -> float:
        """The interval's upper end."""
        ...


@dataclass(frozen=True)
class Curve:
    """One line of a sweep: an estimate with its interval at every ``x``.

    Args:
        label: Its name in the legend.
        x: Where it was measured; of any order.
        estimate: The estimates, one for each ``x``.
        low: Lower ends of their intervals.
        high: Upper ends.

    Raises:
        ValueError: If the four differ in length, are empty, or an estimate lies outside its interval.
    """

    label: str
    x: tuple[float, ...]
    estimate: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]

    def __post_init__(self) -> None:
        lengths = {name: len(getattr(self, name)) for name in ("x", "estimate", "low", "high")}
        if not self.x or len(set(lengths.values())) > 1:
            raise ValueError(f"curve {self.label!r} has lengths {lengths}; they must be the same, and not 0")
        for x, low, estimate, high in zip(self.x, self.low, self.estimate, self.high, strict=True):
            if not low - 1e-9 <= estimate <= high + 1e-9:
                raise ValueError(
                    f"curve {self.label!r} at x = {x:g}: the estimate {estimate:g} lies outside its interval "
                    f"[{low:g}, {high:g}]"
                )

    @classmethod
    def from_intervals(cls, label: str, points: Iterable[tuple[float, IntervalLike]]) -> Curve:
        """A curve from pairs of ``x`` and the interval measured there."""
        x, intervals = zip(*points, strict=True)
        estimate, low, high = zip(
            *((interval.mean, interval.low, interval.high) for interval in intervals), strict=True
        )
        return cls(label, x, estimate, low, high)


def style() -> AbstractContextManager[None]:
    """The style of the figures here, as a context manager, for figures of your own."""
    return plt.rc_context(_STYLE)


def head_map(
    scores: Float[np.ndarray, "layer head"],
    *,
    heads: Sequence[tuple[int, int]] = (),
    title: str = "Contextual heads",
    label: str = "contextual score (share of attention)",
    ax: Axes | None = None,
) -> Axes:
    """A score for every head of a model, layers downward (figure 2 of "Focus Directions").

    Args:
        scores: Score of each head; NaN where there is none, drawn as grey.
        heads: Heads to outline, as (layer, head).
        title: The figure's title.
        label: What a score is, with its unit.
        ax: Axes to draw on; new ones if ``None``.

    Raises:
        ValueError: If a head to outline is not in ``scores``.
    """
    n_layers, n_heads = scores.shape
    for layer, head in heads:
        if not (0 <= layer < n_layers and 0 <= head < n_heads):
            raise ValueError(
                f"head ({layer}, {head}) is not in scores of {n_layers} layers with {n_heads} heads, counted from 0"
            )
    with style():
        ax = ax or _head_axes(n_layers, n_heads)
        cmap = plt.get_cmap("cividis").with_extremes(bad="#BBBBBB")
        image = ax.imshow(scores, cmap=cmap, aspect="auto", interpolation="nearest", vmin=min(0.0, _smallest(scores)))
        for layer, head in heads:
            box = Rectangle((head - 0.5, layer - 0.5), 1, 1, fill=False, ec="#B00020", lw=1.6, clip_on=False, zorder=3)
            # Dark within white, so that an outline shows on both ends of the colour map.
            box.set_path_effects([withStroke(linewidth=3.4, foreground="white")])
            ax.add_patch(box)
        outlined = f" ({len(heads)} outlined)" if heads else ""
        _name_heads(ax, title + outlined)
        # Its unit goes below it: the map of a small model is not as high as the whole is long.
        ax.figure.colorbar(image, ax=ax, label=label.replace(" (", "\n("))
    return ax


def head_groups(
    groups: Int[np.ndarray, "layer head"],
    names: Sequence[str],
    *,
    title: str = "Heads",
    ax: Axes | None = None,
) -> Axes:
    """Which of a few kinds every head of a model is of, layers downward (figure 9 of "Focus Directions").

    Args:
        groups: The kind of each head, from 0; the kind 0 is drawn as background.
        names: Of the kinds; the legend says how many heads are of each.
        title: The figure's title.
        ax: Axes to draw on; new ones if ``None``.

    Raises:
        ValueError: If there are more names than colours, or a kind has no name.
    """
    if len(names) > len(_GROUPS):
        raise ValueError(f"there are {len(names)} kinds of heads and {len(_GROUPS)} colours for them")
    if groups.size and not 0 <= groups.min() <= groups.max() < len(names):
        raise ValueError(f"kinds go from {groups.min()} to {groups.max()}, and there are {len(names)} names")
    with style():
        ax = ax or _head_axes(*groups.shape)
        cmap = ListedColormap(_GROUPS[: len(names)])
        ax.imshow(groups, cmap=cmap, aspect="auto", interpolation="nearest", vmin=0, vmax=len(names) - 1)
        _name_heads(ax, title)
        patches = [
            Patch(facecolor=colour, edgecolor="#8A8A8A", label=f"{name} ({int((groups == kind).sum())})")
            for kind, (name, colour) in enumerate(zip(names, _GROUPS, strict=False))
        ]
        ax.legend(handles=patches, loc="upper left", bbox_to_anchor=(1.0, 1.0), borderaxespad=0.2)
    return ax


def _head_axes(n_layers: int, n_heads: int) -> Axes:
    return _new_axes(width=min(9.0, 2.6 + 0.22 * n_heads), height=min(9.0, 1.6 + 0.22 * n_layers))


def _name_heads(ax: Axes, title: str) -> None:
    ax.grid(visible=False)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    ax.set(xlabel="head", ylabel="layer", title=title)


def split_softmax_curves(
    curves: Sequence[Curve],
    baselines: Mapping[str, IntervalLike] | None = None,
    *,
    title: str = "Split-softmax",
    ax: Axes | None = None,
) -> Axes:
    """Accuracy over the number of heads, one curve a ``tau`` (figure 3); see :func:`sweep_curves`."""
    return sweep_curves(curves, baselines, x_label="heads changed (top k)", title=title, ax=ax)


def direction_curves(
    curves: Sequence[Curve],
    baselines: Mapping[str, IntervalLike] | None = None,
    *,
    title: str = "Focus directions",
    ax: Axes | None = None,
) -> Axes:
    """Accuracy over the number of heads, one curve an ``alpha`` (figure 4); see :func:`sweep_curves`."""
    return sweep_curves(curves, baselines, x_label="heads steered (top k)", title=title, ax=ax)


def sweep_curves(
    curves: Sequence[Curve],
    baselines: Mapping[str, IntervalLike] | None = None,
    *,
    x_label: str,
    y_label: str = "exact match (share of samples)",
    x_scale: Literal["category", "linear", "log"] = "category",
    title: str = "",
    ax: Axes | None = None,
) -> Axes:
    """Lines with interval bands over a swept setting, and the settings they compare with as level lines.

    Args:
        curves: The lines.
        baselines: Level lines by name, each with its interval.
        x_label: What was swept, with its unit.
        y_label: What was measured, with its unit.
        x_scale: ``category`` puts all values of ``x`` at equal distances, so that 1, 2, 5, 20 and 600 can all be read.
        title: The figure's title.
        ax: Axes to draw on; new ones if ``None``.

    Raises:
        ValueError: If there is nothing to draw, or a logarithmic scale is asked for values that are not positive.
    """
    if not curves:
        raise ValueError("there are no curves to draw; give at least one")
    values = sorted({x for curve in curves for x in curve.x})
    if x_scale == "log" and values[0] <= 0:
        raise ValueError(f"x = {values[0]:g} has no place on a logarithmic scale; use 'category' or 'linear'")
    place = {x: float(index) if x_scale == "category" else x for index, x in enumerate(values)}
    with style():
        ax = ax or _new_axes()
        ax.set_xscale("log" if x_scale == "log" else "linear")
        for (name, level), (colour, dash) in zip((baselines or {}).items(), cycle(_BASELINES), strict=False):
            ax.axhspan(level.low, level.high, color=colour, alpha=0.07, lw=0)
            ax.axhline(level.mean, color=colour, ls=dash, lw=1.3, label=name)
        for index, curve in enumerate(curves):
            _draw(ax, curve, place, index)
        ax.set_xticks(list(place.values()), [f"{x:g}" for x in values])
        ax.minorticks_off()
        ax.set(xlabel=x_label, ylabel=y_label, title=title)
        ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), borderaxespad=0.2)
    return ax


def loss_curves(
    losses: Float[np.ndarray, "epoch n"],
    labels: Sequence[str],
    *,
    title: str = "Training of focus directions",
    ax: Axes | None = None,
) -> Axes:
    """Training loss by epoch, one line a head; many heads are drawn thin, with their median.

    Args:
        losses: Mean loss of each epoch, for every head: minus its contextual score.
        labels: The heads' names.
        title: The figure's title.
        ax: Axes to draw on; new ones if ``None``.

    Raises:
        ValueError: If there are no losses, or not one label for each column.
    """
    n_epochs, n_lines = losses.shape
    if not losses.size or n_lines != len(labels):
        raise ValueError(
            f"losses have shape {losses.shape} [epoch n] and there are {len(labels)} labels; give n of them"
        )
    epochs = np.arange(1, n_epochs + 1)
    with style():
        ax = ax or _new_axes()
        if n_lines <= _MOST_NAMED_LINES:
            for index, label in enumerate(labels):
                ax.plot(epochs, losses[:, index], label=label, **_line(index))
        else:
            ax.plot(epochs, losses, color=_COLOURS[-1], lw=0.8, alpha=0.5)
            ax.plot(
                epochs, np.median(losses, axis=1), color=_COLOURS[0], marker="o", label=f"median of {n_lines} heads"
            )
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        ax.set(xlabel="epoch", ylabel="loss (minus the contextual score)", title=title)
        ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), borderaxespad=0.2)
    return ax


def save_figure(figure: Axes | Figure, path: str | Path) -> Path:
    """Write a figure, or the figure that axes are part of, as PNG at 150 dots per inch, whole or not at all.

    The same data drawn and saved again give the same bytes.

    Raises:
        ValueError: If ``path`` does not end in ``.png``.
    """
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise ValueError(f"figures are written as PNG, and {path.name!r} does not end in .png")
    whole = figure.get_figure(root=True) if isinstance(figure, Axes) else figure
    if whole is None:
        raise ValueError("these axes are not part of a figure any more, so there is nothing to save")
    buffer = BytesIO()
    # Without the "Software" entry the file would change with every release of matplotlib.
    whole.savefig(buffer, format="png", dpi=150, bbox_inches="tight", facecolor="white", metadata={"Software": None})
    write_atomically(path, buffer.getvalue())
    return path


def _new_axes(width: float = 6.4, height: float = 4.0) -> Axes:
    return plt.subplots(figsize=(width, height), layout="constrained")[1]


def _smallest(scores: Float[np.ndarray, "layer head"]) -> float:
    finite = scores[np.isfinite(scores)]
    return float(finite.min()) if finite.size else 0.0


def _line(index: int) -> dict[str, Any]:
    """Colour, marker and dash of the n-th line: no two of the first dozens share all three."""
    return {
        "color": _COLOURS[index % len(_COLOURS)],
        "marker": _MARKERS[index % len(_MARKERS)],
        "ls": _DASHES[index // len(_COLOURS) % len(_DASHES)],
    }


def _draw(ax: Axes, curve: Curve, place: Mapping[float, float], index: int) -> None:
    order = np.argsort(curve.x)
    x = [place[curve.x[i]] for i in order]
    estimate, low, high = (np.asarray(values)[order] for values in (curve.estimate, curve.low, curve.high))
    look = _line(index)
    if len(x) == 1:
        # A band over a single place has no area.
        ax.vlines(x, low, high, color=look["color"], alpha=0.4, lw=3)
    ax.fill_between(x, low, high, color=look["color"], alpha=0.13, lw=0)
    ax.plot(x, estimate, label=curve.label, **look)
