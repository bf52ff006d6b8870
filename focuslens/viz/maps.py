"""Maps of all heads of a model, by score or by kind, and heat maps of tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch, Rectangle
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator

from focuslens.viz.arrays import as_array, require_kind
from focuslens.viz.style import legend_beside, new_axes, style

__all__ = ["head_groups", "head_map", "table_heat_map"]

_MISSING = "#BBBBBB"
# These colours remain distinct in greyscale.
_GROUPS = ("#EDEDED", "#E69F00", "#0072B2", "#000000")


def head_map(
    scores: Float[np.ndarray, "layer head"],
    *,
    heads: Sequence[tuple[int, int]] = (),
    chance: Float[np.ndarray, "layer head"] | None = None,
    center: float | None = None,
    hatched: Sequence[int] = (),
    title: str = "Contextual heads",
    label: str = "contextual score (share of attention)",
    ax: Axes | None = None,
) -> Axes:
    """Heat map of a score of every head, with layer 0 at the top (figure 2 of "Focus Directions").

    Args:
        scores: Score of each head. NaN marks a missing score, which is drawn in grey.
        heads: Heads to outline, as pairs (layer, head).
        chance: Score of each head if its attention were even, such as ``scores.mean(by="chance")``. A dot then marks
            each head whose score is above it.
        center: Number that means no difference, such as 0 for the excess over chance. If given, the colour scale
            diverges from this number.
        hatched: Layers to hatch, such as those whose heads cannot see the whole prompt.
        title: The figure's title.
        label: Name of the score, with its unit.
        ax: Axes to draw on; new axes if ``None``.

    Raises:
        TypeError: If ``scores`` are no array or tensor of numbers.
        ValueError: If ``scores`` have another number of axes, a head to outline or a layer to hatch is not in
            ``scores``, or ``chance`` has another shape.
    """
    scores = as_array(scores, "scores", "layer head", "such as the mean() of contextual scores")
    n_layers, n_heads = scores.shape
    for layer, head in heads:
        if not (0 <= layer < n_layers and 0 <= head < n_heads):
            raise ValueError(
                f"head ({layer}, {head}) is not in scores of {n_layers} layers with {n_heads} heads, counted from 0"
            )
    above = None if chance is None else scores > _same_shape(as_array(chance, "chance", "layer head"), scores)
    if missing := [layer for layer in hatched if not 0 <= layer < n_layers]:
        raise ValueError(f"layer {missing[0]} is not in scores of {n_layers} layers, counted from 0")
    with style():
        ax = ax or _head_axes(n_layers, n_heads)
        cmap = plt.get_cmap("cividis" if center is None else "PuOr_r").with_extremes(bad=_MISSING)
        ends = (min(0.0, _smallest(scores)), None) if center is None else _limits(scores, center)
        image = ax.imshow(scores, cmap=cmap, aspect="auto", interpolation="nearest", vmin=ends[0], vmax=ends[1])
        if above is not None:
            rows, columns = np.nonzero(above)
            # A white dot with a black edge is visible on every colour of the map.
            size = max(2.0, min(14.0, 900 / max(n_layers, n_heads)))
            ax.scatter(columns, rows, s=size, c="white", edgecolors="black", linewidths=0.6, zorder=4)
        for layer, head in heads:
            box = Rectangle((head - 0.5, layer - 0.5), 1, 1, fill=False, ec="#B00020", lw=1.6, clip_on=False, zorder=3)
            # A dark line with white edges is visible on both the dark and the light end of the colour map.
            box.set_path_effects([withStroke(linewidth=3.4, foreground="white")])
            ax.add_patch(box)
        for layer in hatched:
            band = Rectangle((-0.5, layer - 0.5), n_heads, 1, fill=False, ec="#FFFFFF", hatch="///", lw=0, zorder=2)
            ax.add_patch(band)
        marks = [f"{len(heads)} outlined"] if heads else []
        marks += [f"{len(hatched)} layers hatched: windows"] if hatched else []
        dots = "" if above is None else f"\ndots: {int(above.sum())} heads above chance"
        _name_heads(ax, title + (f" ({'; '.join(marks)})" if marks else "") + dots)
        # The unit goes on a second line, because the label on one line can exceed the height of a small model's map.
        ax.figure.colorbar(image, ax=ax, label=label.replace(" (", "\n("))
    return ax


def head_groups(
    groups: Int[np.ndarray, "layer head"],
    names: Sequence[str],
    *,
    title: str = "Heads",
    ax: Axes | None = None,
) -> Axes:
    """Map of the kind of every head, with layer 0 at the top (figure 9 of "Focus Directions").

    Args:
        groups: Index of each head's kind, from 0. Kind 0 has the background colour.
        names: Names of the kinds. The legend adds the number of heads of each kind.
        title: The figure's title.
        ax: Axes to draw on; new axes if ``None``.

    Raises:
        ValueError: If there are more than four names, or a kind has no name.
    """
    groups = as_array(groups, "groups", "layer head")
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
        legend_beside(ax, patches)
    return ax


def _head_axes(n_layers: int, n_heads: int) -> Axes:
    return new_axes(width=min(9.0, 2.6 + 0.22 * n_heads), height=min(9.0, 1.6 + 0.22 * n_layers))


def _name_heads(ax: Axes, title: str) -> None:
    ax.grid(visible=False)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    ax.set(xlabel="head", ylabel="layer", title=title)


def table_heat_map(
    table: pd.DataFrame,
    *,
    low: pd.DataFrame | None = None,
    high: pd.DataFrame | None = None,
    label: str = "",
    title: str = "",
    x_label: str | None = None,
    y_label: str | None = None,
    digits: int = 2,
    limits: tuple[float, float] | None = None,
    center: float | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Heat map of a table. Each cell shows its number and, if intervals are given, its interval on a second line.

    Args:
        table: The numbers. A NaN cell is drawn in grey, with a dash.
        low: Lower ends of the intervals, with the shape of ``table``.
        high: Upper ends of the intervals, with the shape of ``table``.
        label: Name of the measured quantity, with its unit.
        title: The figure's title.
        x_label: Label of the horizontal axis; the default is the name of the table's columns.
        y_label: Label of the vertical axis; the default is the name of the table's index.
        digits: Number of decimals in the cells.
        limits: Minimum and maximum of the colour scale; the default is the table's minimum and maximum, or a range
            symmetric around ``center``.
        center: Number that means no change. If given, the colour scale diverges from this number.
        ax: Axes to draw on; new axes if ``None``.

    Raises:
        ValueError: If the table is empty or has a cell that is not numeric, if only one of ``low`` and ``high`` is
            given, or if the shapes differ.
    """
    values = _numbers(table, "table")
    if not values.size:
        raise ValueError(f"the table has the shape {values.shape}; there is nothing to draw")
    ends = _ends(table, low, high)
    with style():
        width, height = 1.6 + (0.75 if ends is None else 1.0) * values.shape[1], 1.4 + 0.42 * values.shape[0]
        ax = ax or new_axes(width=min(14.0, 2.0 + width), height=min(14.0, height))
        cmap = plt.get_cmap("cividis" if center is None else "PuOr_r").with_extremes(bad=_MISSING)
        smallest, largest = limits or _limits(values, center)
        image = ax.imshow(values, cmap=cmap, aspect="auto", interpolation="nearest", vmin=smallest, vmax=largest)
        for (row, column), value in np.ndenumerate(values):
            interval = None if ends is None else (float(ends[0][row, column]), float(ends[1][row, column]))
            colour: Any = image.cmap(image.norm(value)) if np.isfinite(value) else None
            text = _cell(float(value), interval, digits)
            ax.text(column, row, text, ha="center", va="center", size=8, color=_ink(colour))
        ax.set_xticks(range(values.shape[1]), [_name(label) for label in table.columns], rotation=30, ha="right")
        ax.set_yticks(range(values.shape[0]), [_name(label) for label in table.index])
        ax.grid(visible=False)
        ax.tick_params(length=0)
        x_text = _names(table.columns) if x_label is None else x_label
        ax.set(title=title, xlabel=x_text, ylabel=_names(table.index) if y_label is None else y_label)
        ax.figure.colorbar(image, ax=ax, label=label)
    return ax


def _numbers(table: pd.DataFrame, name: str) -> Float[np.ndarray, "row column"]:
    require_kind(table, pd.DataFrame, name, "pd.DataFrame(...)")
    try:
        return table.to_numpy(dtype=float, na_value=np.nan)
    except (TypeError, ValueError) as error:
        raise ValueError(f"the {name} holds cells that are not numbers ({error}); leave such columns out") from error


def _ends(
    table: pd.DataFrame, low: pd.DataFrame | None, high: pd.DataFrame | None
) -> tuple[np.ndarray, np.ndarray] | None:
    if (low is None) != (high is None):
        raise ValueError("give both ends of the intervals, low and high, or neither")
    if low is None or high is None:
        return None
    if not low.shape == high.shape == table.shape:
        raise ValueError(f"low has the shape {low.shape} and high {high.shape}; the table has {table.shape}")
    return _numbers(low, "lower end"), _numbers(high, "upper end")


def _limits(values: Float[np.ndarray, "row column"], center: float | None) -> tuple[float, float]:
    finite = values[np.isfinite(values)]
    if not finite.size:
        return 0.0, 1.0
    if center is not None:
        reach = float(np.abs(finite - center).max()) or 1.0
        return center - reach, center + reach
    smallest, largest = float(finite.min()), float(finite.max())
    return smallest, largest if largest > smallest else smallest + 1.0


def _cell(value: float, ends: tuple[float, float] | None, digits: int) -> str:
    if not np.isfinite(value):
        return "-"
    interval = "" if ends is None else f"\n[{ends[0]:.{digits}f}, {ends[1]:.{digits}f}]"
    return f"{value:.{digits}f}{interval}"


def _ink(colour: tuple[float, float, float, float] | None) -> str:
    """Text colour that contrasts with a cell's colour: black or white. Text on a missing cell (``None``) is black."""
    if colour is None:
        return "black"
    red, green, blue, _ = colour
    return "white" if 0.299 * red + 0.587 * green + 0.114 * blue < 0.5 else "black"


def _names(axis: pd.Index) -> str:
    return " / ".join(str(name) for name in axis.names if name is not None)


def _name(label: object) -> str:
    return " / ".join(map(str, label)) if isinstance(label, tuple) else str(label)


def _same_shape(chance: Float[np.ndarray, "_ _"], scores: Float[np.ndarray, "_ _"]) -> Float[np.ndarray, "_ _"]:
    if chance.shape != scores.shape:
        raise ValueError(
            f"chance has the shape {chance.shape}, and scores have {scores.shape}; give one value per head"
        )
    return chance


def _smallest(scores: Float[np.ndarray, "layer head"]) -> float:
    finite = scores[np.isfinite(scores)]
    return float(finite.min()) if finite.size else 0.0
