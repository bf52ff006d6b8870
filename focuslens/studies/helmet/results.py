"""HELMET's result files, written by HELMET's code from recorded responses, and the scores for the tables."""

from __future__ import annotations

import copy
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from focuslens.studies.helmet.checkout import Checkout
from focuslens.studies.helmet.plan import Entry
from focuslens.studies.helmet.tasks import Task
from focuslens.util.files import write_atomically, write_json
from focuslens.util.record_file import RecordFile

__all__ = ["TaskScores", "write_results"]

_MEASURED = ("throughput", "memory_usage")
"""Entries on speed and memory in HELMET's result files."""


@dataclass(frozen=True)
class TaskScores:
    """Scores of one task at one length under every setting.

    Attributes:
        task: The task.
        length: Maximum length of a prompt and its response together, in tokens.
        questions: Identifier of each sample's question.
        values: Scores by setting, one per sample, multiplied by 100.
        sinks: Attention to the sink by setting, one value per sample, in percent, averaged over the sink heads. The
            value is NaN if the response is empty. Without sink heads, the mapping is empty.
        truncated: Number of prompts that HELMET truncated to the input length.
    """

    task: Task
    length: int
    questions: tuple[str, ...]
    values: Mapping[str, tuple[float, ...]]
    sinks: Mapping[str, tuple[float, ...]]
    truncated: int = 0


class _Recorded:
    """Substitute for the model, from which HELMET gets the responses recorded under one setting."""

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
        """An empty mapping, because the responses are already recorded."""
        return {}

    def generate_batch(self, inputs: Sequence[Any], **_: Any) -> list[dict[str, Any]]:
        """Return the recorded responses after a short wait, because HELMET divides by the elapsed time."""
        start = time.time()
        while time.time() == start:
            time.sleep(1e-3)
        return [dict(output) for output in self._outputs]


def write_results(
    checkout: Checkout, entry: Entry, data: Mapping[str, Any], store: RecordFile, tokenizer: Any, folder: Path
) -> TaskScores:
    """Write HELMET's result files of one task, in one folder per setting, and return the task's scores.

    HELMET's ``run_test`` computes the metrics and writes a file to a temporary folder. This function adds the entry
    ``focuslens`` with the origin of the responses. It sets throughput and memory to null, because HELMET measured only
    the reading of records. The file and a ``.score`` file are then written to ``FOLDER/MODEL-SETTING``, where HELMET's
    ``scripts/collect_results.py`` looks for them.

    Args:
        checkout: Checkout of HELMET.
        entry: The task.
        data: HELMET's data for the task.
        store: The records, one per sample.
        tokenizer: The model's tokenizer.
        folder: Folder of all result files, which HELMET calls ``output``.
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
    """Run HELMET's ``run_test``, and return the content and the name of the result file."""
    with tempfile.TemporaryDirectory() as temporary:
        args = copy.copy(entry.args)
        overrides = {"output_dir": temporary, "num_workers": 0, "overwrite": True}
        vars(args).update(overrides)
        path = checkout.evaluate(args, model, data)
        if not path.is_file():
            raise ValueError(f"HELMET evaluated nothing of {entry.dataset}: it wrote no {path.name}")
        content: dict[str, Any] = json.loads(path.read_text())
    content["args"] |= {name: getattr(entry.args, name) for name in overrides}
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
    """Each sample's attention to the sink in percent, averaged over heads, by setting; empty without sink heads."""
    sinks = [record["results"][name]["sink"] for record in records]
    if not sinks or sinks[0] is None:
        return {}
    nan = float("nan")
    return {name: tuple(nan if None in by_head else 100 * sum(by_head) / len(by_head) for by_head in sinks)}
