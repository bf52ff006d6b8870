"""Loading of saved sweeps from result files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from focuslens.evaluation.setting import Setting
from focuslens.evaluation.sweeps import Evaluation, Sweep, evaluation_of
from focuslens.util.record_file import read_records
from focuslens.util.statistics import Interval

__all__ = ["load_sweep"]


def load_sweep(path: str | Path, *, order: Sequence[str] = (), rows: Sequence[Mapping[str, Any]] = ()) -> Sweep:
    """Read a sweep, with all finished samples, from a file written by ``run_sweep(out=...)``.

    The loaded settings have no interventions. The ``settings`` entry of the header describes the interventions instead.

    The bootstrap depends on the order of the samples. The file contains the samples in the order in which they
    finished. Therefore, the intervals can differ slightly from the intervals of the original run. To get the original
    intervals, pass the original order of the samples, or the rows of the original sweep.

    Args:
        path: Path of the JSON-lines file.
        order: ``MultiDocSample.id`` of each sample, in the order of the samples in the original run.
        rows: Rows of the original sweep, from :meth:`Sweep.rows`. The intervals in these rows replace the computed
            intervals.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If the file is not the result file of a sweep, or if no sample is finished.
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
    """Evaluation with the interval from ``row``, if ``row`` has the evaluation's sample count and exact match."""
    if row is None or row["samples"] != len(evaluation) or abs(row["em"] - evaluation.em.mean) > 1e-9:
        return evaluation
    return replace(evaluation, em=Interval(row["em"], row["em_low"], row["em_high"], evaluation.em.confidence))
