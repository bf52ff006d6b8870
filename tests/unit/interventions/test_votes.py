"""Votes of heads: the likelihood that is maximised, and files."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import focuslens as fl

HEADS = [fl.Head(0, 1), fl.Head(1, 0)]


def attention(n: int = 40) -> tuple[list[torch.Tensor], list[int | None]]:
    """Attention of 2 x 2 heads to 3 or 4 documents. Head (1, 0) reads the gold document, head (0, 1) the last one."""
    generator = torch.Generator().manual_seed(0)
    values: list[torch.Tensor] = []
    gold: list[int | None] = []
    for i in range(n):
        documents = 3 + i % 2
        one = torch.rand(2, 2, documents, generator=generator) / documents
        gold.append(i % documents)
        bias = float(torch.rand(1, generator=generator))
        one[1, 0, i % documents] += 0.3
        one[1, 0, -1] += bias
        one[0, 1, -1] += bias
        values.append(one)
    return values, gold


def objective(weights: list[float], values: Any, gold: Any, penalty: float, floor: float = 1e-3) -> float:
    """The penalised negative log-likelihood of weights of features that are scaled, in plain Python."""
    features = [
        [[math.log(float(one[head.layer, head.head, d]) + floor) for d in range(one.shape[-1])] for head in HEADS]
        for one in values
    ]
    total = 0.0
    scales = list[float]()
    for head in range(len(HEADS)):
        every = [value for one in features for value in one[head]]
        mean = sum(every) / len(every)
        scales.append(math.sqrt(sum((value - mean) ** 2 for value in every) / (len(every) - 1)))
    for one, place in zip(features, gold, strict=True):
        logits = [sum(w * one[k][d] for k, w in enumerate(weights)) for d in range(len(one[0]))]
        total += math.log(sum(map(math.exp, logits))) - logits[place]
    return total / len(values) + penalty * sum((w * s) ** 2 for w, s in zip(weights, scales, strict=True))


@pytest.mark.parametrize("penalty", [0.01, 1.0])
def test_the_fit_is_the_minimum(penalty: float) -> None:
    values, gold = attention()
    votes = fl.HeadVotes.fit(values, gold, HEADS, penalty=penalty)
    weights = list(votes.weights)
    best = objective(weights, values, gold, penalty)
    for k in range(2):
        for step in (-1e-3, 1e-3):
            moved = [w + step * (i == k) for i, w in enumerate(weights)]
            assert objective(moved, values, gold, penalty) > best
    if penalty < 0.1:
        assert weights[0] < 0 < weights[1], "the head that always reads the last document votes against it"


def test_votes_find_what_a_sum_does_not() -> None:
    values, gold = attention(80)
    votes = fl.HeadVotes.fit(values[:40], gold[:40], HEADS, penalty=0.01)
    by_sum = [int((one[0, 1] + one[1, 0]).argmax()) for one in values[40:]]
    by_votes = [int(votes.shares(torch.stack([one[0, 1], one[1, 0]])).argmax()) for one in values[40:]]
    right = [sum(a == b for a, b in zip(found, gold[40:], strict=True)) for found in (by_sum, by_votes)]
    assert right[1] > right[0] + 10
    assert float(votes.shares(torch.rand(2, 5)).sum()) == pytest.approx(1)


def test_samples_without_a_label_or_an_answer_are_left_out() -> None:
    values, gold = attention()
    unknown = [*values, torch.rand(2, 2, 3), torch.full((2, 2, 3), torch.nan)]
    votes = fl.HeadVotes.fit(unknown, [*gold, None, 1], HEADS)
    assert votes == fl.HeadVotes.fit(values, gold, HEADS)
    assert len(fl.HeadVotes.fit(values, gold).heads) == 4
    with pytest.raises(ValueError, match="no sample has a gold document"):
        fl.HeadVotes.fit(values[:2], [None, None])


def test_files(tmp_path: Path) -> None:
    values, gold = attention()
    votes = fl.HeadVotes.fit(values, gold, HEADS, rows="response")
    votes.save(tmp_path / "votes.json", model="demo")
    assert fl.HeadVotes.load(tmp_path / "votes.json") == votes
    assert json.loads((tmp_path / "votes.json").read_text())["origin"] == {"model": "demo"}
    assert votes.digest in repr(votes)
    (tmp_path / "other.json").write_text("[1]")
    with pytest.raises(ValueError, match="does not contain votes of heads"):
        fl.HeadVotes.load(tmp_path / "other.json")


@pytest.mark.usefixtures("unchecked")
def test_wrong_values_are_refused() -> None:
    values, gold = attention(4)
    with pytest.raises(ValueError, match="each head needs one"):
        fl.HeadVotes(tuple(HEADS), (1.0,))
    with pytest.raises(ValueError, match="floor is 0; it must be a positive number"):
        fl.HeadVotes(tuple(HEADS), (1.0, 1.0), floor=0)
    with pytest.raises(ValueError, match="penalty is 0; it must be a positive number"):
        fl.HeadVotes.fit(values, gold, penalty=0)
    with pytest.raises(ValueError, match="there is attention for 4 samples, and gold for 3"):
        fl.HeadVotes.fit(values, gold[:3])
    with pytest.raises(ValueError, match="head"):
        fl.HeadVotes.fit(values, gold, [(5, 0)])
