"""Sweeps and interventions loaded from result files equal those that were written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import focuslens as fl
from focuslens.evaluation import Interval, load_sweep, read_records
from focuslens.interventions import intervention_from


@pytest.fixture(scope="module")
def ran(load_model, samples, tmp_path_factory):
    """A sweep of three settings, and the path of its result file."""
    path = tmp_path_factory.mktemp("sweep") / "sweep.jsonl"
    settings = [fl.Setting("baseline"), *fl.split_softmax_settings([(0, 1), (1, 0)], [0.2], [1, 2])]
    # With several batches, the samples have a different order in the file.
    sweep = fl.run_sweep(load_model("llama"), samples, settings, max_new_tokens=4, batch_tokens=1, out=path, seed=5)
    return sweep, path


def test_a_sweep_is_read_as_it_was_run(ran, samples):
    sweep, path = ran
    read = load_sweep(path, order=[sample.id for sample in samples])
    assert read.evaluations == sweep.evaluations
    assert read.header == json.loads(json.dumps(sweep.header))
    assert [(one.name, one.case, dict(one.parameters)) for one in read.settings] == [
        (one.name, one.case, dict(one.parameters)) for one in sweep.settings
    ]
    assert read.rows() == sweep.rows()


def test_without_an_order_samples_come_as_they_were_done(ran):
    _, path = ran
    header, records = read_records(path)
    assert load_sweep(path)["baseline"].sample_ids == tuple(record["id"] for record in records)
    assert header["seed"] == 5


def test_a_sweep_that_was_stopped_is_read_as_far_as_it_got(ran, tmp_path: Path):
    _, path = ran
    content = path.read_bytes()
    half = tmp_path / "half.jsonl"
    half.write_bytes(content[: content.rindex(b'"id"') + 9])
    read = load_sweep(half)
    assert len(read["baseline"]) == 3
    assert half.read_bytes() == content[: content.rindex(b'"id"') + 9]  # reading does not modify the file
    half.write_bytes(content[: content.index(b"\n") + 1])
    with pytest.raises(ValueError, match="no results of a sweep: it has 0 records"):
        load_sweep(half)
    half.write_bytes(content[:50])
    with pytest.raises(ValueError, match="contains no complete line"):
        load_sweep(half)
    half.write_text('{"header": {}}\n{"id": "a"}\n')
    with pytest.raises(ValueError, match="no results of a sweep"):
        load_sweep(half)


def test_intervals_are_those_that_the_run_wrote_if_they_are_of_the_same_samples(ran):
    sweep, path = ran
    mean = sweep["baseline"].em.mean
    row = {"name": "baseline", "em": mean, "em_low": mean - 0.125, "em_high": mean + 0.25, "samples": 4}
    assert load_sweep(path, rows=[row])["baseline"].em == Interval(mean, mean - 0.125, mean + 0.25, 0.95)
    for other in ({"samples": 3}, {"em": mean + 0.1}, {"name": "x"}):
        assert load_sweep(path, rows=[{**row, **other}])["baseline"].em != row["em_low"]
        assert load_sweep(path, rows=[{**row, **other}])["baseline"].em == load_sweep(path)["baseline"].em


def directions() -> fl.FocusDirections:
    generator = torch.Generator().manual_seed(0)
    return fl.FocusDirections([(0, 1), (1, 3), (2, 0)], torch.randn(3, 16, generator=generator))


@pytest.mark.parametrize(
    "intervention",
    [
        fl.SplitSoftmax([(0, 1), (1, 0)], tau=0.3),
        fl.SplitSoftmax([(0, 1)], tau=2, span=(3, 7)),
        fl.FocusSteering(directions(), -0.5, [(2, 0), (0, 1)], "response"),
        fl.FocusSteering(directions(), 1.5),
        fl.HeadAblation([(0, 0)]),
        fl.HeadAblation([(0, 0)], "knockout", span="relevant"),
        fl.HeadAblation([(1, 1)], "knockout", span=(0, 2), positions="all"),
    ],
)
def test_an_intervention_is_what_it_described(intervention: Any):
    description = json.loads(json.dumps(intervention.describe()))
    others = fl.FocusDirections([(0, 1), (2, 0)], torch.ones(2, 16))
    again = intervention_from(description, [others, directions()])
    assert type(again) is type(intervention)
    assert again.describe() == intervention.describe()


def test_what_a_description_does_not_hold_is_named():
    described = fl.FocusSteering(directions(), 1.0).describe()
    with pytest.raises(ValueError, match=f"digest {described['directions_sha256'][:16]}"):
        intervention_from(described, [fl.FocusDirections([(0, 1)], torch.ones(1, 16))])
    mean = fl.HeadAblation([(0, 0)], "mean", mean=torch.zeros(1, 16)).describe()
    for one, kind in ((mean, "head_ablation"), ({"kind": "other"}, "other")):
        with pytest.raises(ValueError, match=f"kind '{kind}' cannot be made"):
            intervention_from(one)
