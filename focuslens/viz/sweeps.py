"""The accuracies of a sweep, as lines that can be drawn."""

from __future__ import annotations

from typing import Any

from focuslens.evaluation import Sweep
from focuslens.viz.lines import Curve

__all__ = ["curves"]


def curves(sweep: Sweep, varied: str, **fixed: Any) -> list[Curve]:
    """A sweep's accuracy over ``k``: one curve for each value of ``varied`` among the settings with the fixed ones."""
    wanted = {**fixed, varied: None}
    lines: dict[float, dict[float, Any]] = {}
    for setting in sweep.settings:
        parameters = setting.parameters
        if wanted.keys() <= parameters.keys() and all(parameters[name] == value for name, value in fixed.items()):
            lines.setdefault(parameters[varied], {})[parameters["k"]] = sweep[setting.name].em
    prefix = "random heads, " if fixed.get("heads") == "random" else ""
    return [Curve.from_intervals(f"{prefix}{varied} = {value:g}", points.items()) for value, points in lines.items()]
