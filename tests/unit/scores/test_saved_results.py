"""Saved scores equal the scores, and broken or other files are refused."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import focuslens as fl

IDS = ("a@0", "b@1")
SCORES = torch.tensor([[[0.4, 0.1, 0.25]], [[math.nan] * 3]])
RESULTS: dict[str, Any] = {
    "contextual": fl.ContextualScores(
        SCORES, SCORES / 2, SCORES / 4, 1 - SCORES, "long", IDS, ("x", ""), (True, False)
    ),
    "documents": fl.DocumentScores(
        (torch.rand(2, 3, 4), torch.rand(2, 3, 2)), (1, None), IDS, ("a", "b"), ("é\n", ""), (True, False)
    ),
    "questions": fl.QuestionScores(
        (torch.rand(2, 3, 4), torch.rand(2, 3, 2)),
        (),
        (),
        (torch.rand(4), torch.rand(2)),
        (torch.rand(4), torch.rand(2)),
        (fl.Head(0, 1), fl.Head(1, 2)),
        (1, None),
        IDS,
        ("a", "b"),
    ),
    "budget": fl.AttentionBudget(torch.rand(2, 2, 3, 6), IDS, ("x", "y"), (True, False), ("a", "b")),
    "retrieval": fl.RetrievalScores(torch.rand(2, 2, 3), (0.75, 0.1), 0.5, ("x", "y"), IDS),
}


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one.nan_to_num(-1), other.nan_to_num(-1))
    if isinstance(one, tuple) and one and isinstance(one[0], torch.Tensor):
        return len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and one == other


@pytest.mark.parametrize("name", RESULTS)
def test_a_saved_result_is_the_result(name: str, tmp_path: Path) -> None:
    result = RESULTS[name]
    folder = result.save(tmp_path / "new" / "folder", model={"name": "tiny"})
    loaded = type(result).load(folder)
    assert type(loaded) is type(result)
    for field in dataclasses.fields(result):
        assert same(getattr(result, field.name), getattr(loaded, field.name)), field.name
    if name == "questions":
        assert all(isinstance(head, fl.Head) for head in loaded.heads)


def test_a_folder_holds_one_result_of_each_class_in_files_that_others_can_read(tmp_path: Path) -> None:
    for result in RESULTS.values():
        result.save(tmp_path, model="tiny")
    assert len(list(tmp_path.iterdir())) == 2 * len(RESULTS)
    tensors = load_file(tmp_path / "document_scores.safetensors")
    assert torch.equal(tensors["scores"], torch.cat(RESULTS["documents"].scores, dim=-1))
    facts = json.loads((tmp_path / "document_scores.json").read_text())
    assert facts["fields"]["scores"] == {"is": "tensors", "lengths": [4, 2]}
    assert facts["origin"] == {"model": "tiny"}
    assert same(fl.DocumentScores.load(tmp_path).scores, RESULTS["documents"].scores)


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"holds no contextual_scores.json; is it a folder that ContextualScores"
    ):
        fl.ContextualScores.load(tmp_path)
    RESULTS["contextual"].save(tmp_path)
    path = tmp_path / "contextual_scores.json"
    facts = json.loads(path.read_text())

    def changed(**changes: Any) -> None:
        path.write_text(json.dumps({**facts, **changes}))

    for changes in ({"format": 2}, {"kind": "DocumentScores"}):
        changed(**changes)
        with pytest.raises(ValueError, match="does not describe ContextualScores in the format 1"):
            fl.ContextualScores.load(tmp_path)
    fields = facts["fields"]
    changed(fields={**{key: value for key, value in fields.items() if key != "sink"}, "more": {"is": "value"}})
    with pytest.raises(ValueError, match="is of another version: it lacks sink, and has more in addition"):
        fl.ContextualScores.load(tmp_path)
    changed(sha256="0")
    with pytest.raises(ValueError, match="do not belong together"):
        fl.ContextualScores.load(tmp_path)
    path.write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        fl.ContextualScores.load(tmp_path)


def test_a_field_with_a_default_may_be_missing_in_an_older_file(tmp_path: Path) -> None:
    RESULTS["budget"].save(tmp_path)
    path = tmp_path / "attention_budget.json"
    facts = json.loads(path.read_text())
    del facts["fields"]["question_ids"]
    path.write_text(json.dumps(facts))
    assert fl.AttentionBudget.load(tmp_path).question_ids == ()
