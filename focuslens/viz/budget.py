"""Figure of the attention budget: the share of attention on each part of a prompt, with intervals."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from focuslens.viz.arrays import require_kind
from focuslens.viz.lines import IntervalLike
from focuslens.viz.style import legend_beside, line_look, new_axes, style

__all__ = ["budget_shares"]


def budget_shares(
    shares: Mapping[str, Mapping[str, IntervalLike | float]],
    *,
    title: str = "Attention budget",
    x_label: str = "share of the response's attention",
    ax: Axes | None = None,
) -> Axes:
    """Share of the response's attention on each part of the prompt, with one marker and one interval per setting.

    Args:
        shares: Shares of the parts by setting: ``{setting: {part: share}}``. A share is a number or an interval.
            :meth:`focuslens.AttentionBudget.intervals` returns the shares of one setting. The parts are drawn in the
            order of the first setting.
        title: The figure's title.
        x_label: Label of the horizontal axis, which shows the shares.
        ax: Axes to draw on; new axes if ``None``.

    Raises:
        ValueError: If ``shares`` or a setting in it is empty, or the settings have different parts.
    """
    require_kind(shares, Mapping, "shares", "{'baseline': budget.intervals()}")
    for name, by_part in shares.items():
        require_kind(by_part, Mapping, f"shares[{name!r}]", "budget.intervals()")
    if not shares or not all(shares.values()):
        raise ValueError("there are no shares to draw; give at least one setting with at least one part")
    parts = list(next(iter(shares.values())))
    for name, by_part in shares.items():
        if set(by_part) != set(parts):
            raise ValueError(
                f"{name!r} has the parts {sorted(by_part)}, and the first setting has {sorted(parts)}; give every "
                "setting the same parts"
            )
    places = np.arange(len(parts), dtype=float)
    with style():
        ax = ax or new_axes(height=1.6 + 0.2 * len(parts) * max(2, len(shares)))
        for index, (name, by_part) in enumerate(shares.items()):
            y = places + 0.6 * ((index + 0.5) / len(shares) - 0.5)
            look: dict[str, Any] = {**line_look(index), "ls": "none"}
            ax.plot([_mean(by_part[part]) for part in parts], y, label=name, **look)
            for height, part in zip(y, parts, strict=True):
                value = by_part[part]
                if isinstance(value, IntervalLike):
                    ax.plot([value.low, value.high], [height, height], color=look["color"], lw=1.6, marker="|", ms=5)
        ax.set_yticks(places, parts)
        ax.invert_yaxis()
        ax.set(xlim=(0, None), title=title, xlabel=x_label)
        legend_beside(ax)
    return ax


def _mean(value: IntervalLike | float) -> float:
    return float(value.mean) if isinstance(value, IntervalLike) else float(value)
