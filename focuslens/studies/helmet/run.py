"""Run of a plan's tasks on one model, and the tables of the results."""

from __future__ import annotations

import logging
from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from focuslens.evaluation import Setting
from focuslens.heads import Head
from focuslens.model.batching import BATCH_TOKENS
from focuslens.model.execution import Executor
from focuslens.studies.helmet.answering import answer_entry, answering_for, require_askable
from focuslens.studies.helmet.checkout import Checkout
from focuslens.studies.helmet.page import grids_of, markdown, to_html
from focuslens.studies.helmet.paper_values import reported_rows
from focuslens.studies.helmet.plan import Entry
from focuslens.studies.helmet.results import TaskScores, write_results
from focuslens.studies.helmet.tables import LengthTable, length_tables, tidy_rows
from focuslens.util.files import versions, write_atomically, write_csv, write_json

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["HelmetRun"]

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class HelmetRun:
    """Run of one model on HELMET tasks.

    Attributes:
        executor: Executor of the model, in this process or on the workers of a pool.
        checkout: Checkout of HELMET.
        entries: Tasks, each at one length.
        settings: Settings under which every prompt of a task is answered, by the task's name. The names of the settings
            and their order are the same for all tasks.
        sink_heads: Heads whose attention to the sink is recorded.
        out: Folder for ``records`` (one line per sample), ``output`` (HELMET's files), ``tables``, ``tables.md``,
            ``index.html`` and ``helmet.json``.
        batch_tokens: Maximum number of prompt tokens per batch; halved when memory runs out.
        template_kwargs: Further keyword arguments of the chat template.
        repetition_penalty: Penalty on tokens that the prompt or the response already contains; 1 means no penalty.
        seed: Seed of the bootstrap intervals.
        progress: Whether to show progress bars; :mod:`focuslens.util.progress` describes the default.
    """

    executor: Executor
    checkout: Checkout
    entries: tuple[Entry, ...]
    settings: Mapping[str, tuple[Setting, ...]]
    sink_heads: tuple[Head, ...]
    out: Path
    batch_tokens: int = BATCH_TOKENS
    template_kwargs: Mapping[str, Any] = field(default_factory=dict[str, Any])
    repetition_penalty: float = 1.0
    seed: int = 42
    progress: bool | None = None
    _done: list[TaskScores] = field(default_factory=list[TaskScores], init=False, repr=False)

    def scores(self) -> Generator[TaskScores]:
        """Run all samples that have no record yet, task by task, and write HELMET's files for each task.

        Yields:
            The scores of each finished task.

        Raises:
            ValueError: If a prompt does not fit the model's context, the tokenizer lacks a chat template that a task
                needs, or the records in ``out`` have a different origin.
        """
        require_askable(self.executor, self.checkout, self.entries, self.template_kwargs)
        self._done.clear()
        for entry in self.entries:
            settings = self.settings[entry.task.name]
            answering = answering_for(self.executor, entry, settings, self.sink_heads, self.repetition_penalty)
            data, store = answer_entry(
                self.executor,
                self.checkout,
                entry,
                answering,
                self.out / "records",
                batch_tokens=self.batch_tokens,
                template_kwargs=self.template_kwargs,
                progress=self.progress,
            )
            scores = write_results(self.checkout, entry, data, store, self.executor.tokenizer, self.out / "output")
            self._done.append(scores)
            yield scores

    def write(self, facts: Mapping[str, str]) -> pd.DataFrame:
        """Write the tables of all finished tasks, and return the averages over tasks.

        Args:
            facts: Further facts about the run, by name.
        """
        import pandas as pd

        _LOG.info("tables of %d tasks, with their intervals", len(self._done))
        names = [setting.name for setting in next(iter(self.settings.values()))]
        tables = length_tables(self._done, names, self.seed)
        reported = reported_rows()
        grids = [grid for table in tables for grid in grids_of(table, self.executor.name, reported)]
        title, lines = f"HELMET, on {Path(self.executor.name).name}", {**self._facts(), **facts}
        lengths = [table.length for table in tables]
        for table in tables:
            self._write_csv(table)
        rows = [row for table in tables for row in tidy_rows(table)]
        write_csv(self.out / "tables" / "figures.csv", list(rows[0]), [list(row.values()) for row in rows])
        write_atomically(self.out / "tables.md", markdown(title, lines, grids).encode())
        write_atomically(self.out / "index.html", to_html(title, lines, grids, reported, lengths).encode())
        write_json(self.out / "helmet.json", {**self._origin(), "facts": lines, "figures": rows})
        shown = ["length", "setting", "column", "score", "difference", "against_baseline"]
        averages = [row for table in tables for row in tidy_rows(table) if row["column"] in table.averages]
        return pd.DataFrame(averages)[shown]

    def _write_csv(self, table: LengthTable) -> None:
        folder = self.out / "tables"
        for name, columns in (("tasks", table.tasks), ("averages", table.averages)):
            rows = [[s, *(table.cells[s, column].score.mean for column in columns)] for s in table.settings]
            write_csv(folder / f"{name}_{table.length}.csv", ["setting", *columns], rows)
        if not table.sinks:
            return
        rows = []
        for setting in table.settings:
            sinks = [table.sinks.get((setting, task)) for task in table.tasks]
            std = table.sink_std(setting)
            rows.append([setting, *("" if sink is None else sink.mean for sink in sinks), "" if std is None else std])
        write_csv(folder / f"sink_{table.length}.csv", ["setting", *table.tasks, "STD"], rows)

    def _origin(self) -> dict[str, Any]:
        return {
            "model": self.executor.description,
            "helmet": {"files_sha256": self.checkout.digest},
            "tasks": [entry.describe() for entry in self.entries],
            **self._described_settings(),
            "sink_heads": [list(head) for head in self.sink_heads],
            "repetition_penalty": self.repetition_penalty,
            "seed": self.seed,
            "versions": versions(),
        }

    def _described_settings(self) -> dict[str, Any]:
        """The settings of all tasks or, if the settings of two tasks differ, those of each task."""
        by_task = {task: [setting.describe() for setting in settings] for task, settings in self.settings.items()}
        first, *others = by_task.values()
        return {"settings": first} if all(other == first for other in others) else {"settings_by_task": by_task}

    def _facts_by_task(self) -> dict[str, str]:
        """Parameters of each setting whose parameters differ between tasks."""
        facts: dict[str, str] = {}
        for settings in zip(*self.settings.values(), strict=True):
            parameters = [dict(setting.parameters) for setting in settings]
            if any(other != parameters[0] for other in parameters):
                facts[settings[0].name] = "; ".join(
                    f"{task}: {', '.join(f'{key} {value}' for key, value in own.items())}"
                    for task, own in zip(self.settings, parameters, strict=True)
                )
        return facts

    def _facts(self) -> dict[str, str]:
        description, shape = self.executor.description, self.executor.shape
        heads = ", ".join(map(str, self.sink_heads))
        sink = f"attention of {heads} to the first two tokens, averaged over the response's tokens"
        return {
            "model": f"{self.executor.name}: {shape.n_layers} layers of {shape.n_heads} heads; weights "
            f"{description['weights']}, {description['dtype']} on {description['device']}",
            "responses": f"greedy, with a repetition penalty of {self.repetition_penalty:g} (1 is none)",
            "settings": "baseline, and HEADS_ALPHA: directions of strength ALPHA on the best HEADS heads",
            **self._facts_by_task(),
            "sink": sink if heads else "not measured, because there are neither directions nor a ranking of heads",
            "HELMET's files": f"digest {self.checkout.digest}",
            "seed": str(self.seed),
            "versions": ", ".join(f"{name} {number}" for name, number in versions().items()),
        }
