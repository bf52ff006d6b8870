"""Rankings and directions that ship with the package are found by name, and are those that were published."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

import focuslens as fl
from focuslens.interventions.directions import open_directions
from focuslens.util import shipped
from focuslens.util.shipped import shipped_directions, shipped_names, shipped_ranking
from tests.support.paths import ROOT

PUBLISHED = ROOT / "experiments" / "real_models"


@pytest.mark.parametrize("name", shipped_names("rankings"))
def test_a_ranking_is_the_published_one_and_ranks_every_head_once(name: str):
    ranking, path = fl.load_ranking(name), PUBLISHED / name / "ranking.json"
    assert [list(head) for head in ranking] == json.loads(path.read_text())["heads"]
    assert len(set(ranking)) == len(ranking)


@pytest.mark.parametrize("name", shipped_names("directions"))
def test_directions_are_those_of_the_best_heads(name: str):
    directions, model = fl.FocusDirections.load(name), name.removesuffix("-projection")
    assert directions.site == ("projection" if name != model else "rotary")
    assert set(directions.heads) <= set(fl.load_ranking(model))
    assert directions.heads == open_directions(name).heads


def test_a_file_or_directory_of_the_name_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    name = shipped_names("rankings")[0]
    Path(name).write_text("[[0, 1]]")
    assert fl.load_ranking(name) == [(0, 1)]
    assert shipped_ranking(name) is None
    Path(name).unlink()
    assert len(fl.load_ranking(name)) > 1


def test_directions_are_found_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    directions = fl.FocusDirections([(0, 1)], torch.ones(1, 4))
    directions.save(tmp_path / "assets" / "directions" / "real")
    monkeypatch.setattr(shipped, "_folder", lambda kind: tmp_path / "assets" / kind)
    assert fl.FocusDirections.load("real").digest == open_directions("real").digest == directions.digest
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tmp_path / "assets" / "directions" / "real", tmp_path / "real")
    assert shipped_directions("real") is None


def test_an_unknown_name_is_refused_with_the_names_that_there_are():
    names = ", ".join(shipped_names("rankings"))
    with pytest.raises(FileNotFoundError, match=f"no file 'gpt'; rankings that ship with FocusLens are: {names}"):
        fl.load_ranking("gpt")
    with pytest.raises(FileNotFoundError, match="no directory 'gpt'; directions are a directory, USER/NAME on the hub"):
        open_directions("gpt")
