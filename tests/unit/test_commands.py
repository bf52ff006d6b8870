"""The commands say what they cannot do before they begin, keep what others made, and control with other heads."""

from __future__ import annotations

import argparse
import json
import sys

import pytest
from multidoc_files import oracle_record, write

from focuslens.cli import _parser, main
from focuslens.commands import sweeps
from focuslens.heads import Head

MODEL = ["--documents", "2", "--samples", "2", "--max-new-tokens", "3"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "--sample", "-1"], "there is no sample -1"),
        (["generate", "--prompt", "x", "--device", "nowhere"], "device is 'nowhere', which is not here"),
        (["generate", "--prompt", "x", "--dtype", "float64x"], "dtype is 'float64x'"),
        (["heads", "--model", "/nowhere/at/all"], "there is no directory '/nowhere/at/all'"),
        (["steer", "--directions", "runs/a/b/direction_relevant"], "there is no directory 'runs/a/b/direction_rele"),
        (["steer", "--directions", "./nothing"], "there is no directory './nothing'"),
    ],
)
def test_what_is_not_there_is_named(arguments, message, capsys):
    assert main([*arguments, *MODEL] if arguments[0] != "generate" else arguments) == 1
    assert message in capsys.readouterr().err


def test_a_sample_beyond_the_last_is_named(tmp_path, capsys):
    file = write(tmp_path / "oracle.jsonl", [oracle_record(i) for i in range(8)])
    assert main(["generate", "--sample", "3000", "--data", str(file), "--documents", "2"]) == 1
    assert "there is no sample 3000" in capsys.readouterr().err


def test_a_ranking_that_is_no_json_names_the_file(tmp_path, capsys):
    (tmp_path / "heads.json").write_text("")
    assert main(["split-softmax", "--heads", str(tmp_path / "heads.json"), *MODEL]) == 1
    assert "heads.json is not a ranking of heads: it is not JSON" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["heads", "split-softmax"])
def test_figures_that_cannot_be_drawn_are_known_before_the_work(command, tmp_path, monkeypatch, capsys):
    for name in [name for name in sys.modules if name.startswith("focuslens.viz")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "circuitsvis", None)
    assert main([command, *MODEL, "--out", str(tmp_path / "out")]) == 1
    assert "pip install 'focuslens[viz]'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_without_figures_a_command_needs_nothing_to_draw_with(monkeypatch, capsys):
    for name in [name for name in sys.modules if name.startswith("focuslens.viz")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["split-softmax", *MODEL, "--k", "1", "--tau", "0.1"]) == 0
    assert "split-softmax random tau=0.3 k=1" in capsys.readouterr().out


def test_the_demo_offers_only_what_it_uses(capsys):
    for option in ("--samples", "--documents", "--split", "--batch-tokens", "--chat"):
        with pytest.raises(SystemExit):
            _parser().parse_args(["demo", option, "1"])
    assert _parser().parse_args(["demo", "--dtype", "float64"]).dtype == "float64"


def test_controls_are_outside_every_contextual_set_of_the_sweep(load_model, capsys):
    model = load_model("llama")
    ranking = [Head(layer, head) for layer in range(3) for head in range(4)]
    args = argparse.Namespace(random_tau=0.3, exclude_top=1, seed=0)
    settings = sweeps.controls(model, ranking, args, [2, 7])
    assert [setting.parameters["k"] for setting in settings] == [2]
    assert not set(ranking[:7]) & set(settings[0].interventions[0].heads)
    assert "no random heads for --k 7: 5 heads are left beside the 7 best" in capsys.readouterr().out


def test_a_demo_sets_the_records_of_another_demo_aside(tmp_path, monkeypatch, capsys):
    from focuslens.commands.common import Samples
    from focuslens.commands.demo import _fresh_sweep
    from focuslens.data.synthetic import load_synthetic
    from focuslens.evaluation import Setting
    from focuslens.model import FocusModel

    model, path = FocusModel.demo(device="cpu"), tmp_path / "sweep.jsonl"
    samples = Samples(load_synthetic(1, num_documents=1, gold_positions=[0]), {})
    args = argparse.Namespace(max_new_tokens=3, batch_tokens=1, seed=1)
    first = _fresh_sweep(args, model, samples, [Setting("baseline")], path)
    content = path.read_text()
    args.seed = 2
    _fresh_sweep(args, model, samples, [Setting("baseline")], path)
    assert (tmp_path / "sweep.1.jsonl").read_text() == content
    assert json.loads(path.read_text().splitlines()[0])["header"]["seed"] == 2
    assert len(first["baseline"]) == 1
