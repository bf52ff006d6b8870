"""Accuracy of the settings of a sweep, as curves and as a table."""

from __future__ import annotations

from typing import Any

from focuslens.evaluation import Sweep
from focuslens.viz.arrays import require_kind
from focuslens.viz.lines import Curve
from focuslens.viz.report import Table

__all__ = ["curves", "sweep_table"]


def curves(sweep: Sweep, varied: str, *, over: str = "k", **fixed: Any) -> list[Curve]:
    """Accuracy of a sweep as curves, with one curve per value of ``varied``.

    Args:
        sweep: The sweep.
        varied: Name of the parameter that distinguishes the curves, such as ``tau`` or ``alpha``.
        over: Name of the parameter that varies along each curve.
        **fixed: Required values of additional parameters. Settings with different values are left out.
    """
    require_kind(sweep, Sweep, "sweep", "fl.run_sweep(model, samples, settings), or fl.load_sweep(path)")
    required = {**fixed, varied: None, over: None}
    lines: dict[float, dict[float, Any]] = {}
    for setting in sweep.settings:
        parameters = setting.parameters
        if required.keys() <= parameters.keys() and all(parameters[name] == value for name, value in fixed.items()):
            lines.setdefault(parameters[varied], {})[parameters[over]] = sweep[setting.name].em
    prefix = "random heads, " if fixed.get("heads") == "random" else ""
    return [Curve.from_intervals(f"{prefix}{varied} = {value:g}", points.items()) for value, points in lines.items()]


def sweep_table(caption: str, sweep: Sweep) -> Table:
    """Table with one row per setting: exact match, its interval, and an exact McNemar test against the baseline."""
    names = ("name", "em", "em_low", "em_high", "gained", "lost", "mcnemar_p")
    return Table(
        f"{caption}: exact match (share of samples), its 95 % interval, samples gained and lost against the baseline, "
        "and the exact p-value (McNemar's; samples of one question count together)",
        ("setting", "exact match", "low", "high", "gained", "lost", "p"),
        tuple(tuple(row[name] for name in names) for row in sweep.rows()),
    )
