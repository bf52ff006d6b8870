"""``focuslens rerank``: what it prints and writes equals the functions of the package."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import focuslens as fl
from focuslens.cli.main import main
from focuslens.data.similarity import bm25_scores
from focuslens.prompts.encoder import PromptEncoder

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


def test_texts_without_titles_rank_as_documents_without_titles(demo_prompts: list[str]) -> None:
    texts = ["The ferry leaves at nine.", "The bakery sells bread."]
    by_text = fl.rerank(fl.FocusModel.demo(), "when does the ferry leave?", texts)
    assert demo_prompts[0].endswith(
        "Document [1] The ferry leaves at nine.\nDocument [2] The bakery sells bread.\n\n"
        "Question: when does the ferry leave?\nAnswer:"
    )
    by_document = fl.rerank(
        fl.FocusModel.demo(), "when does the ferry leave?", [fl.Document("", text) for text in texts]
    )
    assert by_text.scores == by_document.scores


def test_data_without_titles_rank(tmp_path: Path, demo_prompts: list[str]) -> None:
    records = [
        {
            "question": f"what is the colour of door {i}?",
            "answers": [colour],
            "ctxs": [
                {"text": f"Door {i} is {colour}.", "hasanswer": True, "isgold": True},
                {"title": "", "text": "The window is grey.", "hasanswer": False, "isgold": False},
            ],
        }
        for i, colour in enumerate(["red", "green", "blue", "white"])
    ]
    data = tmp_path / "doors.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    options = ["--data", str(data), "--samples", "2", "--train-samples", "2", "--documents", "2", "--out"]
    assert main(["rerank", *options, str(tmp_path), "--gold-positions", "0,1", "--quiet"]) == 0
    assert len(json.loads((tmp_path / "rerank.json").read_text())["samples"]) == 2
    assert demo_prompts
    assert all("Document [1] " in prompt and "Title" not in prompt for prompt in demo_prompts)


@pytest.fixture
def demo_prompts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Texts that are encoded during the test."""
    prompts: list[str] = []
    encode = PromptEncoder.encode

    def recorded(self: PromptEncoder, prompt: Any) -> Any:
        prompts.append(str(prompt))
        return encode(self, prompt)

    monkeypatch.setattr(PromptEncoder, "encode", recorded)
    return prompts


def test_bm25_counts_words_over_all_documents() -> None:
    documents = (fl.Document("Ferries", "the ferry of the harbour"), fl.Document("Trains", "a train"))
    samples = [
        fl.MultiDocSample("which ferry?", ("x",), documents, 0),
        fl.MultiDocSample("which train?", ("x",), documents[::-1], 0),
    ]
    first, second = bm25_scores(samples)
    assert first[0] > first[1] == 0
    assert second[0] > second[1] == 0
