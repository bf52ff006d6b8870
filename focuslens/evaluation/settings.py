"""Settings of the paper's sweeps: baselines, split-softmax over ``(tau, k)``, focus steering over ``(alpha, k)``."""

from __future__ import annotations

import math
from collections.abc import Sequence

from focuslens.evaluation.runner import Setting, Sweep
from focuslens.interventions import FocusSteering, SplitSoftmax
from focuslens.interventions.base import Positions
from focuslens.interventions.directions import FocusDirections

__all__ = ["BASELINES", "best_setting", "split_softmax_settings", "steering_settings"]

BASELINES = (Setting("baseline"), Setting("gold", case="gold"), Setting("negative", case="negative"))
"""The three lines of figure 3: all documents, the relevant document alone, and only irrelevant documents."""


def split_softmax_settings(
    heads: Sequence[tuple[int, int]], taus: Sequence[float], ks: Sequence[int], *, label: str = "contextual"
) -> list[Setting]:
    """Settings of split-softmax on the first ``k`` heads of a list, such as a ranking, for every ``tau`` and ``k``.

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
    """Settings of focus steering on the first ``k`` heads of a ranking, for every ``alpha`` and ``k``.

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
    """The setting with the highest exact match.

    Among equal settings, the gentlest is chosen, then the setting with the fewest heads. A gentle setting has an
    ``alpha`` near 0 or a ``tau`` near 1. Do not report results on the questions that were used for this choice.

    Args:
        sweep: Evaluations of the settings.
        settings: Settings to choose among; by default all settings of the sweep with an ``alpha`` or a ``tau``.

    Raises:
        ValueError: If there is no setting to choose among.
    """
    if settings is None:
        settings = [setting for setting in sweep.settings if {"alpha", "tau"} & set(setting.parameters)]
    if not settings:
        raise ValueError("no setting to choose among has an alpha or a tau; sweep over split-softmax or steering")

    def key(setting: Setting) -> tuple[float, float, int]:
        parameters = setting.parameters
        strength = abs(parameters["alpha"]) if "alpha" in parameters else abs(math.log(parameters["tau"]))
        return sweep[setting.name].em.mean, -strength, -parameters.get("k", 0)

    return max(settings, key=key)


def _first(heads: Sequence[tuple[int, int]], k: int) -> Sequence[tuple[int, int]]:
    if not 1 <= k <= len(heads):
        raise ValueError(f"k is {k}; it must be 1 to {len(heads)}, the number of heads given")
    return heads[:k]
