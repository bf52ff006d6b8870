"""Attention from questions to documents, against loops in float64 over full patterns of eager attention."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

import focuslens as fl
from focuslens.scores.question_scores import filtered_sums
from tests.support.reference import ReferenceModel, document_ranges, prompt_text, tokens_of_ranges

if TYPE_CHECKING:
    from focuslens import MultiDocSample

FAMILIES = ("llama", "qwen2", "qwen3", "mistral")
TOLERANCE = 1e-4
CHOSEN = [fl.Head(1, 2), fl.Head(0, 0), fl.Head(2, 3)]


def question_rows(hf: ReferenceModel, sample: MultiDocSample, rows: str) -> tuple[Tensor, Tensor, list[list[int]]]:
    """Attention ``[layer head key]`` of the question's rows, the prompt's tokens, and the tokens of each document."""
    prompt = prompt_text(sample, "long")
    ids, offsets, text = hf.ids(prompt), hf.offsets(prompt), hf.text(prompt)
    start = text.rindex(sample.question)
    tokens = tokens_of_ranges(offsets, (start, start + len(sample.question)))
    chosen = {"question": tokens, "tail": list(range(tokens[0], len(ids))), "last": [len(ids) - 1]}[rows]
    attention = hf.patterns(ids).double()[:, :, chosen].mean(dim=2)
    ranges = document_ranges(sample, text)
    return attention, ids, [tokens_of_ranges(offsets, ranges[i]) for i in range(len(sample.documents))]


def kept_sum(values: list[float]) -> float:
    """Sum without values that are not above the mean minus two standard deviations."""
    mean = math.fsum(values) / len(values)
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))
    return math.fsum(value for value in values if value > mean - 2 * deviation)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rows", ["question", "tail", "last"])
def test_scores_are_those_of_full_patterns(
    family: str, rows: Any, backend: Any, load_model: Any, reference: Any, samples: Any
) -> None:
    model, hf = load_model(family, backend), reference(family)
    scores = fl.question_scores(model, samples, CHOSEN, rows=rows)
    for i, sample in enumerate(samples):
        own, ids, documents = question_rows(hf, sample, rows)
        null, null_ids, _ = question_rows(hf, replace(sample, question="N/A"), rows)
        assert ids[: documents[-1][-1] + 1].tolist() == null_ids[: documents[-1][-1] + 1].tolist()
        for number, tokens in enumerate(documents):
            change = own[..., tokens] - null[..., tokens]
            expected = own[..., tokens].sum(dim=-1), change.sum(dim=-1)
            for found, values in zip((scores.attention, scores.calibrated), expected, strict=True):
                torch.testing.assert_close(found[i][..., number].double(), values, atol=TOLERANCE, rtol=0)
            together = torch.stack([change[head] for head in CHOSEN]).sum(dim=0)
            assert float(scores.ranked[i][number]) == pytest.approx(kept_sum(together.tolist()), abs=3 * TOLERANCE)
            assert float(scores.filtered[i][1, 2, number]) == pytest.approx(
                kept_sum(change[1, 2].tolist()), abs=TOLERANCE
            )


def test_tokens_far_below_the_others_of_their_document_are_left_out() -> None:
    attention = torch.tensor([0.1, 0.2] * 6).repeat(2, 1)
    attention[0, 3], attention[1, 11] = -5, 0.3
    # -5 is 2.8 standard deviations below the mean of ten values. No other value is below its document's limit.
    sums = filtered_sums(attention, [(0, 10), (10, 12), (11, 12)])
    torch.testing.assert_close(sums, torch.tensor([[1.3, 0.3, 0.2], [1.5, 0.4, 0.3]]))


def test_a_reranking_orders_documents_by_the_scores(load_model: Any, backend: Any, samples: Any) -> None:
    model, sample = load_model("llama", backend), samples[0]
    found = fl.rerank(model, sample.question, sample.documents, CHOSEN)
    (expected,) = fl.question_scores(model, [sample], CHOSEN).of(scoring="filtered")
    assert found.scores == pytest.approx(expected.tolist(), abs=1e-6)
    assert list(found.order) == sorted(range(len(found.scores)), key=lambda i: -found.scores[i])
    texts = fl.rerank(model, sample.question, [str(one) for one in sample.documents], scoring="attention")
    assert sorted(texts.order) == list(range(len(sample.documents)))
