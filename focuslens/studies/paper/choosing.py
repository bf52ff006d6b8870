"""Settings chosen on validation questions and reported once on test, beside the best of the test questions."""

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
    """The numbers of heads that there are; all of them where every one is more."""
    return [k for k in ks if k <= n] or [n]


def random_order(heads: Sequence[Head], exclude: int, seed: int) -> list[Head]:
    """The heads of a ranking in random order, but the first ``exclude`` of it at the end.

    Fewer random heads than there are others have no contextual head among them.
    """
    first, rest = list(heads[:exclude]), list(heads[exclude:])
    generator = random.Random(seed)
    generator.shuffle(rest)
    generator.shuffle(first)
    return [*rest, *first]


def chosen_table(validation: Sweep, test: Sweep, settings: Sequence[Setting]) -> tuple[Table, Setting]:
    """The setting chosen on validation and the best on test, both on test; and the former."""
    honest, papers = best_setting(validation, settings), best_setting(test, settings)
    baseline = test["baseline"]
    rows = [
        ("no intervention", "baseline", baseline),
        ("chosen on validation", honest.name, test[honest.name]),
        ("chosen on these test questions, as the paper does", papers.name, test[papers.name]),
    ]
    return (
        Table(
            "Held-out exact match (share of samples) of the chosen settings, its 95 % interval, and the exact test "
            "against no intervention (McNemar's; samples of one question count together)",
            ("how", "setting", "exact match", "low", "high", "gained", "lost", "p"),
            tuple(
                (how, name, result.em.mean, result.em.low, result.em.high, *_tested(test, name))
                for how, name, result in rows
            ),
        ),
        honest,
    )


def _tested(sweep: Sweep, name: str) -> tuple[int, int, float]:
    found = sweep[name].compare(sweep["baseline"])
    return found.only_first, found.only_second, found.p_value


def verdict_of(sweep: Sweep, name: str, *, higher: bool, level: float = 0.05) -> Verdict:
    """Whether a setting is above (or below) the baseline, by the exact test."""
    result, baseline = sweep[name], sweep["baseline"]
    if result.compare(baseline).p_value >= level:
        return "cannot be told"
    return "holds" if (result.em.mean > baseline.em.mean) == higher else "does not hold"


def difference(sweep: Sweep, name: str) -> Interval:
    """How much more often a setting is right than the baseline, with its interval over questions."""
    result, baseline = sweep[name], sweep["baseline"]
    gains = [int(ours) - int(theirs) for ours, theirs in zip(result.correct, baseline.correct, strict=True)]
    return bootstrap_mean(gains, groups=result.question_ids)


def gain_of_more(sweep: Sweep, settings: Sequence[Setting], most: int, what: str) -> Finding:
    """Whether more heads than the contextual ones do worse than these, at the same strengths: the paper's finding.

    Every sample's change is averaged over the settings with more heads, each beside the one of its own ``tau`` or
    ``alpha`` with as many heads as there are contextual ones; the interval is over questions.

    Args:
        sweep: Evaluations.
        settings: Those to compare, which differ in strength and number of heads.
        most: How many contextual heads there are, at most; the largest number of heads up to it stands for them.
        what: What is done to heads, as the beginning of a sentence.
    """
    few = max((one.parameters["k"] for one in settings if one.parameters["k"] <= most), default=0)
    more = [one for one in settings if one.parameters["k"] > most]
    text = f"{what} more than {few or most} heads is worse than {few or most}"
    if not few or not more:
        return Finding(f"{text}: there is no setting of each kind to compare.", "cannot be told")

    def strength(one: Setting) -> float:
        return one.parameters.get("tau", one.parameters.get("alpha"))

    beside = {strength(one): np.array(sweep[one.name].correct, float) for one in settings if one.parameters["k"] == few}
    changes = np.mean([np.array(sweep[one.name].correct, float) - beside[strength(one)] for one in more], axis=0)
    gain = bootstrap_mean(changes, groups=sweep[more[0].name].question_ids)
    ks = ", ".join(str(k) for k in sorted({one.parameters["k"] for one in more}))
    strengths = ", ".join(f"{one:g}" for one in sorted(set(map(strength, more))))
    name = "tau" if "tau" in more[0].parameters else "alpha"
    return Finding(
        f"{text}: with {ks} exact match changes by {signed(gain)}, on average over {name} = {strengths}.",
        verdict_below(gain, 0.0),
    )
