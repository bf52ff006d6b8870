"""Sources of answers, against loops over the scores."""

from __future__ import annotations

import math

import pytest
import torch

import focuslens as fl

HEADS = [(1, 2), (0, 1)]


@pytest.fixture
def scores() -> fl.DocumentScores:
    generator = torch.Generator().manual_seed(3)
    values = [torch.rand(2, 3, n, generator=generator) / n for n in (4, 1, 2)]
    values[2] = torch.full((2, 3, 2), math.nan)
    return fl.DocumentScores(
        tuple(values), (None, None, 0), ("a", "b", "c"), ("a", "b", "c"), ("x", "y", ""), (False,) * 3
    )


def test_shares_and_margins_are_those_of_a_loop(scores: fl.DocumentScores) -> None:
    sources = scores.sources(HEADS)
    for i in (0, 1):
        means = [sum(float(scores.scores[i][head][d]) for head in HEADS) / 2 for d in range(scores.scores[i].shape[2])]
        shares = [mean / sum(means) for mean in means]
        ordered = sorted(shares, reverse=True)
        assert sources.shares[i].tolist() == pytest.approx(shares)
        assert sources.top[i] == shares.index(ordered[0])
        assert sources.top_shares[i] == pytest.approx(ordered[0])
        assert sources.margins[i] == pytest.approx(ordered[0] - (ordered[1] if len(ordered) > 1 else 0))
    assert sources.top[2] is None
    assert math.isnan(sources.margins[2])
    assert math.isnan(sources.top_shares[2])
    assert len({round(float(share), 3) for share in sources.shares[0]}) == 4


def test_no_gold_document_is_needed_but_heads_are(scores: fl.DocumentScores) -> None:
    assert sum(top is not None for top in scores.sources(HEADS).top) == 2
    with pytest.raises(ValueError, match="there are no heads to attribute by"):
        scores.sources([])
    with pytest.raises(ValueError, match=r"head \(5, 0\) does not exist"):
        scores.sources([(5, 0)])


def test_the_table_has_a_row_per_document(scores: fl.DocumentScores) -> None:
    sources = scores.sources(HEADS)
    frame = sources.to_frame()
    assert len(frame) == 7
    assert frame["is_top"].sum() == 2
    own = frame[frame["sample_id"] == "a"]
    assert own["share"].tolist() == pytest.approx(sources.shares[0].tolist())
    assert own["document"].tolist() == [0, 1, 2, 3]
    assert "3 samples, by 2 heads" in repr(sources)
    assert "y" in sources._repr_html_()
