"""Line plots: accuracy against a swept parameter, and training loss against epochs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Literal, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from focuslens.viz.arrays import as_array, require_kind
from focuslens.viz.style import COLOURS, legend_beside, line_look, new_axes, style

__all__ = [
    "Curve",
    "IntervalLike",
    "direction_curves",
    "loss_curves",
    "split_softmax_curves",
    "sweep_curves",
]

_BASELINES = (("#000000", "--"), ("#5A5A5A", ":"), ("#8A8A8A", "-."), ("#5A5A5A", (0, (6, 2, 1, 2, 1, 2))))
_MOST_NAMED_LINES = 8


@runtime_checkable
class IntervalLike(Protocol):
    """An estimate with a confidence interval, such as :class:`focuslens.evaluation.Interval`."""

    @property
    def mean(self) -> float:
        """Point estimate."""
        ...

    @property
    def low(self) -> float:
        """Lower end of the interval."""
        ...

    @property
    def high(self) -> float:
        """Upper end of the interval."""
        ...


@dataclass(frozen=True)
class Curve:
    """One curve of a sweep: an estimate with an interval at each value of ``x``.

    Args:
        label: Name of the curve in the legend.
        x: Values of the swept parameter, in any order.
        estimate: Estimate at each ``x``.
        low: Lower end of the interval at each ``x``.
        high: Upper end of the interval at each ``x``.

    Raises:
        ValueError: If the lengths differ or are 0, or an estimate lies outside its interval.
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
        """Curve from pairs ``(x, interval)``."""
        x, intervals = zip(*points, strict=True)
        estimate, low, high = zip(
            *((interval.mean, interval.low, interval.high) for interval in intervals), strict=True
        )
        return cls(label, x, estimate, low, high)


def split_softmax_curves(
    curves: Sequence[Curve],
    baselines: Mapping[str, IntervalLike] | None = None,
    *,
    title: str = "Split-softmax",
    ax: Axes | None = None,
) -> Axes:
    """Accuracy against the number of heads, with one curve per ``tau`` (figure 3 of "Focus Directions").

    See :func:`sweep_curves` for the arguments.
    """
    return sweep_curves(curves, baselines, x_label="heads changed (top k)", title=title, ax=ax)


def direction_curves(
    curves: Sequence[Curve],
    baselines: Mapping[str, IntervalLike] | None = None,
    *,
    title: str = "Focus directions",
    ax: Axes | None = None,
) -> Axes:
    """Accuracy against the number of heads, with one curve per ``alpha`` (figure 4 of "Focus Directions").

    See :func:`sweep_curves` for the arguments.
    """
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
    """Curves with interval bands against a swept parameter, and baselines as horizontal lines with bands.

    Args:
        curves: The curves to draw.
        baselines: Interval of each baseline, by the baseline's name.
        x_label: Name of the swept parameter, with its unit.
        y_label: Name of the measured quantity, with its unit.
        x_scale: Scale of the horizontal axis. ``category`` spaces the values of ``x`` equally, so that 1, 2, 5, 20 and
            600 are all legible.
        title: The figure's title.
        ax: Axes to draw on; new axes if ``None``.

    Raises:
        ValueError: If there are no curves, or the scale is logarithmic and a value of ``x`` is not positive.
    """
    if not curves:
        raise ValueError("there are no curves to draw; give at least one")
    require_kind(curves, Sequence, "curves", "[Curve(...)], or fl.viz.curves(sweep, 'tau')")
    for i, curve in enumerate(curves):
        require_kind(curve, Curve, f"curves[{i}]", "Curve(...); fl.viz.curves(sweep, 'tau') makes them of a sweep")
    values = sorted({x for curve in curves for x in curve.x})
    if x_scale == "log" and values[0] <= 0:
        raise ValueError(f"x = {values[0]:g} has no place on a logarithmic scale; use 'category' or 'linear'")
    place = {x: float(index) if x_scale == "category" else x for index, x in enumerate(values)}
    with style():
        ax = ax or new_axes()
        ax.set_xscale("log" if x_scale == "log" else "linear")
        for (name, level), (colour, dash) in zip((baselines or {}).items(), cycle(_BASELINES), strict=False):
            ax.axhspan(level.low, level.high, color=colour, alpha=0.07, lw=0)
            ax.axhline(level.mean, color=colour, ls=dash, lw=1.3, label=name)
        for index, curve in enumerate(curves):
            _draw(ax, curve, place, index)
        ax.set_xticks(list(place.values()), [f"{x:g}" for x in values])
        ax.minorticks_off()
        ax.set(xlabel=x_label, ylabel=y_label, title=title)
        legend_beside(ax)
    return ax


def loss_curves(
    losses: Float[np.ndarray, "epoch n"],
    labels: Sequence[str],
    *,
    title: str = "Training of focus directions",
    ax: Axes | None = None,
) -> Axes:
    """Training loss by epoch, with one line per head.

    If there are more than eight heads, the lines are thin and have no labels, and the figure adds the median and
    quartiles over heads.

    Args:
        losses: Mean loss per epoch and head. A head's loss is its negative contextual score.
        labels: Names of the heads.
        title: The figure's title.
        ax: Axes to draw on; new axes if ``None``.

    Raises:
        ValueError: If ``losses`` is empty, or ``labels`` does not have one label per column of ``losses``.
    """
    losses = as_array(losses, "losses", "epoch n", "such as directions.losses")
    n_epochs, n_lines = losses.shape
    if not losses.size or n_lines != len(labels):
        raise ValueError(
            f"losses have shape {losses.shape} [epoch n] and there are {len(labels)} labels; give n labels"
        )
    epochs = np.arange(1, n_epochs + 1)
    with style():
        ax = ax or new_axes()
        if n_lines <= _MOST_NAMED_LINES:
            for index, label in enumerate(labels):
                ax.plot(epochs, losses[:, index], label=label, **line_look(index))
        else:
            ax.plot(epochs, losses, color=COLOURS[-1], lw=0.8, alpha=0.5)
            low, high = np.quantile(losses, (0.25, 0.75), axis=1)
            ax.fill_between(epochs, low, high, color=COLOURS[0], alpha=0.2, lw=0, label="middle half of the heads")
            ax.plot(epochs, np.median(losses, axis=1), color=COLOURS[0], marker="o", label=f"median of {n_lines} heads")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        ax.set(xlabel="epoch", ylabel="loss (minus the contextual score)", title=title)
        legend_beside(ax)
    return ax


def _draw(ax: Axes, curve: Curve, place: Mapping[float, float], index: int) -> None:
    order = np.argsort(curve.x)
    x = [place[curve.x[i]] for i in order]
    estimate, low, high = (np.asarray(values)[order] for values in (curve.estimate, curve.low, curve.high))
    look = line_look(index)
    if len(x) == 1:
        # A band over a single value of x has no width, so a vertical line replaces it.
        ax.vlines(x, low, high, color=look["color"], alpha=0.4, lw=3)
    ax.fill_between(x, low, high, color=look["color"], alpha=0.13, lw=0)
    ax.plot(x, estimate, label=curve.label, **look)
