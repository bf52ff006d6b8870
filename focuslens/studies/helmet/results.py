"""Records as HELMET's own result files, made by HELMET's own code, and the figures that tables are made of."""

from __future__ import annotations

import copy
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from focuslens.evaluation.records import RecordFile
from focuslens.studies.helmet.checkout import Checkout
from focuslens.studies.helmet.plan import Entry
from focuslens.studies.helmet.tasks import Task
from focuslens.util.files import write_atomically, write_json

__all__ = ["TaskScores", "write_results"]

_MEASURED = ("throughput", "memory_usage")
"""What HELMET's files say of the run itself."""


@dataclass(frozen=True)
class TaskScores:
    """One task at one length under every setting.

    Attributes:
        task: The task.
        length: Tokens of a prompt and its response together, at most.
        questions: The question of each sample.
        values: By setting: the figure that counts, one a sample, times 100.
        sinks: By setting: attention to the sink in percent, averaged over the heads that were watched, one a sample;
            NaN for a response without tokens. Empty where none were watched.
        truncated: How many prompts HELMET cut to the input length.
    """

    task: Task
    length: int
    questions: tuple[str, ...]
    values: Mapping[str, tuple[float, ...]]
    sinks: Mapping[str, tuple[float, ...]]
    truncated: int = 0


class _Recorded:
    """Stands where HELMET has a model, and says again what was recorded under one setting."""

    def __init__(self, tokenizer: Any, records: Sequence[Mapping[str, Any]], setting: str) -> None:
        self.tokenizer = tokenizer
        self._outputs = [
            {
                "output": record["results"][setting]["output"],
                "input_len": record["input_len"],
                "output_len": len(record["results"][setting]["tokens"]),
                "input_text": record["input_text"],
            }
            for record in records
        ]

    def prepare_inputs(self, item: Any, data: Any) -> dict[str, Any]:
        """Nothing: prompts have been prepared, and answered."""
        return {}

    def generate_batch(self, inputs: Sequence[Any], **_: Any) -> list[dict[str, Any]]:
        """The responses; takes a moment, since HELMET divides by the time that it takes."""
        began = time.time()
        while time.time() == began:
            time.sleep(1e-3)
        return [dict(output) for output in self._outputs]


def write_results(
    checkout: Checkout, entry: Entry, data: Mapping[str, Any], store: RecordFile, tokenizer: Any, folder: Path
) -> TaskScores:
    """HELMET's result files of one task, one folder a setting, and its figures.

    HELMET's ``run_test`` computes the metrics and writes the file, to a temporary place; what made the responses is
    added (``focuslens``), throughput and memory become null, since HELMET would measure how records are read, and the
    file is put where HELMET's ``scripts/collect_results.py`` looks for it: ``FOLDER/MODEL-SETTING``, with ``.score``
    beside it.

    Args:
        checkout: HELMET.
        entry: The task.
        data: What HELMET loaded for it.
        store: The records, one a sample.
        tokenizer: The model's.
        folder: ``output`` by HELMET's custom.
    """
    records = [store.records[str(place)] for place in range(len(data["data"]))]
    names = [setting["name"] for setting in store.header["settings"]]
    values: dict[str, tuple[float, ...]] = {}
    sinks: dict[str, tuple[float, ...]] = {}
    for name in names:
        content, file = _run_test(checkout, entry, data, _Recorded(tokenizer, records, name))
        place = folder / f"{Path(str(entry.args.model_name_or_path)).name}-{name}"
        content["args"] |= {"output_dir": str(place)}
        content |= {name: None for name in _MEASURED if name in content}
        content["focuslens"] = {**store.header, "setting": name}
        write_json(place / file, content)
        write_atomically(place / f"{file}.score", json.dumps(content["averaged_metrics"], indent=4).encode())
        values[name] = _figures(entry, content["data"])
        sinks |= _sinks(name, records)
    questions = tuple(str(record["question"]) for record in records)
    truncated = sum(bool(record["truncated"]) for record in records)
    return TaskScores(entry.task, entry.length, questions, values, sinks, truncated)


def _run_test(checkout: Checkout, entry: Entry, data: Mapping[str, Any], model: Any) -> tuple[dict[str, Any], str]:
    """What HELMET writes, and the name of the file that it writes it to."""
    with tempfile.TemporaryDirectory() as temporary:
        args = copy.copy(entry.args)
        own = {"output_dir": temporary, "num_workers": 0, "overwrite": True}
        vars(args).update(own)
        path = checkout.evaluate(args, model, data)
        if not path.is_file():
            raise ValueError(f"HELMET evaluated nothing of {entry.dataset}: it wrote no {path.name}")
        content: dict[str, Any] = json.loads(path.read_text())
    content["args"] |= {name: getattr(entry.args, name) for name in own}
    return content, path.name


def _figures(entry: Entry, rows: Sequence[Mapping[str, Any]]) -> tuple[float, ...]:
    metric = entry.task.metric
    if metric not in rows[0]:
        raise ValueError(
            f"HELMET computed no {metric} for {entry.dataset}; its results have {', '.join(rows[0])} "
            "(NDCG@10 needs prompts of at least ten passages)"
        )
    return tuple(100 * float(row[metric]) for row in rows)


def _sinks(name: str, records: Sequence[Mapping[str, Any]]) -> dict[str, tuple[float, ...]]:
    """In percent, averaged over heads."""
    found = [record["results"][name]["sink"] for record in records]
    if not found or found[0] is None:
        return {}
    nan = float("nan")
    return {name: tuple(nan if None in one else 100 * sum(one) / len(one) for one in found)}
