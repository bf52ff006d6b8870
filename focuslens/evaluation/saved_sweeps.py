"""Sweeps that are read from their result files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from focuslens.evaluation.resume import read_records
from focuslens.evaluation.runner import Evaluation, Setting, Sweep, evaluation_of
from focuslens.util.statistics import Interval

__all__ = ["load_sweep"]


def load_sweep(path: str | Path, *, order: Sequence[str] = (), rows: Sequence[Mapping[str, Any]] = ()) -> Sweep:
    """A sweep from the file that ``run_sweep(out=...)`` wrote, with the samples that are done.

    The settings have no interventions; the header's ``settings`` describe them. The bootstrap depends on the order of
    the samples, and the file holds them in the order in which they finished. With another order, the ends of the
    intervals differ slightly, by chance. To get the run's own intervals, give the order of its samples, or the rows
    that it wrote.

    Args:
        path: The JSON-lines file.
        order: ``MultiDocSample.id`` of each sample, in the order given to the run.
        rows: :meth:`Sweep.rows` as the run wrote them; their intervals replace the computed ones.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not the result file of a sweep, or no sample is done.
    """
    header, records = read_records(path)
    if not records or not all("results" in record for record in records) or "settings" not in header:
        raise ValueError(f"{path} holds no results of a sweep: it has {len(records)} records")
    index_of = {name: i for i, name in enumerate(order)}
    records.sort(key=lambda record: index_of.get(record["id"], len(index_of)))
    settings = tuple(
        Setting(description["name"], case=description["case"], parameters=description["parameters"])
        for description in header["settings"]
    )
    seed, row_of = int(header.get("seed", 0)), {row["name"]: row for row in rows}
    evaluations = {
        setting.name: _with_interval(evaluation_of(records, setting.name, seed), row_of.get(setting.name))
        for setting in settings
    }
    return Sweep(settings, evaluations, header)


def _with_interval(evaluation: Evaluation, row: Mapping[str, Any] | None) -> Evaluation:
    """The evaluation with the interval of a row, if the row is of the same samples."""
    if row is None or row["samples"] != len(evaluation) or abs(row["em"] - evaluation.em.mean) > 1e-9:
        return evaluation
    return replace(evaluation, em=Interval(row["em"], row["em_low"], row["em_high"], evaluation.em.confidence))
