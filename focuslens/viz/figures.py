"""Matplotlib figures in one style, legible in greyscale and to colour-blind readers, with units on every axis.

Each drawing function draws on ``ax``, or on new axes if ``ax`` is ``None``, and returns the axes. Several plots can
therefore share one figure.
"""

from __future__ import annotations

from focuslens.viz.anatomy import (
    depth_profiles,
    frequency_profiles,
    norms_by_rank,
    position_biases,
    variance_parts,
)
from focuslens.viz.budget import budget_shares
from focuslens.viz.lines import (
    Curve,
    IntervalLike,
    direction_curves,
    loss_curves,
    split_softmax_curves,
    sweep_curves,
)
from focuslens.viz.maps import head_groups, head_map, table_heat_map
from focuslens.viz.style import save_figure, style

__all__ = [
    "Curve",
    "IntervalLike",
    "budget_shares",
    "depth_profiles",
    "direction_curves",
    "frequency_profiles",
    "head_groups",
    "head_map",
    "loss_curves",
    "norms_by_rank",
    "position_biases",
    "save_figure",
    "split_softmax_curves",
    "style",
    "sweep_curves",
    "table_heat_map",
    "variance_parts",
]
