"""Samples with several gold documents: each of them counts as right, in ranks, choices, criteria and tables."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

import focuslens as fl
from focuslens.data.own_samples import load_samples
from focuslens.scores.document_scores import rank_documents
from focuslens.scores.document_sums import criterion
from tests.support.own_files import RGB

HEAD = [fl.Head(0, 0)]
VALUES = torch.tensor([0.1, 0.4, 0.3, 0.2])
"""Attention of one head to four documents, whose ranks are 4, 1, 2 and 3."""

FIRST, SECOND, THIRD = 1 / math.log2(2), 1 / math.log2(3), 1 / math.log2(4)


def scores(*gold: Any) -> fl.DocumentScores:
    n = len(gold)
    ids = tuple(f"q{i}" for i in range(n))
    return fl.DocumentScores((VALUES.view(1, 1, 4),) * n, gold, ids, ids, ("x",) * n, (True,) * n)


@pytest.mark.parametrize(
    ("gold", "rank", "ndcg"),
    [
        (1, 1, 1.0),
        ((1, 2), 1, 1.0),
        ((0, 1), 1, (FIRST + 1 / math.log2(5)) / (FIRST + SECOND)),
        ((2, 3), 2, (SECOND + THIRD) / (FIRST + SECOND)),
    ],
)
def test_ranks_by_hand(gold: Any, rank: int, ndcg: float) -> None:
    found = scores(gold).attribution(HEAD)
    assert found.rank == (rank,)
    assert (found.accuracy.mean, found.mrr.mean) == (float(rank == 1), 1 / rank)
    assert math.isclose(found.ndcg.mean, ndcg, rel_tol=1e-12)
    assert math.isclose(found.to_frame()["ndcg"][0], ndcg, rel_tol=1e-12)


def test_other_documents_with_the_same_score_come_first() -> None:
    tied = torch.tensor([0.3, 0.3, 0.3, 0.1])
    assert rank_documents([tied], [(0, 1)], ["q"]).ranks == ((2, 3),)
    assert rank_documents([tied], [(0, 1, 2)], ["q"]).ranks == ((1, 2, 3),)
    assert rank_documents([tied], [0], ["q"]).rank == (3,)


def test_criteria_of_heads_by_hand() -> None:
    values = VALUES.view(1, 1, 4)
    share = (VALUES.double() / 0.1).softmax(dim=0)
    expected = {"attention": 0.5, "contrast": float(share[2] + share[3]), "ndcg": (SECOND + THIRD) / (FIRST + SECOND)}
    for by, value in expected.items():
        assert math.isclose(float(criterion(values, (2, 3), by, 0.1)), value, rel_tol=1e-6)
    many = torch.arange(12.0).view(1, 1, 12)  # ranks above ten do not count
    assert float(criterion(many, (0, 1), "ndcg", 0.1)) == 0


def test_choices_and_tables() -> None:
    choice = fl.Choice(((2, 5), (5, 9), (9, 12)), (0.2, 0.5, 0.3), (1,), 0.5)
    found = fl.Choices((choice, choice, choice), ((1, 2), (0, 2), None), ("a", "b", "c"), ("a", "b", "c"))
    assert found.right() == [True, False]
    assert found.accuracy().mean == 0.5
    frame = found.to_frame()
    assert frame[frame["sample_id"] == "b"]["is_gold"].tolist() == [True, False, True]
    own = scores((2, 3), 1).to_frame()
    assert own.groupby("sample_id")["is_gold"].sum().to_dict() == {"q0": 2, "q1": 1}
    effects = fl.DocumentEffects((VALUES,), (-1.0,), (2,), "knockout", ((2, 3),), ("a",), ("a",), ("x",), (True,))
    assert effects.to_frame()["is_gold"].tolist() == [False, False, True, True]
    assert effects.attribution().rank == (2,)


def test_votes_are_those_of_one_sample_per_gold_document() -> None:
    """The mean log-likelihood of two gold documents is that of two samples with one each."""
    generator = torch.Generator().manual_seed(2)
    values = [torch.rand(1, 2, 3 + i % 2, generator=generator) for i in range(12)]
    gold = [(i % 3, (i + 1) % 3) for i in range(12)]
    together = fl.HeadVotes.fit(values, gold)
    apart = fl.HeadVotes.fit([one for one in values for _ in range(2)], [place for two in gold for place in two])
    # Each sample occurs twice there, so that the unbiased deviations differ by a factor, and so do the penalties.
    for mine, theirs in zip(together.weights, apart.weights, strict=True):
        assert math.isclose(mine, theirs, rel_tol=0.01)


def test_samples_keep_all_gold_documents_until_the_result_is_loaded(tiny_model: fl.FocusModel, tmp_path: Path) -> None:
    samples = list(load_samples(RGB[:2]))
    expected = tuple(tuple(sample.gold_indices) for sample in samples)
    assert all(len(gold) == 2 for gold in expected)
    assert samples[0].gold == expected[0]
    found = fl.document_scores(tiny_model, samples, max_new_tokens=2)
    questions = fl.question_scores(tiny_model, samples, null=None)
    effects = fl.document_effects(tiny_model, samples, max_new_tokens=2)
    assert found.gold == questions.gold == effects.gold == expected
    assert fl.DocumentScores.load(found.save(tmp_path)).gold == expected


def test_given_attentions_know_all_gold_documents() -> None:
    """Prompt of nine tokens with three documents, and one response token."""
    spans = {"document": ((2, 4), (4, 6), (6, 8)), "relevant": ((2, 4), (6, 8))}
    prompt = fl.EncodedPrompt(torch.arange(9), spans)
    pattern = torch.eye(10)[None, None]
    found = fl.document_scores_from_attentions((pattern,), prompt)
    assert found.gold == ((0, 2),)
    one = fl.EncodedPrompt(torch.arange(9), {**spans, "relevant": ((4, 6),)})
    assert fl.document_scores_from_attentions((pattern,), one).gold == (1,)
    none = fl.EncodedPrompt(torch.arange(9), {"document": spans["document"]})
    assert fl.document_scores_from_attentions((pattern,), none).gold == (None,)
