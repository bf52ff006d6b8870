"""Matplotlib figures, attention views, and reports as single HTML files.

The functions take arrays, numbers and results. They need neither a model nor network access. To compute the attention
that the views show, use :func:`focuslens.response_attention` and :func:`focuslens.window_attention`, which run a model.
"""

from __future__ import annotations

try:
    import circuitsvis as _circuitsvis
    import matplotlib as _matplotlib
except ImportError as error:
    raise ImportError(
        f"focuslens.viz needs circuitsvis and matplotlib, and {error.name!r} is missing: pip install 'focuslens[viz]'"
    ) from error

from focuslens.viz.answers import answer_view
from focuslens.viz.attention import attention_view, token_view
from focuslens.viz.documents import document_view, pool_attention
from focuslens.viz.figures import (
    Curve,
    IntervalLike,
    budget_shares,
    depth_profiles,
    direction_curves,
    frequency_profiles,
    head_groups,
    head_map,
    loss_curves,
    norms_by_rank,
    position_biases,
    save_figure,
    split_softmax_curves,
    style,
    sweep_curves,
    table_heat_map,
    variance_parts,
)
from focuslens.viz.report import Figure, Section, Table, write_report, write_sections
from focuslens.viz.sweeps import curves, sweep_table
from focuslens.viz.text import compare_view, text_view
from focuslens.viz.view import AttentionView

del _circuitsvis, _matplotlib

__all__ = [
    "AttentionView",
    "Curve",
    "Figure",
    "IntervalLike",
    "Section",
    "Table",
    "answer_view",
    "attention_view",
    "budget_shares",
    "compare_view",
    "curves",
    "depth_profiles",
    "direction_curves",
    "document_view",
    "frequency_profiles",
    "head_groups",
    "head_map",
    "loss_curves",
    "norms_by_rank",
    "pool_attention",
    "position_biases",
    "save_figure",
    "split_softmax_curves",
    "style",
    "sweep_curves",
    "sweep_table",
    "table_heat_map",
    "text_view",
    "token_view",
    "variance_parts",
    "write_report",
    "write_sections",
]
