"""``focuslens rerank``: what it prints and writes equals the functions of the package."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import focuslens as fl
from focuslens.cli.main import main
from focuslens.data.similarity import bm25_scores

OPTIONS = ["rerank", "--samples", "5", "--documents", "4", "--top-k", "3", "--quiet"]


def test_training_samples_choose_heads_that_rank_test_samples(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*OPTIONS, "--train-samples", "4", "--select", "ndcg", "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "rerank.json").read_text())
    assert len(result["heads"]) == 3
    assert result["heads_from"]["criterion"] == "ndcg"
    assert len(result["heads_from"]["samples"]) == 4
    assert not set(result["heads_from"]["samples"]) & {one["id"] for one in result["samples"]}
    assert len(result["samples"]) == 5
    for sample in result["samples"]:
        assert sample["order"] == sorted(range(4), key=lambda i: -sample["scores"][i])
    shown = capsys.readouterr().out
    for name, rank in result["ranks"].items():
        assert name in shown
        assert f"{rank['mrr']['mean']:.3f} [{rank['mrr']['low']:.3f}, {rank['mrr']['high']:.3f}]" in shown
        assert rank["mrr"]["mean"] == pytest.approx(sum(1 / one for one in rank["rank"]) / 5)


def test_heads_of_a_file_rank(tmp_path: Path) -> None:
    (tmp_path / "qrhead.yaml").write_text('attn_head_set: "1-2,2-0,3-1,0-0"')
    assert main([*OPTIONS, "--heads", str(tmp_path / "qrhead.yaml"), "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "rerank.json").read_text())
    assert result["heads"] == [[1, 2], [2, 0], [3, 1]]


def test_bm25_counts_words_over_all_documents() -> None:
    documents = (fl.Document("Ferries", "the ferry of the harbour"), fl.Document("Trains", "a train"))
    samples = [
        fl.MultiDocSample("which ferry?", ("x",), documents, 0),
        fl.MultiDocSample("which train?", ("x",), documents[::-1], 0),
    ]
    first, second = bm25_scores(samples)
    assert first[0] > first[1] == 0
    assert second[0] > second[1] == 0
