"""Tables in the paper's layout, from scores: tasks, averages, differences from the baseline, attention to the sink."""

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
"""Column of the mean over categories, as in the paper. The score of a category is the mean over its tasks."""

Mark: TypeAlias = Literal["better", "worse", "same", ""]
"""Comparison with the baseline; empty for the baseline itself."""


@dataclass(frozen=True)
class ComparedScore:
    """One score of a table.

    Attributes:
        score: The score, with its 95 % interval over questions.
        difference: Difference from the baseline on the same samples; ``None`` for the baseline.
    """

    score: Interval
    difference: Interval | None = None

    @property
    def mark(self) -> Mark:
        """Comparison with the baseline at two decimals, as in the paper. A difference of 0.00 is ``same``."""
        if self.difference is None:
            return ""
        change = round(self.difference.mean, 2)
        return "better" if change > 0 else "worse" if change < 0 else "same"

    @property
    def certain(self) -> bool:
        """Whether the interval of the difference excludes zero."""
        return self.difference is not None and (self.difference.low > 0 or self.difference.high < 0)


@dataclass(frozen=True)
class LengthTable:
    """All scores at one length.

    Attributes:
        length: Maximum length of a prompt and its response together, in tokens.
        settings: Names of the settings, in the order of the rows.
        tasks: Names of the run's tasks, in the paper's order.
        averages: Names of the averages: the categories of ``tasks``, and the overall average.
        cells: Scores by setting and by task or average.
        sinks: Attention to the sink in percent, by setting and task; empty without sink heads.
        samples: Number of samples, by task.
        truncated: Number of prompts that HELMET truncated, by task. Tasks without truncated prompts are left out.
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
        """Sample standard deviation of sink scores over tasks, as in Table 13; ``None`` for fewer than two tasks."""
        means = [self.sinks[setting, task].mean for task in self.tasks if (setting, task) in self.sinks]
        return statistics.stdev(means) if len(means) > 1 else None


@dataclass(frozen=True)
class _Resampled:
    """Mean of a score, and its bootstrap draws. Averages of several means are computed draw by draw."""

    mean: float
    draws: npt.NDArray[np.float64]

    def interval(self) -> Interval:
        return percentile_interval(self.mean, self.draws)


def _average(parts: Sequence[_Resampled]) -> _Resampled:
    draws = np.stack([part.draws for part in parts]).mean(axis=0)
    return _Resampled(statistics.fmean(part.mean for part in parts), np.asarray(draws))


def length_tables(scores: Iterable[TaskScores], settings: Sequence[str], seed: int = 42) -> list[LengthTable]:
    """Tables of scores, one per length, shortest length first.

    Args:
        scores: Scores of each task at each length.
        settings: Names of the settings, in the order of the rows. Each entry of ``scores`` must have all settings.
        seed: Seed of the bootstrap.

    Raises:
        ValueError: If a task occurs twice at one length.
    """
    by_length: dict[int, list[TaskScores]] = {}
    for task_scores in scores:
        name, length = task_scores.task.name, task_scores.length
        others = by_length.setdefault(length, [])
        if task_scores.task in [other.task for other in others]:
            raise ValueError(f"{name} was run twice at {length} tokens; a table can have it only once")
        others.append(task_scores)
    return [_length_table(length, group, settings, seed) for length, group in sorted(by_length.items())]


def _length_table(length: int, scores: Sequence[TaskScores], settings: Sequence[str], seed: int) -> LengthTable:
    ordered = sorted(scores, key=lambda task_scores: (*TASKS, NEEDLE_QA).index(task_scores.task))

    def columns(setting: str, baseline: str | None) -> dict[str, _Resampled]:
        return _columns([_resample(task_scores, setting, baseline, seed) for task_scores in ordered], ordered)

    levels = {name: columns(name, None) for name in settings}
    cells: dict[tuple[str, str], ComparedScore] = {}
    for name in settings:
        is_compared = name != BASELINE and BASELINE in settings
        changes = columns(name, BASELINE) if is_compared else {}
        for column, level in levels[name].items():
            cells[name, column] = ComparedScore(level.interval(), changes[column].interval() if is_compared else None)
    tasks = tuple(task_scores.task.name for task_scores in ordered)
    return LengthTable(
        length,
        tuple(settings),
        tasks,
        tuple(column for column in next(iter(levels.values())) if column not in tasks),
        cells,
        {
            (name, task_scores.task.name): sink
            for task_scores in ordered
            for name in settings
            if name in task_scores.sinks and (sink := _sink(task_scores, name, seed)) is not None
        },
        {task_scores.task.name: len(task_scores.questions) for task_scores in ordered},
        {task_scores.task.name: task_scores.truncated for task_scores in ordered if task_scores.truncated},
    )


def _resample(scores: TaskScores, setting: str, baseline: str | None, seed: int) -> _Resampled:
    """Mean score of a task, or mean gain over ``baseline``, with bootstrap draws over questions."""
    values = np.array(scores.values[setting])
    if baseline is not None:
        values = values - np.array(scores.values[baseline])
    task_seed = int.from_bytes(scores.task.dataset.encode()[-8:], "big")  # tasks of equal size must not share draws
    draws = resampled_means(values, groups=scores.questions, seed=(seed, task_seed))
    return _Resampled(float(values.mean()), draws)


def _columns(parts: Sequence[_Resampled], scores: Sequence[TaskScores]) -> dict[str, _Resampled]:
    """Scores by column: each task, the average over each category's tasks, and the average over categories."""
    pairs = [(task_scores.task, part) for task_scores, part in zip(scores, parts, strict=True)]
    columns = {task.name: part for task, part in pairs}
    averages: dict[str, _Resampled] = {}
    for category in CATEGORIES:
        of_category = [part for task, part in pairs if task.category == category]
        if of_category:
            averages[category] = _average(of_category)
    return {**columns, **averages, OVERALL: _average(list(averages.values()))}


def _sink(scores: TaskScores, setting: str, seed: int) -> Interval | None:
    pairs = zip(scores.sinks[setting], scores.questions, strict=True)
    known = [(sink, question) for sink, question in pairs if not math.isnan(sink)]
    if not known:
        return None
    return bootstrap_mean([sink for sink, _ in known], groups=[question for _, question in known], seed=seed)


def tidy_rows(table: LengthTable) -> list[dict[str, Any]]:
    """Scores of a table in tidy form, one row per score, for further processing."""
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
