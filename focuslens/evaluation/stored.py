"""Sweeps that were run before, read from their result files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from focuslens.evaluation.records import read_records
from focuslens.evaluation.runner import Evaluation, Setting, Sweep, evaluation_of
from focuslens.util.statistics import Interval

__all__ = ["load_sweep"]


def load_sweep(path: str | Path, *, order: Sequence[str] = (), rows: Sequence[Mapping[str, Any]] = ()) -> Sweep:
    """A sweep from the file that ``run_sweep(out=...)`` wrote, as far as it got.

    Its settings have no interventions: the header's ``settings`` describe them. The bootstrap draws samples by their
    place, and the file holds them in the order in which they were done: with another order the ends of intervals
    differ by as much as chance lets them. Give the samples' order, or what the run wrote.

    Args:
        path: The JSON-lines file.
        order: ``MultiDocSample.id`` of the samples as they were given to the run.
        rows: :meth:`Sweep.rows` as the run wrote them; their intervals are taken over.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no result file of a sweep, or no sample is done.
    """
    header, records = read_records(path)
    if not records or not all("results" in record for record in records) or "settings" not in header:
        raise ValueError(f"{path} holds no results of a sweep: it has {len(records)} records")
    place = {name: i for i, name in enumerate(order)}
    records.sort(key=lambda record: place.get(record["id"], len(place)))
    settings = tuple(Setting(one["name"], case=one["case"], parameters=one["parameters"]) for one in header["settings"])
    seed = int(header.get("seed", 0))
    made = {setting.name: evaluation_of(records, setting.name, seed) for setting in settings}
    written = {row["name"]: row for row in rows}
    return Sweep(settings, {name: _as_written(one, written.get(name)) for name, one in made.items()}, header)


def _as_written(evaluation: Evaluation, row: Mapping[str, Any] | None) -> Evaluation:
    """With the interval that the run wrote, if it is of the same samples."""
    if row is None or row["samples"] != len(evaluation) or abs(row["em"] - evaluation.em.mean) > 1e-9:
        return evaluation
    return replace(evaluation, em=Interval(row["em"], row["em_low"], row["em_high"], evaluation.em.confidence))
