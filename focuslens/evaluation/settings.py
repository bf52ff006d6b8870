"""The settings of the paper's sweeps: split-softmax over ``(tau, k)``, focus steering over ``(alpha, k)``, controls."""

from __future__ import annotations

import math
from collections.abc import Sequence

from focuslens.evaluation.runner import Setting, Sweep
from focuslens.interventions import FocusSteering, SplitSoftmax
from focuslens.interventions.common import Positions
from focuslens.interventions.directions import FocusDirections

__all__ = ["BASELINES", "best_setting", "split_softmax_settings", "steering_settings"]

BASELINES = (Setting("baseline"), Setting("gold", case="gold"), Setting("negative", case="negative"))
"""The three lines of figure 3: all documents, the relevant one only, and all but the relevant one."""


def split_softmax_settings(
    heads: Sequence[tuple[int, int]], taus: Sequence[float], ks: Sequence[int], *, label: str = "contextual"
) -> list[Setting]:
    """Split-softmax on the first ``k`` heads of a ranking, or of random heads, for every ``tau`` and ``k``.

    Raises:
        ValueError: If a ``k`` is not between 1 and the number of heads.
    """
    return [
        Setting(
            f"split-softmax {label} tau={tau:g} k={k}",
            (SplitSoftmax(_first(heads, k), tau),),
            parameters={"heads": label, "tau": tau, "k": k},
        )
        for tau in taus
        for k in ks
    ]


def steering_settings(
    directions: FocusDirections,
    heads: Sequence[tuple[int, int]],
    alphas: Sequence[float],
    ks: Sequence[int],
    *,
    positions: Positions = "all",
) -> list[Setting]:
    """Focus steering of the first ``k`` heads of a ranking for every ``alpha`` and ``k``.

    Raises:
        ValueError: If a ``k`` is not between 1 and the number of heads, or a head has no direction.
    """
    return [
        Setting(
            f"steering alpha={alpha:g} k={k}",
            (FocusSteering(directions, alpha, _first(heads, k), positions),),
            parameters={"alpha": alpha, "k": k, "positions": positions},
        )
        for alpha in alphas
        for k in ks
    ]


def best_setting(sweep: Sweep, settings: Sequence[Setting] | None = None) -> Setting:
    """The setting with the highest exact match; of equals the gentlest, then the one with the fewest heads.

    Gentle is an ``alpha`` near 0 and a ``tau`` near 1. Choose on other questions than those that are reported.

    Args:
        sweep: Their evaluations.
        settings: What to choose among; all of the sweep that have an ``alpha`` or a ``tau`` when not given.

    Raises:
        ValueError: If there is nothing to choose among.
    """
    among = [one for one in sweep.settings if {"alpha", "tau"} & set(one.parameters)] if settings is None else settings
    if not among:
        raise ValueError("no setting to choose among has an alpha or a tau; sweep over split-softmax or steering")

    def key(one: Setting) -> tuple[float, float, int]:
        parameters = one.parameters
        strength = abs(parameters["alpha"]) if "alpha" in parameters else abs(math.log(parameters["tau"]))
        return sweep[one.name].em.mean, -strength, -parameters.get("k", 0)

    return max(among, key=key)


def _first(heads: Sequence[tuple[int, int]], k: int) -> Sequence[tuple[int, int]]:
    if not 1 <= k <= len(heads):
        raise ValueError(f"k is {k}; it must be 1 to {len(heads)}, the number of heads given")
    return heads[:k]
