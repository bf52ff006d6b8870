"""Files that can be published name models, data and directions without the folders of this machine."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import focuslens as fl
from focuslens.cli.main import main
from focuslens.directions.checkpoints import export, fold
from focuslens.studies.paper.run import reproduce
from focuslens.util.files import without_folders
from focuslens.util.places import remember_place, remembered_place
from tests.support.paper_runs import opened, write_files


def paths_in(folder: Path) -> list[str]:
    """Absolute paths of this machine in the text files below a folder."""
    texts = {
        path: path.read_text(encoding="utf-8")
        for path in folder.rglob("*")
        if path.suffix in (".json", ".jsonl", ".md", ".csv") and path.name != "tokenizer.json"
    }
    assert texts
    found = {path.name: re.findall(r"/(?:tmp|home|root)/\S+", text) for path, text in texts.items()}
    return [f"{name}: {place}" for name, places in found.items() for place in places]


def test_results_of_commands_hold_no_paths(recorded_run):
    assert paths_in(recorded_run / "out") == []


@pytest.mark.parametrize(("write", "site"), [(export, "rotary"), (fold, "projection")])
def test_checkpoints_and_their_cards_hold_no_paths(write, site, load_model, checkpoint, tmp_path):
    model = load_model("llama_bias" if site == "projection" else "llama")
    name = str(checkpoint("llama_bias" if site == "projection" else "llama"))
    recorded: Any = {"model": {"name": name}}
    directions = fl.FocusDirections([(0, 1)], torch.ones(1, model.shape.d_head), site=site, provenance=recorded)
    write(name, fl.FocusSteering(directions, 1.0), tmp_path / "out")
    assert paths_in(tmp_path / "out") == []
    assert Path(name).name in (tmp_path / "out" / "README.md").read_text()


def test_the_papers_artefacts_hold_no_paths(checkpoint, tmp_path):
    files = write_files(tmp_path)
    study = opened(tmp_path, files, str(checkpoint("llama")))
    assert study.selection("test").describe()["file"] == "oracle.jsonl"
    reproduce(study, ["steering"])
    assert paths_in(tmp_path / "out") == []
    page = (tmp_path / "out" / "index.html").read_text()
    assert re.findall(r"/(?:tmp|home|root)/\S+", page) == []
    assert "oracle.jsonl" in page


def test_recall_sets_hold_no_paths(checkpoint, tmp_path):
    made = ["helmet", "make-recall", "--lengths", "2000", "--samples", "2", "--quiet"]
    assert main([*made, "--tokenizer", str(checkpoint("llama")), "--out", str(tmp_path / "out")]) == 0
    assert paths_in(tmp_path / "out") == []


def test_models_of_one_name_are_told_apart_by_their_weights(checkpoint, tmp_path, samples):
    for folder, source in (("a", "llama"), ("b", "llama_tied")):
        shutil.copytree(checkpoint(source), tmp_path / folder / "model")
    first, second = (fl.FocusModel.from_pretrained(str(tmp_path / f / "model"), device="cpu") for f in "ab")
    assert first.name == second.name == "model"
    fl.evaluate(first, samples[:1], max_new_tokens=2, out=tmp_path / "run.jsonl")
    with pytest.raises(ValueError, match="holds results of a different run"):
        fl.evaluate(second, samples[:1], max_new_tokens=2, out=tmp_path / "run.jsonl")
    # A directory that was moved is the same model.
    shutil.move(tmp_path / "a", tmp_path / "c")
    moved = fl.FocusModel.from_pretrained(str(tmp_path / "c" / "model"), device="cpu")
    fl.evaluate(moved, samples[:1], max_new_tokens=2, out=tmp_path / "run.jsonl")


def test_only_paths_lose_their_folders():
    value = {"a": ["/home/me/x", "owner/name", "/", "/a", "runs/x", "/a b\n/c"], "b": 3, "c": None}
    assert without_folders(value) == {"a": ["x", "owner/name", "/", "/a", "runs/x", "/a b\n/c"], "b": 3, "c": None}


def test_the_latest_directory_that_is_still_there_is_remembered(tmp_path, monkeypatch):
    monkeypatch.setenv("FOCUSLENS_CACHE", str(tmp_path / "cache"))
    model, other = {"weights": "w", "config": "c"}, {"weights": "w", "config": "d"}
    assert remembered_place(model) is None
    for name in "ab":
        (tmp_path / name).mkdir()
        remember_place(model, tmp_path / name)
    assert remembered_place(model) == tmp_path / "b"
    assert remembered_place(other) is None
    (tmp_path / "b").rmdir()
    assert remembered_place(model) == tmp_path / "a"
