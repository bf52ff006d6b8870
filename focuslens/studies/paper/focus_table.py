"""The table of focus without a label, and what it says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from focuslens.evaluation import Evaluation, Interval, Setting
from focuslens.studies.paper.artefact import Finding, Verdict
from focuslens.studies.paper.focus_families import Family
from focuslens.util.html import Cell
from focuslens.viz.report import Table

__all__ = ["Chosen", "findings", "table_of"]

_LEVEL = 0.01
"""Significance level of the comparison with no intervention."""

_CAPTION = (
    "Exact match on test questions with 95 % intervals, samples gained and lost against no intervention, and McNemar's "
    "exact p. Validation questions chose the settings. The choice is the share of samples whose gold document is "
    "chosen. Seconds are those beyond plain generation, for one sample at a time"
)
_COLUMNS = (
    *("kind", "method", "setting", "exact match", "low", "high", "gained", "lost", "p"),
    *("extra work", "choice", "seconds"),
)
_NONE = "-"


@dataclass(frozen=True)
class Chosen:
    """A method with the setting that validation questions chose, and its results.

    Attributes:
        family: The method.
        setting: The setting.
        validation: Its evaluation on validation questions.
        test: Its evaluation on test questions.
    """

    family: Family
    setting: Setting
    validation: Evaluation
    test: Evaluation


def table_of(
    chosen: Sequence[Chosen],
    test: Mapping[str, Evaluation],
    seconds: Mapping[str, float],
    right: Mapping[str, float | None],
) -> Table:
    """The table, with one row per prompt case, control and method.

    Args:
        chosen: The methods.
        test: Evaluations on test questions by the setting's name.
        seconds: Seconds for a sample by the setting's name.
        right: Share of samples with the right choice by the setting's name; ``None`` for methods that do not choose.
    """
    rows: list[tuple[Cell, ...]] = [
        ("control" if name == "random document" else "prompt", name, _NONE, *_numbers(test, name), _NONE, _NONE, _NONE)
        for name in ("baseline", "gold", "negative", "random document")
    ]
    for one in chosen:
        name, share = one.setting.name, right[one.setting.name]
        extra = seconds[name] - seconds["baseline"] if name in seconds else _NONE
        setting = str(one.setting.parameters.get("setting") or _NONE)
        cells = (one.family.extra, _NONE if share is None else share, extra)
        rows.append((_kind(one.family), one.family.name, setting, *_numbers(test, name), *cells))
    return Table(_CAPTION, _COLUMNS, tuple(rows))


def _kind(family: Family) -> str:
    return "with the label" if family.label else "ours" if family.own else "of others"


def _numbers(test: Mapping[str, Evaluation], name: str) -> tuple[Cell, ...]:
    em = test[name].em
    if name == "baseline":
        return em.mean, em.low, em.high, _NONE, _NONE, _NONE
    comparison = test[name].compare(test["baseline"])
    return em.mean, em.low, em.high, comparison.only_first, comparison.only_second, comparison.p_value


def findings(chosen: Sequence[Chosen], test: Mapping[str, Evaluation]) -> list[Finding]:
    """Comparisons of the best self-focus on validation questions with no intervention, the label, and the others."""
    ours = max((one for one in chosen if one.family.is_self_focus), key=lambda one: one.validation.em.mean)
    baseline, random = test["baseline"], test["random document"]
    gained = ours.test.compare(baseline)
    is_better = gained.p_value < _LEVEL and ours.test.em.mean > baseline.em.mean
    verdict: Verdict = "holds" if is_better else "does not hold"
    made = [
        Finding(
            f"Without a label, {ours.family.name} ({ours.setting.name}), the best on validation questions, gives "
            f"{ours.test.em} on test questions. No intervention gives {baseline.em} ({gained.only_first} gained, "
            f"{gained.only_second} lost, p = {gained.p_value:.2g}), and a random document {random.em}.",
            verdict,
        )
    ]
    oracle = next((one for one in chosen if one.family.label and one.family.own), None)
    if oracle is not None:
        made.append(
            Finding(
                f"With the label, split-softmax gives {oracle.test.em}. Self-focus goes "
                f"{_way(baseline, ours.test, oracle.test)} of the way from no intervention to the label."
            )
        )
    return [*made, *_against_others(ours, chosen)]


def _against_others(ours: Chosen, chosen: Sequence[Chosen]) -> list[Finding]:
    others = [one for one in chosen if not one.family.own and not one.family.label]
    if ours.family.extra != "a second answer":
        others = [one for one in others if one.family.extra != "a second answer"]
    if not others:
        return []
    best = max(others, key=lambda one: one.test.em.mean)
    compared = ours.test.compare(best.test)
    return [
        Finding(
            f"The best method of others on these test questions is {best.family.name} with {best.test.em}. On "
            f"{compared.only_first} samples only self-focus is right, on {compared.only_second} only the other "
            f"(p = {compared.p_value:.2g}).",
            "holds" if ours.test.em.mean >= best.test.em.mean else "does not hold",
        )
    ]


def _way(baseline: Evaluation, ours: Evaluation, oracle: Evaluation, seed: int = 0) -> Interval:
    """Part of the way from the baseline to the label, with an interval over resampled questions."""
    by_question: dict[str, np.ndarray] = {}
    for i, question in enumerate(baseline.question_ids):
        gains = np.array([one.correct[i] - baseline.correct[i] for one in (ours, oracle)], float)
        by_question[question] = by_question.get(question, np.zeros(2)) + gains
    values = np.stack([by_question[question] for question in sorted(by_question)])
    picks = np.random.default_rng(seed).integers(len(values), size=(2000, len(values)))
    sums = values[picks].sum(axis=1)
    whole, sums = values.sum(axis=0), sums[sums[:, 1] > 0]
    if whole[1] <= 0 or not len(sums):
        return Interval(float("nan"), float("nan"), float("nan"), 0.95)
    low, high = np.percentile(sums[:, 0] / sums[:, 1], [2.5, 97.5])
    return Interval(float(whole[0] / whole[1]), float(low), float(high), 0.95)
