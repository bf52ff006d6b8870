"""Contextual scores in result files: one JSON line per sample, from which a killed run resumes."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from focuslens.prompts.sample import prompts_digest
from focuslens.util.files import versions
from focuslens.util.record_file import RecordFile

if TYPE_CHECKING:
    from focuslens.scores.base import ResponseRun

__all__ = ["open_scores", "record_id", "score_record", "scores_of_record"]


def open_scores(path: str | Path, runs: Sequence[ResponseRun], data: Mapping[str, Any] | None) -> RecordFile:
    """Result file of runs over the same samples, in one case each.

    Raises:
        OtherResultsError: If the file belongs to a different run.
        ValueError: If the file is not a result file, or if two samples have the same id.
    """
    run = runs[0]
    names = [sample.id for sample in run.samples]
    if len(set(names)) < len(names):
        name = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"sample {name!r} occurs more than once; results are stored by id, so ids must differ")
    responses = None if run.responses is None else hashlib.sha256(json.dumps(list(run.responses)).encode()).hexdigest()
    header = {
        "model": run.executor.description,
        "data": {**(data or {}), "samples": len(run.samples), "prompts_sha256": prompts_digest(run.samples)},
        "scores": [run.case for run in runs],
        "interventions": [intervention.describe() for intervention in run.interventions],
        "responses_sha256": responses,
        "max_new_tokens": run.options.max_new_tokens,
        "versions": versions(),
    }
    return RecordFile(path, header)


def record_id(case: str, sample_id: str) -> str:
    """Id of a record. Two cases of the same sample can be in one file."""
    return f"{case} {sample_id}"


def score_record(
    case: str, sample_id: str, response: str, scores: Mapping[str, Float[Tensor, "layer head"]]
) -> dict[str, Any]:
    """Record of a sample as JSON values. Scores keep all their digits, and NaN becomes ``None``."""
    tables = {kind: [[_digits(x) for x in row] for row in table.tolist()] for kind, table in scores.items()}
    return {"id": record_id(case, sample_id), "response": response, "scores": tables}


def _digits(value: float) -> float | None:
    """The shortest usual number that gives the same 32-bit number: nine digits identify it."""
    return None if math.isnan(value) else float(f"{value:.9g}")


def scores_of_record(record: Mapping[str, Any]) -> dict[str, Float[Tensor, "layer head"]]:
    """Scores of each kind from the record of a sample."""
    return {
        kind: torch.tensor([[math.nan if x is None else x for x in row] for row in table])
        for kind, table in record["scores"].items()
    }
