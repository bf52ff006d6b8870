"""Test results of settings chosen on validation questions, compared with the best setting on test questions."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np

from focuslens.evaluation import Interval, Setting, Sweep, best_setting, bootstrap_mean
from focuslens.heads import Head
from focuslens.studies.paper.artefact import Finding, Verdict, signed, verdict_below
from focuslens.viz import Table

__all__ = ["chosen_table", "compared", "difference", "gain_of_more", "possible", "random_order", "verdict_of"]


def possible(ks: Sequence[int], n: int) -> list[int]:
    """Values of ``ks`` up to ``n``, or only ``n`` if all values are larger."""
    return [k for k in ks if k <= n] or [n]


def random_order(heads: Sequence[Head], exclude: int, seed: int) -> list[Head]:
    """Heads of a ranking in random order, with the first ``exclude`` heads of the ranking at the end.

    The first ``k`` heads of the result therefore include contextual heads only if fewer than ``k`` other heads exist.
    """
    first, rest = list(heads[:exclude]), list(heads[exclude:])
    generator = random.Random(seed)
    generator.shuffle(rest)
    generator.shuffle(first)
    return [*rest, *first]


def chosen_table(validation: Sweep, test: Sweep, settings: Sequence[Setting]) -> tuple[Table, Setting]:
    """Compare test results of the baseline, the best setting on validation questions and the best on test questions.

    Returns:
        The table of results, and the setting that is best on validation questions.
    """
    chosen, best_on_test = best_setting(validation, settings), best_setting(test, settings)
    baseline = test["baseline"]
    rows = [
        ("no intervention", "baseline", baseline),
        ("chosen on validation", chosen.name, test[chosen.name]),
        ("chosen on these test questions, as the paper does", best_on_test.name, test[best_on_test.name]),
    ]
    return (
        Table(
            "Held-out exact match (share of samples) of the chosen settings, its 95 % interval, and the exact test "
            "against no intervention (McNemar's; samples of one question count together)",
            ("how", "setting", "exact match", "low", "high", "gained", "lost", "p"),
            tuple(
                (how, name, result.em.mean, result.em.low, result.em.high, *_comparison(test, name))
                for how, name, result in rows
            ),
        ),
        chosen,
    )


def _comparison(sweep: Sweep, name: str) -> tuple[int, int, float]:
    comparison = sweep[name].compare(sweep["baseline"])
    return comparison.only_first, comparison.only_second, comparison.p_value


def compared(sweep: Sweep, name: str) -> str:
    """Numbers of questions gained and lost against the baseline, and McNemar's exact p, for the text of a finding."""
    gained, lost, p = _comparison(sweep, name)
    return f"{gained} gained, {lost} lost, p = {p:.2g}"


def verdict_of(sweep: Sweep, name: str, *, higher: bool, level: float = 0.05) -> Verdict:
    """Verdict, from an exact test, on the claim that a setting is more accurate, or less accurate, than the baseline.

    Args:
        sweep: Sweep with the evaluations of the setting and the baseline.
        name: Name of the setting.
        higher: ``True`` for the claim of higher accuracy, ``False`` for the claim of lower accuracy.
        level: Significance level. At this p-value or above, the verdict is ``cannot be told``.
    """
    result, baseline = sweep[name], sweep["baseline"]
    if result.compare(baseline).p_value >= level:
        return "cannot be told"
    return "holds" if (result.em.mean > baseline.em.mean) == higher else "does not hold"


def difference(sweep: Sweep, name: str) -> Interval:
    """Accuracy of a setting minus accuracy of the baseline, with the interval of the difference over questions."""
    result, baseline = sweep[name], sweep["baseline"]
    gains = [int(steered) - int(plain) for steered, plain in zip(result.correct, baseline.correct, strict=True)]
    return bootstrap_mean(gains, groups=result.question_ids)


def gain_of_more(sweep: Sweep, settings: Sequence[Setting], most: int, action: str) -> Finding:
    """Finding on the paper's claim that intervening on further heads besides the contextual heads lowers accuracy.

    Each setting on more heads is compared with the setting of the same ``tau`` or ``alpha`` on only the contextual
    heads. The change in each sample's accuracy is averaged over these comparisons. The interval is over questions.

    Args:
        sweep: Sweep with the evaluations of all settings.
        settings: Settings to compare, which differ in strength and number of heads.
        most: Maximum number of contextual heads. The largest number of heads in ``settings`` up to this maximum counts
            as the number of contextual heads.
        action: Name of the intervention, such as ``Steering``, with which the finding begins.
    """
    few = max((setting.parameters["k"] for setting in settings if setting.parameters["k"] <= most), default=0)
    more = [setting for setting in settings if setting.parameters["k"] > most]
    text = f"{action} more than {few or most} heads is worse than {few or most}"
    if not few or not more:
        return Finding(f"{text}: there is no setting of each kind to compare.", "cannot be told")

    def strength(setting: Setting) -> float:
        return setting.parameters.get("tau", setting.parameters.get("alpha"))

    def correct(setting: Setting) -> np.ndarray:
        return np.array(sweep[setting.name].correct, float)

    references = {strength(setting): correct(setting) for setting in settings if setting.parameters["k"] == few}
    changes = np.mean([correct(setting) - references[strength(setting)] for setting in more], axis=0)
    gain = bootstrap_mean(changes, groups=sweep[more[0].name].question_ids)
    ks = ", ".join(str(k) for k in sorted({setting.parameters["k"] for setting in more}))
    strengths = ", ".join(f"{value:g}" for value in sorted(set(map(strength, more))))
    name = "tau" if "tau" in more[0].parameters else "alpha"
    return Finding(
        f"{text}: with {ks} exact match changes by {signed(gain)}, on average over {name} = {strengths}.",
        verdict_below(gain, 0.0),
    )
