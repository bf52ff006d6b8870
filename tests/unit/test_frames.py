"""Every public result has ``to_frame``: a long table with named columns, their units, and the result's numbers."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import pandas as pd
import pytest
import torch

import focuslens as fl

NO_RESULTS = {
    "a pair of counts with a p-value; see to_dict": ("McNemar",),
    "four numbers; fl.decompose_heads returns them as a table": ("Decomposition",),
    "one count; ContextualScores.sparsity returns a few of them": ("Sparsity",),
    "a text": ("Generation",),
    "prompts, samples and data": (
        "Document", "EncodedPrompt", "MultiDocSample", "Needle", "NeedleSample", "Prefix", "PromptBatch",
        "PromptTemplate",
    ),
    "settings": ("Setting", "TrainingConfig"),
    "interventions and methods": (
        "ContextAwareDecoding", "DocumentFilter", "DySCO", "FocusSteering", "HeadAblation", "LogitBias", "Pasta",
        "PositionCalibration", "RandomFocus", "SelfElicit", "SelfFocus", "SplitSoftmax", "SpotLight",
        "TargetedSplitSoftmax", "TargetedSteering",
    ),
    "files of a checkpoint": ("ExportedCheckpoint", "FoldedCheckpoint"),
    "directions with a ranking, which have tables of their own": ("PublishedModel",),
    "a position in a pass": ("Cursor",),
    "a description of one layer's heads": ("HeadKind",),
}  # fmt: skip
"""Public dataclasses that hold no table of numbers, by reason. A new dataclass has ``to_frame``, or is added here."""

G = torch.Generator().manual_seed(0)
IDS, QUESTIONS, GOLD = ("a@0", "b@1"), ("a", "b"), (1, None)
INTERVAL = fl.Interval(0.5, 0.25, 0.75, 0.95)


def rand(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=G)


def _documents() -> tuple[torch.Tensor, torch.Tensor]:
    return rand(2, 3, 4), rand(2, 3, 2)


CHOICE = fl.Choice(((2, 5), (5, 9)), (0.25, 0.75), (1,), 0.5)

RESULTS: dict[str, Callable[[], Any]] = {
    "AnswerSources": lambda: fl.AnswerSources((rand(3), rand(2)), (fl.Head(0, 1),), IDS, ("x", "y")),
    "AttentionBudget": lambda: fl.AttentionBudget(rand(2, 2, 3, 6), IDS, ("x", "y"), (True, False)),
    "Attribution": lambda: fl.Attribution((0, 2), (1, 3), INTERVAL, INTERVAL, INTERVAL, ((1,), (3, 4))),
    "CalibratedAttention": lambda: fl.CalibratedAttention(((2, 5), (5, 9)), (0.5, 0.25), (0.1, 0.2), (0.75, 0.25)),
    "Choice": lambda: CHOICE,
    "Choices": lambda: fl.Choices((CHOICE, CHOICE), GOLD, IDS, QUESTIONS),
    "ContextualScores": lambda: fl.ContextualScores(
        rand(2, 2, 3), rand(2, 2, 3), rand(2, 2, 3), rand(2, 2, 3), "long", IDS, ("x", "y"), (True, False),
        rand(2, 2, 4),
    ),
    "DocumentEffects": lambda: fl.DocumentEffects(
        (rand(3), rand(2)), (-1.5, -2.5), (3, 4), "knockout", GOLD, IDS, QUESTIONS, ("x", "y"), (True, False)
    ),
    "DocumentScores": lambda: fl.DocumentScores(
        _documents(), GOLD, IDS, QUESTIONS, ("x", "y"), (True, False), (rand(2, 4), rand(2, 2))
    ),
    "Evaluation": lambda: fl.Evaluation(IDS, QUESTIONS, ("x", "y"), (True, False), INTERVAL),
    "Faithfulness": lambda: fl.Faithfulness(IDS, (0, 1), INTERVAL, INTERVAL, INTERVAL, INTERVAL, INTERVAL, 0.5, None),
    "FocusDirections": lambda: fl.FocusDirections([(1, 0), (0, 2)], rand(2, 4), rand(2, 4)),
    "HeadKeys": lambda: fl.HeadKeys(rand(3, 4), torch.tensor([7, 8, 7]), torch.tensor([0, 5, 6])),
    "HeadVotes": lambda: fl.HeadVotes((fl.Head(0, 1), fl.Head(1, 0)), (0.5, -0.25)),
    "QuestionScores": lambda: fl.QuestionScores(
        _documents(), _documents(), _documents(), (rand(4), rand(2)), (rand(4), rand(2)), (fl.Head(0, 1),), GOLD, IDS,
        QUESTIONS,
    ),
    "Reranking": lambda: fl.Reranking((1, 0, 2), (0.25, 0.5, 0.125)),
    "ResponseAttention": lambda: fl.ResponseAttention(rand(2, 2, 5), ("L0H0", "L1H2"), ("a", "b", "c", "d", "e")),
    "RetrievalScores": lambda: fl.RetrievalScores(rand(2, 2, 3), (0.75, 0.1), 0.5, ("x", "y"), IDS),
    "Sweep": lambda: fl.Sweep(
        (fl.Setting("baseline"), fl.Setting("s", parameters={"tau": 0.5})),
        {name: fl.Evaluation(IDS, QUESTIONS, ("x", "y"), (True, False), INTERVAL) for name in ("baseline", "s")},
        {},
    ),
    "UnitAttention": lambda: fl.UnitAttention(("sink", "d1", "d1"), rand(2, 2, 3), ("L0H0", "L1H2"), ("x", "y"), (1,)),
    "WindowAttention": lambda: fl.WindowAttention(rand(2, 3, 3), ("L0H0", "L1H2"), ("a", "b", "c"), (0, 1, 9), 12),
}  # fmt: skip
"""One result of each class."""


def test_every_public_result_has_a_table() -> None:
    classes = {
        name: getattr(fl, name)
        for name in fl.__all__
        if inspect.isclass(getattr(fl, name)) and dataclasses.is_dataclass(getattr(fl, name))
    }
    excused = [name for names in NO_RESULTS.values() for name in names]
    assert set(excused) <= set(classes)
    assert not [name for name in excused if hasattr(classes[name], "to_frame")]
    results = set(classes) - set(excused)
    assert not [name for name in results if not hasattr(classes[name], "to_frame")], "add to_frame, or a reason here"
    assert results == set(RESULTS), "add a result to RESULTS, so that its table is tested"


@pytest.mark.parametrize("name", RESULTS)
def test_a_table_has_named_columns_units_and_one_row_per_observation(name: str) -> None:
    result = RESULTS[name]()
    assert type(result).__name__ == name
    frame = result.to_frame()
    assert len(frame)
    assert list(frame.index) == list(range(len(frame)))
    assert all(isinstance(column, str) and column.isidentifier() for column in frame.columns)
    assert not frame.duplicated().any()
    units = frame.attrs["units"]
    assert set(units) <= set(frame.columns)
    numbers = {column for column in frame.columns if frame[column].dtype.kind == "f"}
    parameters = {"tau"}  # of a setting
    assert numbers - parameters <= set(units), "a measured number has no unit"
    assert all(units.values())


def lookup(frame: pd.DataFrame, **wanted: Any) -> pd.Series:
    for column, value in wanted.items():
        frame = frame[frame[column] == value]
    assert len(frame) == 1
    return frame.iloc[0]


def test_tables_of_tensors_hold_their_numbers() -> None:
    documents, questions = RESULTS["DocumentScores"](), RESULTS["QuestionScores"]()
    of_documents, of_questions = documents.to_frame(), questions.to_frame()
    for i, sample in enumerate(IDS):
        n_layers, n_heads, n_documents = documents.scores[i].shape
        for layer in range(n_layers):
            for head in range(n_heads):
                for document in range(n_documents):
                    wanted = {"sample_id": sample, "layer": layer, "head": head, "document": document}
                    row = lookup(of_documents, **wanted)
                    assert row["score"] == float(documents.scores[i][layer, head, document])
                    assert row["chance"] == float(documents.chance[i][layer, document])
                    assert row["excess"] == float(documents.excess()[i][layer, head, document])
                    assert row["is_gold"] == (GOLD[i] == document)
                    assert row["question_id"] == QUESTIONS[i]
                    other = lookup(of_questions, **wanted)
                    for kind in ("attention", "calibrated", "filtered"):
                        assert other[kind] == float(getattr(questions, kind)[i][layer, head, document])
    assert len(of_documents) == 2 * 3 * (4 + 2)
    few = documents.to_frame([(1, 2), (0, 0)])
    assert len(few) == 2 * (4 + 2)
    assert lookup(few, sample_id="a@0", layer=1, document=3)["score"] == float(documents.scores[0][1, 2, 3])
    assert list(documents.to_frame([]).columns) == list(of_documents.columns)
    with pytest.raises(ValueError, match=r"head \(7, 0\) does not exist"):
        documents.to_frame([(7, 0)])


def test_tables_of_attention_hold_their_numbers() -> None:
    rows, units, window = (RESULTS[name]() for name in ("ResponseAttention", "UnitAttention", "WindowAttention"))
    frame = rows.to_frame()
    row = lookup(frame, head="L1H2", position=4, key_position=2)
    assert (row["token"], row["key_token"]) == ("e", "c")
    assert row["attention"] == float(rows.rows[1, 1, 2])
    table = units.to_frame()
    assert len(table) == 12
    assert table["share"].tolist() == units.shares.flatten().tolist()
    assert table["is_relevant"].tolist() == [False, True, False] * 4
    row = lookup(window.to_frame(), head="L0H0", position=9, key_position=1)
    assert (row["token"], row["key_token"]) == ("c", "b")
    assert row["attention"] == float(window.pattern[0, 2, 1])


def test_other_tables_hold_their_numbers() -> None:
    scores, budget = RESULTS["ContextualScores"](), RESULTS["AttentionBudget"]()
    row = lookup(scores.to_frame(by_sample=True), sample_id="b@1", layer=1, head=2)
    assert [row[kind] for kind in ("relevant", "sink")] == [
        float(scores.relevant[1, 1, 2]),
        float(scores.sink[1, 1, 2]),
    ]
    row = lookup(budget.to_frame(), sample_id="b@1", layer=0, head=2, part="question")
    assert row["share"] == float(budget.shares[1, 0, 2, 3])
    effects = RESULTS["DocumentEffects"]()
    row = lookup(effects.to_frame(), sample_id="b@1", document=1)
    assert (row["effect"], row["log_probability"], row["n_tokens"]) == (float(effects.effects[1][1]), -2.5, 4)
    keys = RESULTS["HeadKeys"]()
    row = lookup(keys.to_frame(), key=1, dimension=3)
    assert (row["value"], row["token_id"], row["position"]) == (float(keys.contents[1, 3]), 8, 5)
    directions = RESULTS["FocusDirections"]()
    row = lookup(directions.to_frame(), layer=0, head=2)
    assert row["query_norm"] == pytest.approx(float(directions.query[1].norm()))
    assert lookup(RESULTS["Reranking"]().to_frame(), rank=1)[["document", "score"]].tolist() == [1, 0.5]
    assert lookup(RESULTS["Choices"]().to_frame(), sample_id="a@0", part=1)[["is_gold", "is_chosen"]].all()
    assert lookup(RESULTS["Faithfulness"]().to_frame(), measure="difference")["low"] == 0.25
