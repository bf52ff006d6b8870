"""Settings chosen on validation questions, reported on test questions beside the setting that is best there."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np

from focuslens.evaluation import Interval, Setting, Sweep, best_setting, bootstrap_mean
from focuslens.heads import Head
from focuslens.studies.paper.artefact import Finding, Verdict, signed, verdict_below
from focuslens.viz import Table

__all__ = ["chosen_table", "difference", "gain_of_more", "possible", "random_order", "verdict_of"]


def possible(ks: Sequence[int], n: int) -> list[int]:
    """The values of ``ks`` up to ``n``, or ``n`` alone if all are larger."""
    return [k for k in ks if k <= n] or [n]


def random_order(heads: Sequence[Head], exclude: int, seed: int) -> list[Head]:
    """The heads of a ranking in random order, with the first ``exclude`` heads of the ranking at the end.

    The random heads therefore include contextual heads only after all other heads.
    """
    first, rest = list(heads[:exclude]), list(heads[exclude:])
    generator = random.Random(seed)
    generator.shuffle(rest)
    generator.shuffle(first)
    return [*rest, *first]


def chosen_table(validation: Sweep, test: Sweep, settings: Sequence[Setting]) -> tuple[Table, Setting]:
    """Table of the test results of two settings, chosen on validation and on test questions, and the former setting."""
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


def verdict_of(sweep: Sweep, name: str, *, higher: bool, level: float = 0.05) -> Verdict:
    """Verdict on the claim that a setting is more (or less) accurate than the baseline, from the exact test."""
    result, baseline = sweep[name], sweep["baseline"]
    if result.compare(baseline).p_value >= level:
        return "cannot be told"
    return "holds" if (result.em.mean > baseline.em.mean) == higher else "does not hold"


def difference(sweep: Sweep, name: str) -> Interval:
    """Difference in accuracy between a setting and the baseline, with its interval over questions."""
    result, baseline = sweep[name], sweep["baseline"]
    gains = [int(steered) - int(plain) for steered, plain in zip(result.correct, baseline.correct, strict=True)]
    return bootstrap_mean(gains, groups=result.question_ids)


def gain_of_more(sweep: Sweep, settings: Sequence[Setting], most: int, action: str) -> Finding:
    """Finding on a claim of the paper: at the same strength, accuracy is worse on more heads than the contextual heads.

    A setting on more heads is compared with the setting that has the same ``tau`` or ``alpha`` and acts on the
    contextual heads only. Every sample's change is averaged over the settings on more heads. The interval is over
    questions.

    Args:
        sweep: Sweep with the evaluations of all settings.
        settings: Settings to compare, which differ in strength and number of heads.
        most: Limit on the number of contextual heads. The largest number of heads in ``settings`` within the limit is
            used.
        action: The intervention on heads, as the beginning of a sentence.
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
