"""Runs of samples under several settings. Finished settings are recorded while the others are still running."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from focuslens.model.batching import Pace, map_parts
from focuslens.prompts.answers import sub_exact_match
from focuslens.util.progress import progress_bar

if TYPE_CHECKING:
    from focuslens.hooks import Intervention
    from focuslens.model.execution import Executor
    from focuslens.model.focus_model import FocusModel
    from focuslens.model.generation import Generation
    from focuslens.prompts.sample import MultiDocSample
    from focuslens.util.record_file import RecordFile

__all__ = ["Answer", "RecordedRun", "Task", "count_passes", "record_of", "result_of"]


@runtime_checkable
class Answer(Protocol):
    """Picklable function that runs a batch of samples under every setting."""

    def __call__(
        self, model: FocusModel, samples: Sequence[Any], budget: int, skip: frozenset[str], share: float
    ) -> Iterable[tuple[str, Sequence[Any]]]:
        """Run the samples.

        Args:
            model: The model.
            samples: The samples.
            budget: Maximum number of prompt tokens per pass.
            skip: Names of settings whose results are not needed.
            share: Fraction of the settings to run in one pass, so that a pass takes about a minute at most.

        Yields:
            The name of a setting and one result per sample, as soon as the setting is finished.
        """
        ...


@dataclass(eq=False)
class Task:
    """A sample to run.

    Attributes:
        id: Id of the sample in the records.
        sample: The sample.
        length: Length of its longest prompt, in tokens.
        results: Results of the finished settings, by the setting's name.
        name: Name of the sample in error messages.
    """

    id: str
    sample: Any
    length: int
    results: dict[str, Any]
    name: str


@dataclass(frozen=True)
class _End:
    """Last part of a batch's result: the duration of the batch; ``None`` if settings were skipped."""

    seconds: float | None


@dataclass(frozen=True, eq=False)
class RecordedRun:
    """A run of samples under every setting.

    Attributes:
        executor: Executor that runs the batches.
        answer: Function that runs a batch.
        settings: Names of the settings, in the order of the records.
        record: Function that makes the record of a sample from the sample and its results.
        store: File of records; ``None`` for a run that writes nothing.
        passes: Number of times that each prompt is run.
        max_new_tokens: Maximum length of a response, in tokens.
        alone: Whether each sample forms a batch by itself, in the order of the samples.
    """

    executor: Executor
    answer: Answer
    settings: tuple[str, ...]
    record: Callable[[Any, Mapping[str, Any]], dict[str, Any]]
    store: RecordFile | None
    passes: int
    max_new_tokens: int
    alone: bool = False

    def run(
        self, tasks: Sequence[Task], budget: int, label: str, *, n_done: int = 0, show: bool | None = None
    ) -> Generator[list[dict[str, Any]]]:
        """Run all tasks, write their records, and yield the records of each batch.

        Args:
            tasks: The samples that have no record.
            budget: Maximum number of prompt tokens per batch.
            label: Text of the progress bar.
            n_done: Number of samples that have a record.
            show: Whether to show the progress bar; ``None`` for the default.
        """
        executor, n_settings = self.executor, len(self.settings)
        # A run that writes nothing loses everything when it is killed, whatever its batches are.
        pace = None if self.store is None else Pace.of(executor, self.store, self._work(tasks), budget)
        done = n_done * n_settings + sum(len(task.results) for task in tasks)
        unit = "response" if n_settings > 1 else "sample"
        with progress_bar(label, (n_done + len(tasks)) * n_settings, unit=unit, done=done, show=show) as bar:
            ordered = tasks if self.alone else sorted(tasks, key=lambda task: task.length)
            # Tasks of a batch that was killed run together, so that the settings that it finished can be skipped.
            for _, group in groupby(ordered, key=lambda task: frozenset(task.results)):
                for batch, part in self._parts(list(group), budget, pace):
                    if not isinstance(part, _End):
                        bar.update(self._keep(batch, *part))
                        continue
                    if pace is not None and part.seconds is not None:
                        pace.measure(len(batch) * batch[-1].length, part.seconds)
                    yield self._finish(batch)

    def _work(self, tasks: Sequence[Task]) -> float:
        """Tokens to compute per prompt token."""
        n = len(tasks) * len(self.settings) * self.max_new_tokens
        return self.passes + n / max(1, sum(task.length for task in tasks))

    def _parts(self, tasks: Sequence[Task], budget: int, pace: Pace | None) -> Generator[tuple[list[Task], Any]]:
        names, lengths = [task.name for task in tasks], [task.length for task in tasks]
        run = partial(_run_batch, answer=self.answer, n_settings=len(self.settings))
        divisible = len(self.settings) > 1
        for indices, part in map_parts(
            self.executor, run, tasks, names, lengths, budget, divisible=divisible, alone=self.alone, pace=pace
        ):
            yield [tasks[i] for i in indices], part

    def _keep(self, batch: Sequence[Task], setting: str, results: Sequence[Any]) -> int:
        """Keep the results of one setting, and return how many of them are new."""
        by_id = {task.id: result for task, result in zip(batch, results, strict=True)}
        n_new = sum(setting not in task.results for task in batch)
        for task in batch:
            task.results[setting] = by_id[task.id]
        if self.store is not None and any(len(task.results) < len(self.settings) for task in batch):
            self.store.append_part(setting, by_id)
        return n_new

    def _finish(self, batch: Sequence[Task]) -> list[dict[str, Any]]:
        """Records of a finished batch, on disk if the run has a file."""
        # Settings can finish in an order that differs from the order of the records.
        records = [self.record(task.sample, {name: task.results[name] for name in self.settings}) for task in batch]
        if self.store is not None:
            self.store.append(records)
        return records


def _run_batch(
    model: FocusModel, tasks: Sequence[Task], budget: int, share: float = 1.0, *, answer: Answer, n_settings: int
) -> Generator[tuple[str, Sequence[Any]] | _End]:
    """Run a batch of tasks. Settings that are finished for every task are skipped."""
    started = time.monotonic()
    skip = frozenset[str].intersection(*(frozenset(task.results) for task in tasks))
    if len(skip) < n_settings:
        yield from answer(model, [task.sample for task in tasks], budget, skip, share)
    yield _End(None if skip else time.monotonic() - started)


def count_passes(settings: Iterable[Sequence[Intervention]]) -> int:
    """Number of settings that change the prompt, and that therefore run it again."""
    return sum(any(item.changes_prompt for item in interventions) for interventions in settings)


def result_of(sample: MultiDocSample, response: Generation) -> dict[str, Any]:
    """Result of one setting on a sample, as JSON values."""
    correct = sub_exact_match(response.text, sample.answers)
    return {"response": response.text, "correct": correct, "finished": response.finished}


def record_of(sample: MultiDocSample, results: Mapping[str, Any]) -> dict[str, Any]:
    """Record of a sample, with its results under all settings, as JSON values."""
    described = {"id": sample.id, "question_id": sample.question_id, "answers": list(sample.answers)}
    return {**described, "results": dict(results)}
