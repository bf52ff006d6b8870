"""Attention per document and per part against sums over Hugging Face's full patterns, and hand-computed ranks."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import focuslens as fl
from focuslens.scores.document_scores import BUDGET_PARTS, AttentionBudget, DocumentScores
from tests.support.reference import document_ranges, gap, prompt_text, tokens_of_ranges

TOLERANCE = 1e-4
QUICK: dict[str, Any] = {"max_new_tokens": 4}


def looked_at(hf: Any, sample: fl.MultiDocSample, model: fl.FocusModel, case: Any, edits: list[fl.Intervention]):
    """Response rows ``[layer head row key]`` from Hugging Face, and the prompt's text, token ids and offsets."""
    response = model.generate(sample.prompt(case), edits, **QUICK).tokens
    prompt = prompt_text(sample, case)
    ids = hf.ids(prompt)
    rows = hf.patterns(torch.cat((ids, response))).double()[:, :, len(ids) :]
    return rows, hf.text(prompt), ids, hf.offsets(prompt)


@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral_window", "llama_chat"])
def test_scores_of_documents_are_sums_over_their_tokens(name, backend, load_model, reference, samples):
    model, hf = load_model(name, backend), reference(name)
    scores = fl.document_scores(model, samples, **QUICK)
    assert scores.sample_ids == tuple(sample.id for sample in samples)
    for i, sample in enumerate(samples):
        rows, text, _, offsets = looked_at(hf, sample, model, "long", [])
        ranges = document_ranges(sample, text)
        expected = [rows[..., tokens_of_ranges(offsets, ranges[j])].sum(-1).mean(-1) for j in range(len(ranges))]
        assert gap(scores.scores[i], torch.stack(expected, dim=-1)) < TOLERANCE
        relevant = fl.contextual_scores(model, [sample], **QUICK).relevant[0]
        torch.testing.assert_close(scores.scores[i][..., sample.gold_index], relevant, atol=1e-6, rtol=0)


@pytest.mark.parametrize("case", ["long", "gold", "negative"])
@pytest.mark.parametrize("name", ["llama", "llama_chat"])
def test_shares_are_sums_over_parts_and_sum_to_one(name, case, backend, load_model, reference, samples):
    model, hf = load_model(name, backend), reference(name)
    budget = fl.attention_budget(model, samples, case, **QUICK)
    torch.testing.assert_close(budget.shares.sum(dim=-1), torch.ones(budget.shares.shape[:3]), atol=1e-5, rtol=0)
    for i, sample in enumerate(samples):
        rows, text, ids, offsets = looked_at(hf, sample, model, case, [])
        ranges = document_ranges(sample, text)
        start = text.rindex(sample.question)
        of_token = dict.fromkeys(range(rows.shape[-1]), "response") | dict.fromkeys(range(len(ids)), "template")
        of_token |= dict.fromkeys(tokens_of_ranges(offsets, (start, start + len(sample.question))), "question")
        for kind in (False, True):
            for j, characters in ranges.items():
                if (j == sample.gold_index) == kind:
                    name = "relevant" if kind else "irrelevant"
                    of_token |= dict.fromkeys(tokens_of_ranges(offsets, characters), name)
        of_token |= dict.fromkeys((0, 1), "sink")
        for part, name in enumerate(BUDGET_PARTS):
            columns = [token for token, where in of_token.items() if where == name]
            assert gap(budget.shares[i, ..., part], rows[..., columns].sum(-1).mean(-1)) < TOLERANCE, name


def test_shares_follow_interventions(load_model, samples):
    model = load_model("llama")
    head = fl.Head(1, 2)
    before, after = (
        fl.attention_budget(model, samples[:1], interventions=edits, **QUICK).mean([head])
        for edits in ([], [fl.SplitSoftmax([head], 0.0)])
    )
    assert after["relevant"] > before["relevant"]
    # Every response row is edited, so all attention is on the relevant document.
    assert after["relevant"] == pytest.approx(1.0, abs=1e-5)


def made(scores: list[list[float]], gold: list[int | None], correct: list[bool]) -> DocumentScores:
    """Scores of one layer with two heads. All scores of the second head are zero."""
    tensors = tuple(torch.tensor([[row, [0.0] * len(row)]]) for row in scores)
    names = tuple(f"q{i}@0" for i in range(len(scores)))
    return DocumentScores(tensors, tuple(gold), names, names, names, tuple(correct))


def test_ranks_and_their_means_by_hand():
    scores = made(
        [[0.1, 0.5, 0.2], [0.6, 0.1, 0.3], [0.2, 0.2, 0.1], [0.3, 0.2, 0.1], [math.nan] * 3],
        [1, 1, 0, None, 0],
        [True, False, False, True, True],
    )
    found = scores.attribution([(0, 0)])
    assert found.top == (1, 0, 0)
    assert found.rank == (1, 3, 2)  # a tie does not count as first
    assert found.accuracy.mean == pytest.approx(1 / 3)
    assert found.mrr.mean == pytest.approx((1 + 1 / 3 + 1 / 2) / 3)
    assert found.ndcg.mean == pytest.approx((1 + 1 / math.log2(4) + 1 / math.log2(3)) / 3)
    assert scores.attribution([(0, 0)], correct=True).rank == (1,)
    assert scores.attribution([(0, 0)], correct=False).rank == (3, 2)
    torch.testing.assert_close(scores.of([(0, 0), (0, 1)])[0], torch.tensor([0.05, 0.25, 0.1]))


def test_what_cannot_be_attributed_is_refused(load_model, samples):
    scores = made([[0.1, 0.2]], [None], [True])
    with pytest.raises(ValueError, match="no sample has a gold document and a response"):
        scores.attribution([(0, 0)])
    with pytest.raises(ValueError, match="there are no heads to attribute by"):
        scores.of([])
    with pytest.raises(ValueError, match=r"head \(1, 0\) does not exist"):
        scores.of([(1, 0)])
    for call in (fl.document_scores, fl.attention_budget):
        with pytest.raises(ValueError, match="there are no samples to score"):
            call(load_model("llama"), [])
    with pytest.raises(ValueError, match="there are no heads to average over"):
        AttentionBudget(torch.zeros(1, 1, 1, 6), ("a",), ("b",), (True,)).mean([])
