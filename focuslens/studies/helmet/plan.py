"""Plan of a run: the tasks in HELMET's configurations, parsed by HELMET and checked before the model is opened."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from focuslens.studies.helmet.checkout import Checkout
from focuslens.studies.helmet.tasks import Task, task_of

__all__ = ["Entry", "Plan", "read_plan"]

_REFUSED = {
    "do_sample": "responses are greedy",
    "thinking": "responses are not edited",
    "generation_min_length": "a response ends where the model ends it",
    "rope_theta": "the checkpoint's own value is used",
    "use_vllm": "FocusLens runs the model",
    "use_sglang": "FocusLens runs the model",
    "use_tgi_or_vllm_serving": "FocusLens runs the model",
    "count_tokens": "it runs no model; use HELMET's eval.py",
    "debug": "it waits for a keyboard; use HELMET's eval.py",
}
"""Options of HELMET that FocusLens does not support, each with the reason."""


@dataclass(frozen=True, eq=False)
class Entry:
    """One task at one length.

    Attributes:
        task: The task, which is a column in the paper's tables.
        args: Options of HELMET's ``eval.py``, with the values for this task.
        root: Folder that the names of data files are relative to.
    """

    task: Task
    args: Any
    root: Path

    @property
    def dataset(self) -> str:
        """HELMET's name for the data set."""
        return str(self.args.datasets)

    @property
    def length(self) -> int:
        """Maximum length of a prompt and its response together, in tokens."""
        return int(self.args.input_max_length)

    @property
    def max_new_tokens(self) -> int:
        """Maximum length of a response, in tokens."""
        return int(self.args.generation_max_length)

    @property
    def label(self) -> str:
        """Unique name of the entry, which is also a valid file name."""
        test = Path(self.args.test_files).stem
        return f"{self.dataset}{f'_{test}' if test else ''}_in{self.length}"

    def file(self, name: str) -> str:
        """Path of a data file. An empty name gives the empty string."""
        return str(self.root / name) if name else ""

    def describe(self) -> dict[str, Any]:
        """HELMET's options that determine the samples, as JSON values."""
        names = ("datasets", "test_files", "demo_files", "input_max_length", "generation_max_length", "shots", "seed")
        more = ("max_test_samples", "use_chat_template", "system_message", "stop_newline")
        return {name: getattr(self.args, name) for name in (*names, *more)}


@dataclass(frozen=True)
class Plan:
    """Entries of a run, and the data sets that are left out of the run because the paper does not use them."""

    entries: tuple[Entry, ...]
    left_out: tuple[str, ...]


def read_plan(
    checkout: Checkout,
    configs: Sequence[str],
    options: Sequence[str],
    *,
    root: Path,
    tasks: Sequence[str] = (),
    lengths: Sequence[int] = (),
) -> Plan:
    """Read the tasks of one or more HELMET configurations.

    Args:
        checkout: Checkout of HELMET.
        configs: YAML files, relative to the working directory or to the checkout.
        options: Options of HELMET's ``eval.py``, which override the options in the YAML files.
        root: Folder that the names of data files are relative to.
        tasks: HELMET's names of the tasks to run, in full or as in :attr:`Task.dataset`; empty means all tasks.
        lengths: Lengths to run; empty means all lengths.

    Raises:
        FileNotFoundError: If a configuration or a data file is missing.
        ValueError: If a task is unknown or occurs twice at one length, an option is unsupported, or no task is left to
            run.
    """
    chosen = [task for task in map(task_of, tasks) if task is not None]
    entries: list[Entry] = []
    left_out: list[str] = []
    for config in configs:
        args = checkout.parse(["--config", str(_config(checkout, config)), *options])
        for task_args in _split(args, config):
            task = task_of(task_args.datasets)
            if task is None:
                left_out.append(task_args.datasets)
            elif (not tasks or task in chosen) and (not lengths or task_args.input_max_length in lengths):
                entries.append(Entry(task, task_args, root))
    _require_distinct(entries)
    if not entries:
        raise ValueError(
            f"no task is left of {', '.join(configs)} with --tasks {','.join(tasks) or 'all'} and --lengths "
            f"{','.join(map(str, lengths)) or 'all'}"
        )
    for entry in entries:
        _require_possible(entry)
        _require_files(entry)
    return Plan(tuple(entries), tuple(dict.fromkeys(left_out)))


def _config(checkout: Checkout, name: str) -> Path:
    for path in (Path(name), checkout.root / name):
        if path.is_file():
            return path
    known = ", ".join(f"configs/{path.name}" for path in sorted((checkout.root / "configs").glob("*.yaml")))
    raise FileNotFoundError(f"there is no configuration {name}, here or in {checkout.root}; it has {known or 'none'}")


def _split(args: Any, config: str) -> list[Any]:
    """Split options with comma-separated tasks into the options of each task."""
    if args.datasets is None:
        raise ValueError(f"{config} names no data sets; HELMET's configurations do, under 'datasets'")
    datasets = str(args.datasets).split(",")
    columns = {
        "datasets": datasets,
        "test_files": str(args.test_files or "").split(","),
        "demo_files": str(args.demo_files or "").split(","),
        "input_max_length": [int(n) for n in str(args.input_max_length).split(",")],
        "generation_max_length": [int(n) for n in str(args.generation_max_length).split(",")],
    }
    by_task: list[Any] = []
    for name, values in columns.items():
        if name.endswith("length") and len(values) == 1:
            columns[name] = values * len(datasets)
        elif len(values) != len(datasets):
            raise ValueError(f"{config} has {len(datasets)} data sets and {len(values)} {name}; give one per data set")
    for place in range(len(datasets)):
        task_args = copy.copy(args)
        vars(task_args).update({name: values[place] for name, values in columns.items()})
        by_task.append(task_args)
    return by_task


def _require_distinct(entries: Sequence[Entry]) -> None:
    """Refuse two entries with the same task and length, because both scores would belong in one table cell."""
    first: dict[tuple[str, int], Entry] = {}
    for entry in entries:
        other = first.setdefault((entry.task.name, entry.length), entry)
        if other is not entry:
            raise ValueError(
                f"{entry.task.name} under {entry.length} tokens is in the configurations more than once "
                f"({other.label} and {entry.label}); a run can have it only once: leave a configuration out, or choose "
                "with --tasks and --lengths"
            )


def _require_possible(entry: Entry) -> None:
    for name, reason in _REFUSED.items():
        if getattr(entry.args, name, None):
            raise ValueError(f"HELMET's option {name} = {getattr(entry.args, name)} is not supported: {reason}")
    if entry.max_new_tokens >= entry.length:
        raise ValueError(
            f"{entry.dataset} has an input_max_length of {entry.length} and a generation_max_length of "
            f"{entry.max_new_tokens}, which leaves no room for a prompt"
        )


def _require_files(entry: Entry) -> None:
    for name in (entry.args.test_files, entry.args.demo_files):
        if name and not Path(entry.file(name)).exists():
            raise FileNotFoundError(
                f"the data of {entry.dataset} are missing: there is no {name} in {entry.root}. HELMET's "
                "scripts/download_data.sh, run in its folder, gets all data (34 GB); focuslens helmet make-recall "
                "makes the recall sets; --data names the folder that contains data/, if that is not the checkout"
            )
