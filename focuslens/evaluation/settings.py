"""Settings of the paper's sweeps: baselines, split-softmax (``tau``, ``k``) and focus steering (``alpha``, ``k``)."""

from __future__ import annotations

import math
from collections.abc import Sequence

from focuslens.evaluation.setting import Setting
from focuslens.evaluation.sweeps import Sweep
from focuslens.interventions import FocusSteering, SplitSoftmax
from focuslens.interventions.base import Positions
from focuslens.interventions.directions import FocusDirections
from focuslens.util.checks import integers, numbers

__all__ = ["BASELINES", "best_setting", "split_softmax_settings", "steering_settings"]

BASELINES = (Setting("baseline"), Setting("gold", case="gold"), Setting("negative", case="negative"))
"""Baselines of figure 3: prompts with all documents, only the relevant document, or only irrelevant documents."""


def split_softmax_settings(
    heads: Sequence[tuple[int, int]], taus: Sequence[float], ks: Sequence[int], *, label: str = "contextual"
) -> list[Setting]:
    """Split-softmax settings for every combination of ``tau`` and ``k``, on the first ``k`` heads of a list.

    ``heads`` is a ranking or any other list of heads. ``label`` denotes the list in the names and parameters of the
    settings.

    Raises:
        ValueError: If any ``k`` is less than 1 or greater than the number of heads.
    """
    return [
        Setting(
            f"split-softmax {label} tau={tau:g} k={k}",
            (SplitSoftmax(_first(heads, k), tau),),
            parameters={"heads": label, "tau": tau, "k": k},
        )
        for tau in numbers(taus, "taus")
        for k in integers(ks, "ks")
    ]


def steering_settings(
    directions: FocusDirections,
    heads: Sequence[tuple[int, int]],
    alphas: Sequence[float],
    ks: Sequence[int],
    *,
    positions: Positions = "all",
) -> list[Setting]:
    """Focus steering settings for every combination of ``alpha`` and ``k``, on the first ``k`` heads of a ranking.

    Raises:
        ValueError: If any ``k`` is less than 1 or greater than the number of heads, or if a head has no direction.
    """
    return [
        Setting(
            f"steering alpha={alpha:g} k={k}",
            (FocusSteering(directions, alpha, _first(heads, k), positions),),
            parameters={"alpha": alpha, "k": k, "positions": positions},
        )
        for alpha in numbers(alphas, "alphas")
        for k in integers(ks, "ks")
    ]


def best_setting(sweep: Sweep, settings: Sequence[Setting] | None = None) -> Setting:
    """Setting with the highest exact match.

    Ties are broken in favour of the mildest setting, which has the ``alpha`` closest to 0 or the ``tau`` closest to 1
    on a log scale. Remaining ties are broken in favour of the fewest heads. Report the results of the setting only on
    questions that were not used to select the setting.

    Args:
        sweep: Sweep with the evaluations of the settings.
        settings: Settings to select from; by default all settings of the sweep with an ``alpha`` or a ``tau``.

    Raises:
        ValueError: If there is no setting to select from.
    """
    if settings is None:
        settings = [setting for setting in sweep.settings if {"alpha", "tau"} & set(setting.parameters)]
    if not settings:
        raise ValueError("no setting to choose among has an alpha or a tau; sweep over split-softmax or steering")

    def key(setting: Setting) -> tuple[float, float, int]:
        parameters = setting.parameters
        # Settings without a strength, such as methods, can be among those that are given.
        strength = abs(parameters["alpha"]) if "alpha" in parameters else _distance(parameters.get("tau", 1.0))
        return sweep[setting.name].em.mean, -strength, -parameters.get("k", 0)

    return max(settings, key=key)


def _distance(tau: float) -> float:
    """Distance of ``tau`` from 1 on a log scale."""
    return math.inf if tau == 0 else abs(math.log(tau))


def _first(heads: Sequence[tuple[int, int]], k: int) -> Sequence[tuple[int, int]]:
    if not 1 <= k <= len(heads):
        raise ValueError(f"k is {k}; it must be 1 to {len(heads)}, the number of heads given")
    return heads[:k]
