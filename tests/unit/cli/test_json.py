"""With ``--json``, standard output is one document with the content of the command's result file, and nothing else.

The test of ``focuslens published --json`` is next to the other tests of that command.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pytest
import torch

import focuslens as fl
from focuslens.cli import demo
from focuslens.cli.main import main
from tests.support.helmet_runs import STAND_IN, write_data
from tests.support.multidoc_files import oracle_record, write
from tests.support.paper_runs import SETTINGS

SHAPE = {"n_layers": 3, "n_heads": 4, "n_key_value_heads": 2, "d_head": 16}


@pytest.fixture(autouse=True)
def _closed_figures():
    yield
    plt.close("all")


@pytest.fixture
def common(checkpoint: Any, tmp_path: Path) -> list[str]:
    """Options for a quick run on a tiny model."""
    data = write(tmp_path / "oracle.jsonl", [oracle_record(i) for i in range(12)])
    return [
        "--model", str(checkpoint("llama")), "--data", str(data), "--documents", "2", "--gold-positions", "0,1",
        "--samples", "2", "--max-new-tokens", "3",
    ]  # fmt: skip


@pytest.fixture
def spoken(capsys: pytest.CaptureFixture[str]):
    """Function that runs a command with ``--json`` and returns the document. Any other output fails to parse."""

    def run(*arguments: str) -> dict[str, Any]:
        capsys.readouterr()
        assert main([*arguments, "--json"]) == 0
        document = json.loads(capsys.readouterr().out)
        assert all(Path(path).exists() for path in document["written"])
        return document

    return run


def without(document: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in document.items() if name not in ("written", *names)}


def directions(folder: Path, site: Any = "rotary") -> str:
    vectors = torch.randn(2, 16, generator=torch.Generator().manual_seed(0))
    made = fl.FocusDirections([(1, 0), (2, 1)], vectors, site=site, provenance={"shape": SHAPE})
    return str(made.save(folder / f"{site}-directions"))


def test_heads_and_what_it_writes(common, tmp_path, spoken):
    document = spoken("heads", *common, "--out", str(tmp_path / "out"))
    assert without(document) == json.loads((tmp_path / "out" / "heads.json").read_text())
    assert {"command", "model", "data", "seed", "versions", "scores", "intervals"} <= document.keys()
    assert [Path(path).name for path in document["written"]] == ["heads.json", "head_map.png"]


def test_without_a_place_for_results_the_document_is_the_same_and_nothing_is_written(
    common, tmp_path, monkeypatch, spoken
):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    document = spoken("heads", *common)
    assert document["written"] == []
    assert sorted(tmp_path.rglob("*")) == before
    assert document["scores"] == spoken("heads", *common, "--out", str(tmp_path / "out"))["scores"]


@pytest.mark.parametrize(
    ("command", "name"), [("split-softmax", "split_softmax"), ("steer", "steering"), ("generate", "generate")]
)
def test_sweeps_and_responses(command, name, common, tmp_path, spoken):
    of = {
        "split-softmax": ["--tau", "0.1", "--k", "1"],
        "steer": ["--directions", directions(tmp_path), "--alpha", "-2,2", "--k", "1"],
        "generate": ["--sample", "0", "--tau", "0.1", "--top-k", "1"],
    }
    (tmp_path / "ranking.json").write_text("[[1, 0], [2, 1], [0, 0]]")
    options = ["--heads", str(tmp_path / "ranking.json"), *of[command]]
    document = spoken(command, *common, *options, "--out", str(tmp_path / "out"))
    assert without(document) == json.loads((tmp_path / "out" / f"{name}.json").read_text())
    assert document["seed"] == 42
    assert {Path(path).suffix for path in document["written"]} >= {".json"}
    again = spoken(command, *common, *options)
    assert without(again) == without(document)


def test_train(common, tmp_path, spoken):
    document = spoken("train", *common, "--top-k", "2", "--epochs", "1", "--out", str(tmp_path / "out"))
    assert without(document, "command") == json.loads((tmp_path / "out" / "directions.json").read_text())
    assert document["command"] == "train"
    assert {"model", "data", "settings", "versions", "losses"} <= document["provenance"].keys()
    assert len(document["written"]) == 3


@pytest.mark.parametrize(("command", "site"), [("fold", "projection"), ("export", "rotary"), ("export", "projection")])
def test_checkpoints(command, site, checkpoint, tmp_path, spoken):
    options = ["--model", str(checkpoint("llama")), "--directions", directions(tmp_path, site), "--alpha", "-0.5"]
    if command == "export":
        options += ["--site", site]
    document = spoken(command, *options, "--out", str(tmp_path / "steered"))
    record = json.loads((tmp_path / "steered" / "focuslens.json").read_text())
    assert record.items() <= document.items()
    assert document["steering"]["alpha"] == -0.5
    assert document["command"] == command
    assert document["left_out"] == []
    assert document["written"] == [str(tmp_path / "steered")]


def test_harness(common, tmp_path, spoken):
    options = common[2:]
    document = spoken("harness", *options, "--name", "task", "--out", str(tmp_path / "out"))
    assert without(document) == json.loads((tmp_path / "out" / "task.json").read_text())
    assert document["data"]["samples"] == 2
    assert {Path(path).name for path in document["written"]} == {
        "task.yaml",
        "task.jsonl",
        "task.json",
        "task_score.py",
    }


def test_demo(tmp_path, monkeypatch, spoken):
    few = replace(
        demo.DemoSettings(), scored=2, trained=2, chosen=2, tested=2, taus=(0.1,), ks=(1,), alphas=(1.0,), steered=(1,)
    )
    monkeypatch.setattr(demo, "DemoSettings", lambda: replace(few, trained_heads=1, epochs=1, max_new_tokens=3))
    document = spoken("demo", "--out", str(tmp_path / "demo"), "--device", "cpu")
    assert without(document) == json.loads((tmp_path / "demo" / "results.json").read_text())
    assert str(tmp_path / "demo" / "report.html") in document["written"]


def test_paper(checkpoint, paper_files, tmp_path, spoken):
    file = tmp_path / "tiny.yaml"
    file.write_text(SETTINGS.format(model=checkpoint("llama"), file=paper_files / "oracle.jsonl", haystack=paper_files))
    document = spoken("paper", "--model", str(file), "--only", "heads", "--out", str(tmp_path / "out"))
    (artefact,) = document["artefacts"]
    assert artefact == json.loads((tmp_path / "out" / "heads" / "artefact.json").read_text())
    assert {"model", "settings", "prompts_sha256", "versions"} <= artefact["header"].keys()
    assert document["written"] == [str(tmp_path / "out" / name) for name in ("index.html", "heads")]


def test_helmet(checkpoint, tmp_path, spoken):
    root = write_data(tmp_path / "root")
    named = ["--helmet", str(STAND_IN), "--config", "configs/pair.yaml", "--data", str(root), "--tasks", "json_kv"]
    model = ["--model", str(checkpoint("llama")), "--dtype", "float32", "--max-test-samples", "1"]
    document = spoken("helmet", *named, *model, "--out", str(tmp_path / "out"))
    assert without(document, "command") == json.loads((tmp_path / "out" / "helmet.json").read_text())
    assert document["figures"]


def test_recall_sets_whichever_of_the_two_is_asked(tmp_path, spoken, capsys):
    made = ["make-recall", "--lengths", "2000", "--tokenizer", "demo", "--samples", "1", "--out", str(tmp_path / "r")]
    document = spoken("helmet", *made)
    record = json.loads((tmp_path / "r" / "recall.json").read_text())
    assert record.items() <= document.items()
    assert len(document["tokens"]) == 4
    assert main(["helmet", "--json", *made]) == 0
    assert json.loads(capsys.readouterr().out) == document


def test_report(recorded_run, tmp_path, spoken):
    page = tmp_path / "page.html"
    document = spoken("report", str(recorded_run / "out"), "--views", "0", "--out", str(page))
    heads = json.loads((recorded_run / "out" / "heads" / "heads.json").read_text())
    assert Path(heads["model"]["name"]).name in document["model"]
    assert heads["versions"]["torch"] in document["versions"]
    assert "No attention views: none were requested." in document["left_out"]
    assert document["written"] == [str(page)]


def test_an_error_is_a_line_on_standard_error_and_there_is_no_document(capsys):
    assert main(["heads", "--json", "--model", "./nowhere"]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("focuslens heads: --model: there is no directory './nowhere'")
    assert said.err.count("\n") == 1
    with pytest.raises(SystemExit) as stop:
        main(["heads", "--json", "--samples", "many"])
    assert stop.value.code == 2
    assert capsys.readouterr().out == ""


def test_what_people_read_goes_to_standard_error_and_is_silenced_by_quiet(common, capsys):
    assert main(["heads", *common, "--json"]) == 0
    assert "relevant  irrelevant" in capsys.readouterr().err
    assert main(["heads", *common, "--json", "-q"]) == 0
    said = capsys.readouterr()
    assert said.err == ""
    assert json.loads(said.out)["command"] == "heads"
