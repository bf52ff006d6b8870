"""Reading of sweeps from their result files."""

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
    """Read a sweep, with all finished samples, from the file that ``run_sweep(out=...)`` wrote.

    The settings of the result hold no interventions; ``settings`` in the header describes the interventions. The
    bootstrap depends on the order of the samples, and the file holds samples in the order in which they finished.
    Intervals can therefore differ slightly, by chance, from the intervals of the run. To get the run's own intervals,
    give the original order of the samples, or the rows that the run wrote.

    Args:
        path: Path of the JSON-lines file.
        order: ``MultiDocSample.id`` of each sample, in the order given to the run.
        rows: The rows (:meth:`Sweep.rows`) that the run wrote. Their intervals replace the computed intervals.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If the file is not the result file of a sweep, or no sample is finished.
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
    """The evaluation, with the interval from the row if the row belongs to the same samples."""
    if row is None or row["samples"] != len(evaluation) or abs(row["em"] - evaluation.em.mean) > 1e-9:
        return evaluation
    return replace(evaluation, em=Interval(row["em"], row["em_low"], row["em_high"], evaluation.em.confidence))
