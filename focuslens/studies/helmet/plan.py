"""What is to be run: HELMET's configurations, read by HELMET's own parser and checked before anything is opened."""

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
    "thinking": "responses are taken as they are",
    "generation_min_length": "a response ends where the model ends it",
    "rope_theta": "the checkpoint's own is used",
    "use_vllm": "FocusLens runs the model",
    "use_sglang": "FocusLens runs the model",
    "use_tgi_or_vllm_serving": "FocusLens runs the model",
    "count_tokens": "it runs no model; use HELMET's eval.py",
    "debug": "it waits for a keyboard; use HELMET's eval.py",
}
"""Options of HELMET's that mean nothing here, and why."""


@dataclass(frozen=True, eq=False)
class Entry:
    """One task at one length.

    Attributes:
        task: The column of the paper's tables.
        args: HELMET's options, as its ``eval.py`` has them while it runs this task.
        root: The folder that names of data files start from.
    """

    task: Task
    args: Any
    root: Path

    @property
    def dataset(self) -> str:
        """HELMET's name."""
        return str(self.args.datasets)

    @property
    def length(self) -> int:
        """Tokens of a prompt and its response together, at most."""
        return int(self.args.input_max_length)

    @property
    def max_new_tokens(self) -> int:
        """Tokens of a response, at most."""
        return int(self.args.generation_max_length)

    @property
    def label(self) -> str:
        """Tells it from other entries, as a file name."""
        test = Path(self.args.test_files).stem
        return f"{self.dataset}{f'_{test}' if test else ''}_in{self.length}"

    def file(self, name: str) -> str:
        """Where a data file lies; empty where the data have none."""
        return str(self.root / name) if name else ""

    def describe(self) -> dict[str, Any]:
        """What HELMET makes the samples from, as JSON."""
        names = ("datasets", "test_files", "demo_files", "input_max_length", "generation_max_length", "shots", "seed")
        more = ("max_test_samples", "use_chat_template", "system_message", "stop_newline")
        return {name: getattr(self.args, name) for name in (*names, *more)}


@dataclass(frozen=True)
class Plan:
    """What is to be run, and the names of HELMET's tasks in the configurations that the paper does not use."""

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
    """The tasks of some configurations.

    Args:
        checkout: HELMET.
        configs: YAML files, where they are named from or in the checkout.
        options: Of HELMET's ``eval.py``, which stand above the files'.
        root: The folder that names of data files start from.
        tasks: Only these, by HELMET's name or what it begins with; all where there are none.
        lengths: Only these; all where there are none.

    Raises:
        FileNotFoundError: If a configuration or a data file is missing.
        ValueError: If a task is unknown, an option is not possible here, or nothing is left to run.
    """
    wanted = [task for task in map(task_of, tasks) if task is not None]
    entries: list[Entry] = []
    left_out: list[str] = []
    for config in configs:
        args = checkout.parse(["--config", str(_config(checkout, config)), *options])
        for one in _split(args, config):
            task = task_of(one.datasets)
            if task is None:
                left_out.append(one.datasets)
            elif (not tasks or task in wanted) and (not lengths or one.input_max_length in lengths):
                entries.append(Entry(task, one, root))
    _require_distinct(entries)
    if not entries:
        raise ValueError(
            f"nothing is left to run of {', '.join(configs)} with --tasks {','.join(tasks) or 'all'} and --lengths "
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
    """The options of each task, of options that list tasks between commas."""
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
    found: list[Any] = []
    for name, values in columns.items():
        if name.endswith("length") and len(values) == 1:
            columns[name] = values * len(datasets)
        elif len(values) != len(datasets):
            raise ValueError(f"{config} has {len(datasets)} data sets and {len(values)} {name}; give one each")
    for place in range(len(datasets)):
        one = copy.copy(args)
        vars(one).update({name: values[place] for name, values in columns.items()})
        found.append(one)
    return found


def _require_distinct(entries: Sequence[Entry]) -> None:
    """Tables have one place for a task at a length, and records are kept by such names."""
    first: dict[tuple[str, int], Entry] = {}
    for entry in entries:
        other = first.setdefault((entry.task.name, entry.length), entry)
        if other is not entry:
            raise ValueError(
                f"{entry.task.name} under {entry.length} tokens is in the configurations more than once "
                f"({other.label} and {entry.label}); one run holds it once: leave a configuration out, or choose with "
                "--tasks and --lengths"
            )


def _require_possible(entry: Entry) -> None:
    for name, why in _REFUSED.items():
        if getattr(entry.args, name, None):
            raise ValueError(f"HELMET's option {name} = {getattr(entry.args, name)} is not for FocusLens: {why}")
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
                "makes the recall sets; --data names the folder that holds data/, where it is not the checkout"
            )
