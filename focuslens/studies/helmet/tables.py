"""The paper's tables from scores: tasks, averages, differences to the baseline, and attention to the sink."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from focuslens.evaluation import Interval
from focuslens.studies.helmet.results import TaskScores
from focuslens.studies.helmet.tasks import CATEGORIES, NEEDLE_QA, TASKS
from focuslens.util.statistics import bootstrap_mean, percentile_interval, resampled_means

__all__ = ["BASELINE", "OVERALL", "ComparedScore", "LengthTable", "Mark", "length_tables", "tidy_rows"]

BASELINE = "baseline"
OVERALL = "Overall Average"
"""The mean over categories, each the mean over its tasks, as the paper has it."""

Mark: TypeAlias = Literal["better", "worse", "same", ""]
"""Against the baseline; empty for the baseline itself."""


@dataclass(frozen=True)
class ComparedScore:
    """A score of a table, and its difference to the baseline.

    Attributes:
        score: The score, with its 95 % interval over questions.
        difference: The difference to the baseline on the same samples; ``None`` for the baseline itself.
    """

    score: Interval
    difference: Interval | None = None

    @property
    def mark(self) -> Mark:
        """By the figures as they are printed, as in the paper: a difference below 0.005 is none."""
        if self.difference is None:
            return ""
        change = round(self.difference.mean, 2)
        return "better" if change > 0 else "worse" if change < 0 else "same"

    @property
    def certain(self) -> bool:
        """Whether the interval of the difference leaves out zero."""
        return self.difference is not None and (self.difference.low > 0 or self.difference.high < 0)


@dataclass(frozen=True)
class LengthTable:
    """All figures at one length.

    Attributes:
        length: Tokens of a prompt and its response together, at most.
        settings: Names, in order.
        tasks: Names of the tasks that were run, in the paper's order.
        averages: Names of the categories that have any, and of the overall average.
        cells: By setting and by task or average.
        sinks: By setting and task: attention to the sink in percent; empty where none was watched.
        samples: By task, how many.
        truncated: By task, how many prompts HELMET cut, where it cut any.
    """

    length: int
    settings: tuple[str, ...]
    tasks: tuple[str, ...]
    averages: tuple[str, ...]
    cells: Mapping[tuple[str, str], ComparedScore]
    sinks: Mapping[tuple[str, str], Interval]
    samples: Mapping[str, int]
    truncated: Mapping[str, int]

    def sink_std(self, setting: str) -> float | None:
        """Standard deviation of the sink scores over tasks (of a sample, as Table 13 has it); ``None`` for one task."""
        means = [self.sinks[setting, task].mean for task in self.tasks if (setting, task) in self.sinks]
        return statistics.stdev(means) if len(means) > 1 else None


@dataclass(frozen=True)
class _Resampled:
    """A mean and its draws; sums and multiples of means are computed draw by draw."""

    mean: float
    draws: npt.NDArray[np.float64]

    def interval(self) -> Interval:
        return percentile_interval(self.mean, self.draws)


def _average(parts: Sequence[_Resampled]) -> _Resampled:
    draws = np.stack([one.draws for one in parts]).mean(axis=0)
    return _Resampled(statistics.fmean(one.mean for one in parts), np.asarray(draws))


def length_tables(scores: Iterable[TaskScores], settings: Sequence[str], seed: int = 42) -> list[LengthTable]:
    """A table for each length, shortest first.

    Args:
        scores: One for each task and length.
        settings: Names, in the order of the rows; all scores must have them.
        seed: Of the bootstrap.

    Raises:
        ValueError: If a task occurs twice at one length.
    """
    by_length: dict[int, list[TaskScores]] = {}
    for one in scores:
        others = by_length.setdefault(one.length, [])
        if one.task in [other.task for other in others]:
            raise ValueError(f"{one.task.name} was run twice at {one.length} tokens, in two forms; one table holds one")
        others.append(one)
    return [_length_table(length, some, settings, seed) for length, some in sorted(by_length.items())]


def _length_table(length: int, scores: Sequence[TaskScores], settings: Sequence[str], seed: int) -> LengthTable:
    ordered = sorted(scores, key=lambda one: (*TASKS, NEEDLE_QA).index(one.task))
    levels = {name: _columns([_resample(one, name, None, seed) for one in ordered], ordered) for name in settings}
    cells: dict[tuple[str, str], ComparedScore] = {}
    for name in settings:
        against = name != BASELINE and BASELINE in settings
        changes = _columns([_resample(one, name, BASELINE, seed) for one in ordered], ordered) if against else {}
        for column, level in levels[name].items():
            cells[name, column] = ComparedScore(level.interval(), changes[column].interval() if against else None)
    tasks = tuple(one.task.name for one in ordered)
    return LengthTable(
        length,
        tuple(settings),
        tasks,
        tuple(column for column in next(iter(levels.values())) if column not in tasks),
        cells,
        {
            (name, one.task.name): found
            for one in ordered
            for name in settings
            if name in one.sinks and (found := _sink(one, name, seed)) is not None
        },
        {one.task.name: len(one.questions) for one in ordered},
        {one.task.name: one.truncated for one in ordered if one.truncated},
    )


def _resample(scores: TaskScores, setting: str, baseline: str | None, seed: int) -> _Resampled:
    """A task's figure, or its gain over a baseline, over resampled questions."""
    values = np.array(scores.values[setting])
    if baseline is not None:
        values = values - np.array(scores.values[baseline])
    own = int.from_bytes(scores.task.dataset.encode()[-8:], "big")  # tasks of equal size are not resampled alike
    draws = resampled_means(values, groups=scores.questions, seed=(seed, own))
    return _Resampled(float(values.mean()), draws)


def _columns(parts: Sequence[_Resampled], scores: Sequence[TaskScores]) -> dict[str, _Resampled]:
    """Tasks, then averages over the tasks of each category, then the average over categories."""
    columns = {one.task.name: part for one, part in zip(scores, parts, strict=True)}
    averages: dict[str, _Resampled] = {}
    for category in CATEGORIES:
        of_category = [part for one, part in zip(scores, parts, strict=True) if one.task.category == category]
        if of_category:
            averages[category] = _average(of_category)
    return {**columns, **averages, OVERALL: _average(list(averages.values()))}


def _sink(scores: TaskScores, setting: str, seed: int) -> Interval | None:
    kept = [(one, q) for one, q in zip(scores.sinks[setting], scores.questions, strict=True) if not math.isnan(one)]
    if not kept:
        return None
    return bootstrap_mean([one for one, _ in kept], groups=[q for _, q in kept], seed=seed)


def tidy_rows(table: LengthTable) -> list[dict[str, Any]]:
    """Every figure of a table as a row of its own, for machines."""
    rows: list[dict[str, Any]] = []
    for setting in table.settings:
        for column in (*table.tasks, *table.averages):
            cell, row = table.cells[setting, column], {"length": table.length, "setting": setting, "column": column}
            row |= {"samples": table.samples.get(column, "")}
            row |= {"score": cell.score.mean, "low": cell.score.low, "high": cell.score.high}
            change = cell.difference
            row |= {
                "difference": "" if change is None else change.mean,
                "difference_low": "" if change is None else change.low,
                "difference_high": "" if change is None else change.high,
                "against_baseline": cell.mark,
                "certain": cell.certain,
            }
            sink = table.sinks.get((setting, column))
            row |= {"sink": "" if sink is None else sink.mean}
            row |= {"sink_low": "" if sink is None else sink.low, "sink_high": "" if sink is None else sink.high}
            rows.append(row)
    return rows
