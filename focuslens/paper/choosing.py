"""Settings chosen on validation questions and reported once on test, beside the best of the test questions."""

from __future__ import annotations

import random
from collections.abc import Sequence

from focuslens.evaluation import Interval, Setting, Sweep, best_setting, bootstrap_mean
from focuslens.heads import Head
from focuslens.paper.artefact import Verdict
from focuslens.viz import Table

__all__ = ["chosen_table", "difference", "possible", "random_order", "verdict_of"]


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
            "Held-out exact match of the chosen settings, and the exact test against no intervention (McNemar's; "
            "samples of one question count together)",
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
