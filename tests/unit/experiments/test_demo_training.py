"""Training and evaluation of the demo model.

Questions that share a context do not attend to each other, runs resume, and the card's verdicts follow from its
numbers.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import random
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.support.paths import ROOT

batches = pytest.importorskip("demo_model_batches", reason="the experiments are not here")
import demo_model_card as card  # noqa: E402
import measure_demo_model as measuring  # noqa: E402
import train_demo_model as training  # noqa: E402


def test_questions_that_share_a_context_are_as_questions_alone():
    tokenizer = training.build_tokenizer()
    torch.manual_seed(1)
    packed = training.build_model(tokenizer)
    plain = training.build_model(tokenizer)
    plain.load_state_dict(packed.state_dict())
    plain.set_attn_implementation("eager")
    row = batches.question_row(tokenizer, random.Random(4), training.LESSONS[2])
    size = row.ids.shape[1] - row.mask.shape[2]
    starts = [i for i in range(size, row.ids.shape[1]) if row.positions[0, i] == size]
    assert len(starts) == training.LESSONS[2].questions
    with torch.no_grad():
        together = packed.model(row.ids, attention_mask=row.mask, position_ids=row.positions).last_hidden_state
        for start, end in [*pairwise(starts), (starts[-1], row.ids.shape[1])]:
            ids = torch.cat((row.ids[:, :size], row.ids[:, start:end]), dim=1)
            alone = plain.model(ids).last_hidden_state
            torch.testing.assert_close(together[:, start:end], alone[:, size:], atol=1e-4, rtol=0)


def test_targets_are_the_next_tokens_and_answers_weigh_most():
    tokenizer = training.build_tokenizer()
    row = batches.question_row(tokenizer, random.Random(0), training.LESSONS[5])
    learned = row.weights[0] > 0
    following = row.ids[0].roll(-1)
    assert torch.equal(row.targets[0, learned], following[learned])
    firsts = row.kinds[0] > 0
    assert firsts.sum() == training.LESSONS[5].questions
    assert (row.weights[0, firsts] == 1.0).all()
    text = tokenizer.decode(row.ids[0])
    assert text.count("\nAnswer:") == training.LESSONS[5].questions


def test_a_document_shown_alone_keeps_its_number():
    lesson = dataclasses.replace(training.LESSONS[-1], alone=1.0, refusals=0.0)
    tokenizer, rng = training.build_tokenizer(), random.Random(3)
    numbers = set()
    for _ in range(8):
        text = str(tokenizer.decode(batches.question_row(tokenizer, rng, lesson).ids[0]))
        assert text.count("Document [") == 1
        numbers.add(text.split("Document [")[1].split("]")[0])
    assert len(numbers) > 3


def test_late_documents_are_asked_about_as_much_more_often_as_the_lesson_says():
    lesson = dataclasses.replace(training.LESSONS[-1], documents=(12, 12), questions=240, alone=0.0, recency=20.0)
    tokenizer, rng, early, late = training.build_tokenizer(), random.Random(5), 0, 0
    for _ in range(10):
        text = str(tokenizer.decode(batches.question_row(tokenizer, rng, lesson).ids[0]))
        documents, *asked = text.split("Question:")
        titles = [part.split(")")[0] for part in documents.split("(Title:")[1:]]
        subjects = [block.split(" of ")[-1].split(" was ")[0].strip() for block in asked if "not recorded" not in block]
        early += sum(any(subject in title for title in titles[:4]) for subject in subjects)
        late += sum(any(subject in title for title in titles[-4:]) for subject in subjects)
    # The lesson's weights grow geometrically from 1 to 20 over 12 documents. Documents 9 to 12 are 8 of 11 steps after
    # documents 1 to 4.
    assert 0.7 * 20 ** (8 / 11) < late / early < 1.4 * 20 ** (8 / 11)


def test_a_run_writes_a_checkpoint_and_goes_on_from_it(tmp_path, monkeypatch):
    common = ["--out", str(tmp_path / "model"), "--work", str(tmp_path / "work"), "--quiet"]
    training.main([*common, "--tokens", "2000"])
    first = json.loads((tmp_path / "model" / "making.json").read_text())
    assert {"seed", "steps", "tokens", "versions"} <= first.keys()
    training.main([*common, "--tokens", str(first["tokens"] + 2000), "--resume"])
    second = json.loads((tmp_path / "model" / "making.json").read_text())
    assert second["steps"] > first["steps"] > 0
    # A second run with the same budget takes the same number of steps.
    straight = ["--out", str(tmp_path / "straight"), "--work", str(tmp_path / "other"), "--quiet"]
    training.main([*straight, "--tokens", "2000"])
    again = json.loads((tmp_path / "straight" / "making.json").read_text())
    assert (again["steps"], again["tokens"]) == (first["steps"], first["tokens"])
    with pytest.raises(SystemExit, match="is of another run"):
        training.main([*common, "--tokens", "9e6", "--resume", "--seed", "7"])
    monkeypatch.setattr(training, "LESSONS", training.LESSONS[1:])
    with pytest.raises(SystemExit, match="is of another run"):
        training.main([*common, "--tokens", "9e6", "--resume"])
    assert (tmp_path / "model" / "training_log.png").stat().st_size > 1000
    card.write_card(tmp_path / "model", second, figures())
    text = " ".join((tmp_path / "model" / "README.md").read_text().split())
    assert f"{second['steps']:,} steps" in text
    assert "questions are about the last document 40 times as often as about the first" in text
    assert "Of 40 wrong answers with 20 documents, 25 are" in text
    assert "gave 0.550, 0.570 in 2 draws" in text
    assert "Looked at once." in text
    assert "| 1 | 0.500 (0.500 to 0.500) | 0.930 (0.930 to 0.930) | 0.580 (0.580 to 0.580) |" in text
    assert "100 test questions" in text
    assert "of 20 other questions that no document answers" in text
    assert "single heads 0.60 to 0.90" in text
    assert ": 200 samples" in text
    assert "{" not in text
    weights = (tmp_path / "model" / "model.safetensors").stat().st_size
    assert weights < 10 * 2**20


def test_a_lesson_that_has_its_hour_begins_then_whatever_was_learned():
    limit, last = 100, len(training.LESSONS) - 1
    assert training.LESSONS[last].after == 0.85
    assert training.due_lesson(training.Progress(lesson=2, tokens=84), limit) == 2
    assert training.due_lesson(training.Progress(lesson=2, tokens=86), limit) == last
    assert training.due_lesson(training.Progress(lesson=last, tokens=99), limit) == last


def test_wrong_answers_are_told_apart_by_where_their_value_stands():
    def sample(gold):
        texts = (
            "Ada Abbot was born in Ashby.",
            "Ada Barlow was born in Old Kelso. He won.",
            "Ivy Penn came from Tenby.",
        )
        documents = tuple(measuring.fl.Document(f"D{i}", text) for i, text in enumerate(texts))
        return measuring.MultiDocSample("Where was Ada Barlow born?", ("Old Kelso",), documents, gold)

    told = ["Old Kelso.", "not recorded.", "Ashby.", "Tenby.", "Kelso.", "New Kelso.", "Old", ""]
    responses = [f"The birthplace of Ada Barlow was {one}" for one in told]
    result: Any = SimpleNamespace(responses=responses, correct=[True] + [False] * 7)
    assert measuring.errors([sample(1)] * 8, result) == {
        "wrong": 7, "refused": 1, "earlier document": 1, "later document": 1, "something else": 4,
    }  # fmt: skip


DEMO = ROOT / "focuslens" / "assets" / "demo"


def figures(**changes):
    def row(name, em, p=0.001, **more):
        return {"name": name, "em": em, "em_low": em - 0.02, "em_high": em + 0.02, "mcnemar_p": p, **more}

    def mean(value):
        return {"mean": value, "low": value, "high": value}

    def outcome(ratio):
        several = [ratio - 0.1, ratio + 0.2]
        return {"ratio": ratio, "relevant": mean(0.2 * ratio), "irrelevant_max": mean(0.2), "ratio_by_head": several}

    made = {
        "baselines": [row("baseline", 0.6), row("gold", 0.96), row("negative", 0.02)],
        "scores": {
            "above": ["L2H1"], "above_layers": [2], "heads": 32,
            "outcomes": {"correct": outcome(1.5), "wrong": outcome(0.7)},
        },
        "split_softmax": row("split", 0.97),
        "off": row("off", 0.05),
        "random": [row("random", 0.61, 0.5)],
        "random_as_chosen": [row("random as chosen", 0.55), row("random as chosen", 0.57)],
        "ranking": ["L2H1", "L2H3"],
        "contextual": 1,
        "errors": {"wrong": 40, "refused": 25, "earlier document": 3, "later document": 10, "something else": 2},
        "sizes": {"questions": 100, "unanswerable": 20, "validation": 50, "train": 25},
        "note": "Looked at once.",
        "positions": {
            name: {"1": mean(first), "20": mean(0.9)}
            for name, first in (("baseline", 0.5), ("split", 0.93), ("alpha=0.5", 0.58))
        },
        "unanswerable": mean(0.8),
        "steering_chosen": "alpha=0.5",
        "everywhere": [
            row("baseline", 0.61), row("split", 0.97, tau=0.1), row("alpha=0.5", 0.65, alpha=0.5),
            row("alpha=-1", 0.5, alpha=-1), row("alpha=4", 0.4, alpha=4),
        ],
    }  # fmt: skip
    return {**made, **changes}


def test_a_model_with_every_property_is_said_to_have_them():
    assert [one.name for one in card.findings(figures()) if not one.holds] == []
    assert len(card.findings(figures())) == 10


def test_the_embedded_model_has_every_property_and_its_card_says_so():
    measured = json.loads((DEMO / "measured.json").read_text())
    found = card.findings(measured)
    assert [one.name for one in found if not one.holds] == []
    text = (DEMO / "README.md").read_text()
    assert text.count(" | yes |\n") == len(found) == 10
    assert " | no |" not in text
    assert measured["sizes"]["test_seed"] == measuring.TEST_SEED


@pytest.mark.parametrize(
    ("place", "spoil"),
    [
        (0, lambda made: made["baselines"][1].update(em=0.94)),
        (1, lambda made: made["everywhere"][0].update(em=0.86)),
        (2, lambda made: made["baselines"][2].update(em=0.15)),
        (3, lambda made: made["scores"].update(above_layers=[0])),
        (3, lambda made: made["scores"].update(above=["L1H1"] * 8)),
        (4, lambda made: made["scores"]["outcomes"]["correct"].update(ratio=0.99)),
        (5, lambda made: made["scores"]["outcomes"]["wrong"].update(ratio=1.01)),
        (6, lambda made: made["split_softmax"].update(em=0.93)),
        (7, lambda made: made["off"].update(em=0.13)),
        (8, lambda made: made["random"][0].update(em=0.54)),
        (9, lambda made: made["everywhere"][2].update(mcnemar_p=0.02)),
        (9, lambda made: made["everywhere"][3].update(em=0.61)),
        (9, lambda made: made["everywhere"][4].update(em=0.61)),
    ],
)
def test_each_property_can_fail(place, spoil):
    made = copy.deepcopy(figures())
    spoil(made)
    failing = [i for i, one in enumerate(card.findings(made)) if not one.holds]
    assert place in failing
    assert len(failing) <= 3
