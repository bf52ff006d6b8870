"""Figures about focus directions: norms, rotary frequencies, depths of heads, and effects of content and position.

The figures use the style of :mod:`focuslens.viz.style`. Each function draws on ``ax``, or on new axes if ``ax`` is
``None``, and returns the axes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from focuslens.viz.arrays import as_array, as_arrays
from focuslens.viz.style import COLOURS, DASHES, HATCHES, legend_beside, new_axes, style

__all__ = ["depth_profiles", "frequency_profiles", "norms_by_rank", "position_biases", "variance_parts"]


def norms_by_rank(
    query: Float[np.ndarray, "rank"],
    key: Float[np.ndarray, "rank"],
    *,
    noise: float | None = None,
    top: int | None = None,
    title: str = "Norms of the directions",
    ax: Axes | None = None,
) -> Axes:
    """Norms of each head's query direction ``d_Q`` and key direction ``d_K`` against the head's rank, on log scales.

    Args:
        query: Norm of each head's ``d_Q``, from the head with the highest contextual score to the lowest.
        key: Norm of each head's ``d_K``, in the order of ``query``.
        noise: Norm of the random initial vectors in training, drawn as a horizontal line.
        top: Number of heads that count as contextual. A vertical line separates these heads from the rest.
        title: The figure's title.
        ax: Axes to draw on; new axes if ``None``.

    Raises:
        ValueError: If ``query`` and ``key`` are empty or differ in length, or a norm is not positive.
    """
    query, key = as_array(query, "query", "rank"), as_array(key, "key", "rank")
    if not len(query) or len(query) != len(key):
        raise ValueError(f"there are {len(query)} norms of d_Q and {len(key)} of d_K; give one of each for every head")
    if min(query.min(), key.min()) <= 0:
        raise ValueError("a norm is not positive, so it has no place on a logarithmic scale")
    ranks = np.arange(1, len(query) + 1)
    with style():
        ax = ax or new_axes()
        for norms, label, colour, marker in ((query, "$d_Q$", COLOURS[0], "o"), (key, "$d_K$", COLOURS[1], "^")):
            ax.plot(ranks, norms, color=colour, marker=marker, ls="none", ms=3.2, alpha=0.7, label=label)
        if noise is not None:
            ax.axhline(noise, color="#000000", ls="--", lw=1.3, label=f"initial noise ({noise:.2f})")
        if top is not None:
            ax.axvline(top + 0.5, color="#5A5A5A", ls=":", lw=1.3, label=f"top {top}")
        ax.set(xscale="log", yscale="log", title=title, xlabel="rank of the head (1: highest score)", ylabel="norm")
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_major_formatter(StrMethodFormatter("{x:g}"))
        legend_beside(ax)
    return ax


def frequency_profiles(
    shares: Mapping[str, Float[np.ndarray, "_pair"]],
    *,
    title: str = "Energy by rotary frequency",
    ax: Axes | None = None,
) -> Axes:
    """Energy of each vector by rotary frequency, from the fastest to the slowest, with one line per vector.

    A vector whose energy is spread evenly over the frequencies has the value 1 at every frequency.

    Args:
        shares: Share of each vector's energy in each rotary pair, by the vector's name. Leave out dimensions that are
            not rotated.
        title: The figure's title.
        ax: Axes to draw on; new axes if ``None``.

    Raises:
        ValueError: If ``shares`` is empty.
    """
    with style():
        ax = _profiles(shares, ax)
        ax.axhline(1, color="#000000", lw=1, ls=":")
        for quarter in (0.25, 0.5, 0.75):
            ax.axvline(quarter, color="#8A8A8A", lw=0.8)
        ax.set(
            title=title, xlabel="rotary pairs, fastest first (share of all pairs)", ylabel="energy (even spread = 1)"
        )
    return ax


def depth_profiles(
    shares: Mapping[str, Float[np.ndarray, "_bin"]], *, title: str = "Depth of the best heads", ax: Axes | None = None
) -> Axes:
    """Density of heads by depth, in equal bins from the first layer to the last, with one line per model.

    Heads that are spread evenly over the layers have the value 1 in every bin.

    Args:
        shares: Share of each model's heads in each bin, by the model's name.
        title: The figure's title.
        ax: Axes to draw on; new axes if ``None``.

    Raises:
        ValueError: If ``shares`` is empty.
    """
    with style():
        ax = _profiles(shares, ax)
        ax.axhline(1, color="#000000", lw=1, ls=":")
        ax.set(title=title, xlabel="depth (layer / number of layers)", ylabel="heads (even spread = 1)")
    return ax


def position_biases(
    positions: Int[np.ndarray, "pos"],
    biases: Mapping[str, Float[np.ndarray, "pos"]],
    *,
    title: str = "Bias by position at fixed content",
    ax: Axes | None = None,
) -> Axes:
    """Bias that each direction adds to the logit of a key with fixed content, by the key's position.

    Each line is centred at 0, because softmax ignores a constant that is added to all logits.

    Args:
        positions: Absolute positions of the key, in ascending order.
        biases: Bias at each position, in logits, by the direction's name.
        title: The figure's title.
        ax: Axes to draw on; new axes if ``None``.

    Raises:
        ValueError: If ``biases`` is empty, or the bias of a direction does not have one value per position.
    """
    positions, biases = as_array(positions, "positions", "pos"), as_arrays(biases, "biases", "pos")
    _require_lines(biases)
    for name, bias in biases.items():
        if len(bias) != len(positions):
            raise ValueError(f"{name!r} has {len(bias)} values for {len(positions)} positions; give one for each")
    with style():
        ax = ax or new_axes()
        for index, (name, bias) in enumerate(biases.items()):
            ax.plot(positions, bias - bias.mean(), label=name, **_look(index))
        ax.set(
            title=title, xlabel="position of the key (tokens)", ylabel="bias minus its mean (logits at $\\alpha$ = 1)"
        )
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        legend_beside(ax)
    return ax


def variance_parts(
    labels: Sequence[str],
    content: Float[np.ndarray, "n"],
    position: Float[np.ndarray, "n"],
    interaction: Float[np.ndarray, "n"],
    *,
    title: str = "Variance of the bias",
    ax: Axes | None = None,
) -> Axes:
    """Variance of each head's bias, split into shares of content, position and their interaction, as one bar per head.

    Args:
        labels: Names of the heads, from top to bottom.
        content: Variance due to content, per head.
        position: Variance due to position, per head.
        interaction: Variance due to the interaction of content and position, per head.
        title: The figure's title.
        ax: Axes to draw on; new axes if ``None``.

    Raises:
        ValueError: If there are no heads, or the arguments differ in length.
    """
    parts = as_arrays({"content": content, "position": position, "interaction": interaction}, "parts", "n")
    lengths = {"labels": len(labels), **{name: len(values) for name, values in parts.items()}}
    if not labels or len(set(lengths.values())) > 1:
        raise ValueError(f"lengths are {lengths}; they must be the same, and not 0")
    places, left = np.arange(len(labels)), np.zeros(len(labels))
    whole = sum(parts.values(), np.zeros(len(labels)))
    with style():
        ax = ax or new_axes(height=min(9.0, 1.6 + 0.28 * len(labels)))
        for (name, values), colour, hatch in zip(parts.items(), COLOURS, HATCHES, strict=False):
            share = np.divide(values, whole, out=np.zeros(len(labels)), where=whole > 0)
            ax.barh(places, share, left=left, color=colour, hatch=hatch, ec="white", lw=0.5, label=name)
            left += share
        ax.set_yticks(places, labels)
        ax.invert_yaxis()
        ax.grid(visible=False, axis="y")
        ax.set(xlim=(0, 1), title=title, xlabel="share of the variance of the bias")
        legend_beside(ax)
    return ax


def _profiles(shares: Mapping[str, Float[np.ndarray, "_cell"]], ax: Axes | None) -> Axes:
    """Draw each vector of shares as a density over [0, 1] with one step per share, and return the axes."""
    shares = as_arrays(shares, "shares", "pair")
    _require_lines(shares)
    ax = ax or new_axes()
    for index, (name, share) in enumerate(shares.items()):
        ax.stairs(share * len(share), np.linspace(0, 1, len(share) + 1), label=name, **_look(index))
    ax.set(xlim=(0, 1), ylim=(0, None))
    legend_beside(ax)
    return ax


def _require_lines(lines: Mapping[str, Any]) -> None:
    if not lines:
        raise ValueError("there is nothing to draw; give at least one line")


def _look(index: int) -> dict[str, Any]:
    """Style of line number ``index``. Any two of the first thirty lines differ in colour or dash pattern."""
    return {"color": COLOURS[index % len(COLOURS)], "ls": DASHES[index % len(DASHES)], "lw": 1.8}
