"""Verdicts depend on intervals over whole questions. An unclear result has the verdict "cannot be told"."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import focuslens as fl
from focuslens.data.needles import NeedleSample
from focuslens.evaluation import Sweep, bootstrap_mean
from focuslens.scores.contextual_scores import KINDS, ContextualScores
from focuslens.scores.retrieval_scores import RetrievalScores
from focuslens.studies.paper import chosen_settings, heads, retrieval, steered_scores, study
from focuslens.studies.paper.artefact import all_of, signed, verdict_below, verdict_by
from tests.support.paper_runs import opened

N_LAYERS, N_HEADS = 3, 4


@pytest.fixture
def made(checkpoint: Any, paper_files: Path, tmp_path: Path) -> study.Study:
    return opened(tmp_path, paper_files, checkpoint("llama"))


def asked(monkeypatch: Any, made: study.Study, n: int, samples_of_one: int = 1) -> tuple[str, ...]:
    """Give every part ``n`` questions with ``samples_of_one`` samples each, and return the ids of the samples."""
    (first, *_) = made.samples("test")
    samples = [
        replace(first, question_id=f"q{i}", gold_index=k % 3, documents=first.documents)
        for i in range(n)
        for k in range(samples_of_one)
    ]
    monkeypatch.setattr(study.Study, "samples", lambda self, part: samples)
    return tuple(sample.id for sample in samples)


def scored(ids: tuple[str, ...], case: Any = "long", **by_kind: torch.Tensor) -> ContextualScores:
    """Scores of all samples. Each kind is broadcast to ``[sample layer head]``, and omitted kinds are zero."""
    shape = (len(ids), N_LAYERS, N_HEADS)
    values = {kind: by_kind.get(kind, torch.zeros(1)).expand(shape).clone() for kind in KINDS}
    said, right = ("x",) * len(ids), (True,) * len(ids)
    return ContextualScores(**values, case=case, sample_ids=ids, responses=said, correct=right)


def test_intervals_decide():
    clear, unclear, below = (
        fl.Interval(0.5 * (low + high), low, high, 0.95) for low, high in ((1, 2), (-1, 2), (-3, -1))
    )
    assert [verdict_by(one) for one in (clear, unclear, below)] == ["holds", "cannot be told", "does not hold"]
    assert [verdict_below(one, 0.0) for one in (clear, unclear, below)] == ["does not hold", "cannot be told", "holds"]
    assert [verdict_by(clear, above=limit) for limit in (0.5, 1.5, 2.5)] == ["holds", "cannot be told", "does not hold"]
    assert all_of("holds", "holds") == "holds"
    assert all_of("holds", "cannot be told") == "cannot be told"
    assert all_of("cannot be told", "does not hold", "holds") == "does not hold"
    assert signed(unclear, 2) == "+0.50 [-1.00, +2.00]"
    assert signed(fl.Interval(-0.00001, -0.001, 0.0, 0.95)) == "0 [-0.001, 0]"


# --- number and layers of contextual heads ---


def one_head(n: int, low: float, high: float) -> torch.Tensor:
    """Scores in which only one head of the last layer is nonzero: ``low`` and ``high`` for half of the samples each."""
    scores = torch.zeros(n, N_LAYERS, N_HEADS)
    scores[::2, 2, 1], scores[1::2, 2, 1] = low, high
    return scores


@pytest.mark.parametrize(
    ("heads_above", "expected"),
    [
        (1, ["holds", "holds"]),
        (2, ["holds", "holds"]),
        (3, ["cannot be told", "holds"]),
        (4, ["does not hold", "holds"]),
    ],
)
def test_few_heads_are_less_than_a_quarter(heads_above: int, expected: list[str], made: study.Study, monkeypatch: Any):
    ids = asked(monkeypatch, made, 20)
    scores = torch.zeros(20, N_LAYERS, N_HEADS)
    scores[:, 2, :heads_above] = 0.5
    found = heads._where_they_are(made, scored(ids, relevant=scores))
    assert [one.verdict for one in found] == expected
    share = heads_above / 12
    assert f"{heads_above} of 12 heads, a share of {share:.3f} [{share:.3f}, {share:.3f}]" in found[0].text


def test_a_threshold_that_resamples_cross_decides_nothing(made: study.Study, monkeypatch: Any):
    ids = asked(monkeypatch, made, 20)
    # The mean is 0.102. In about half of the resamples it is below 0.1, so that no head is left.
    found = heads._where_they_are(made, scored(ids, relevant=one_head(20, 0.002, 0.202)))
    assert found[0].verdict == "cannot be told"
    assert "1 of 12 heads, a share of 0.083 [0.000, 0.083]" in found[0].text
    none = heads._where_they_are(made, scored(ids, relevant=one_head(20, 0.0, 0.0)))
    assert [one.verdict for one in none] == ["cannot be told"]


def test_questions_are_drawn_whole(made: study.Study, monkeypatch: Any):
    # Two questions have scores of 0.03 and 0.21. A quarter of the resamples has only the first question, for any number
    # of samples per question.
    ids = asked(monkeypatch, made, 2, samples_of_one=3)
    scores = torch.zeros(6, N_LAYERS, N_HEADS)
    scores[:3, 2, 1], scores[3:, 2, 1] = 0.03, 0.21
    drawn = made.resampled("train", scores, ids)[:, 9]
    values, times = np.unique(drawn.round(6), return_counts=True)
    assert values.tolist() == pytest.approx([0.03, 0.12, 0.21])
    assert (times / len(drawn)).tolist() == pytest.approx([0.25, 0.5, 0.25], abs=0.02)


@pytest.mark.parametrize(("layer", "expected"), [(0, "does not hold"), (1, "holds"), (2, "holds")])
def test_the_first_third_is_neither_middle_nor_late(layer: int, expected: str, made: study.Study, monkeypatch: Any):
    ids = asked(monkeypatch, made, 10)
    scores = torch.zeros(10, N_LAYERS, N_HEADS)
    scores[:, layer, 0] = 0.4
    found = heads._where_they_are(made, scored(ids, relevant=scores))[1]
    assert found.verdict == expected
    assert "where 0.667 of all heads are" in found.text
    assert f"in layers {layer} to {layer} of 3" in found.text


# --- retrieval heads ---


def needles(questions: list[str]) -> list[NeedleSample]:
    texts = [(f"Here. {question}", question) for question in questions]
    return [
        NeedleSample(fl.Prompt(text, {"needle": [(0, 4)], "question": [(6, len(text))]}), "here", 1, 0.0, str(i))
        for i, (text, _) in enumerate(texts)
    ]


def overlap(
    made: study.Study, monkeypatch: Any, copying: list[tuple[int, int]], noise: float, questions: int, runs: int = 40
) -> Any:
    """Findings for contextual heads in the last layer, and for noisy copy scores that are high in heads ``copying``."""
    ids = asked(monkeypatch, made, 40)
    relevant = torch.zeros(40, N_LAYERS, N_HEADS)
    relevant[:, 2] = torch.tensor([0.9, 0.8, 0.7, 0.6])
    monkeypatch.setattr(study.Study, "scores", lambda self, *arguments: scored(ids, relevant=relevant))
    generator = torch.Generator().manual_seed(0)
    copies = noise * torch.rand(runs, N_LAYERS, N_HEADS, generator=generator)
    for head in copying:
        copies[:, head[0], head[1]] += 0.5
    samples = needles([f"where is {i % questions}?" for i in range(runs)])
    found = RetrievalScores.of_runs(samples, copies, ["here"] * runs)
    return retrieval._findings(made, samples, found, [fl.Head(2, i) for i in range(4)], found.top_heads(4))


LAST = [(2, 0), (2, 1), (2, 2), (2, 3)]


@pytest.mark.parametrize(
    ("copying", "noise", "questions", "expected"),
    [
        ([(0, 0), (1, 0), (1, 1), (2, 0)], 0.01, 20, ["holds", "holds"]),  # one of four in common, in three layers
        (LAST, 0.01, 20, ["does not hold", "cannot be told"]),  # all in common
        (LAST[:2], 1.0, 20, ["cannot be told", "holds"]),  # two in common, others by chance
        ([(0, 0), (1, 0), (1, 1), (2, 0)], 0.01, 1, ["cannot be told", "cannot be told"]),  # a single question
    ],
)
def test_different_heads_share_at_most_half(
    copying: Any, noise: float, questions: int, expected: list[str], made: study.Study, monkeypatch: Any
):
    found = overlap(made, monkeypatch, copying, noise, questions)
    assert [one.verdict for one in found] == expected


def test_needles_of_a_question_are_drawn_together(made: study.Study, monkeypatch: Any):
    ids = asked(monkeypatch, made, 10)
    relevant = torch.zeros(10, N_LAYERS, N_HEADS)
    relevant[:, 2] = 0.5
    monkeypatch.setattr(study.Study, "scores", lambda self, *arguments: scored(ids, relevant=relevant))
    copies = torch.zeros(40, N_LAYERS, N_HEADS)
    copies[::2, 2], copies[1::2, 0] = 0.9, 0.3
    best = [fl.Head(2, i) for i in range(4)]
    for questions, verdict, shared in ((2, "cannot be told", "4 [0, 4]"), (40, "does not hold", "4 [4, 4]")):
        samples = needles([f"where is {i % questions}?" for i in range(40)])
        found = retrieval._findings(made, samples, RetrievalScores.of_runs(samples, copies, ["here"] * 40), best, best)
        assert found[0].verdict == verdict
        assert f"{shared} of the top 4" in found[0].text


def test_shared_heads_and_layers_are_said_with_intervals(made: study.Study, monkeypatch: Any):
    found = overlap(made, monkeypatch, [(0, 0), (1, 0), (1, 1), (2, 0)], 0.01, 20)
    assert "1 [1, 1] of the top 4 of one kind are also among the top 4 of the other. 1.3 are expected" in found[0].text
    assert "The number of layers with such a head differs by +2 [+2, +2]" in found[1].text


def test_the_best_of_a_resample_are_those_of_a_ranking():
    means = np.array([[0.1, 0.5, 0.5, 0.0, 0.5, 0.2], [0.0, 0.0, 0.0, 0.0, 0.0, 0.0]])
    for row, best in zip(means, retrieval._best(means, 2), strict=True):
        ranked = fl.rank_heads(torch.tensor(row).reshape(2, 3))[:2]
        assert {fl.Head(*divmod(i, 3)) for i in np.flatnonzero(best).tolist()} == set(ranked)
    assert retrieval._held(np.array([[True, False, True, True], [False, False, False, True]]), 2).tolist() == [2, 1]


# --- more heads ---


def sweep_of(right: Mapping[tuple[float, int], set[int]], name: str) -> Sweep:
    """A sweep over 40 samples of 20 questions. ``right`` maps strength and number of heads to the correct questions."""
    ids, questions = tuple(str(i) for i in range(40)), tuple(f"q{i // 2}" for i in range(40))
    settings, evaluations = [], {}
    for (strength, k), good in right.items():
        correct = tuple(i // 2 in good for i in range(40))
        setting = fl.Setting(f"{strength:g} {k}", parameters={name: strength, "k": k})
        settings.append(setting)
        evaluations[setting.name] = fl.Evaluation(ids, questions, ids, correct, bootstrap_mean([*map(float, correct)]))
    return Sweep(tuple(settings), evaluations, {})


ALL, HALF = set(range(20)), set(range(10))


@pytest.mark.parametrize(
    ("more", "expected"), [(HALF, "holds"), (ALL - {0, 1, 2}, "cannot be told"), (ALL, "cannot be told")]
)
def test_more_heads_are_worse_only_by_an_interval_over_questions(more: set[int], expected: str):
    sweep = sweep_of({(1, 8): ALL, (1, 16): more, (2, 8): ALL, (2, 16): more}, "alpha")
    found = chosen_settings.gain_of_more(sweep, sweep.settings, 8, "Steering")
    assert found.verdict == expected
    mean = len(more) / 20 - 1
    assert found.text.startswith("Steering more than 8 heads is worse than 8: with 16 exact match changes by ")
    assert f"changes by {mean:+.3f} [" in found.text or (not mean and "changes by 0 [0, 0]" in found.text)
    assert found.text.endswith("on average over alpha = 1, 2.")


def test_more_heads_that_do_better_are_not_worse():
    sweep = sweep_of({(0.1, 4): HALF, (0.1, 20): ALL, (0.3, 4): set(), (0.3, 20): HALF, (0.1, 30): ALL}, "tau")
    found = chosen_settings.gain_of_more(sweep, sweep.settings, 8, "Turning up")
    assert found.verdict == "does not hold"
    # Each setting is compared with four heads at the same strength.
    changes = [np.mean([i >= 10, i < 10, i >= 10]) for i in range(20)]
    assert f"with 20, 30 exact match changes by {np.mean(changes):+.3f} [" in found.text
    assert "more than 4 heads is worse than 4" in found.text


def test_without_settings_of_both_kinds_nothing_is_told():
    for ks in ((1, 8), (10, 20)):
        sweep = sweep_of({(1, k): ALL for k in ks}, "alpha")
        found = chosen_settings.gain_of_more(sweep, sweep.settings, 8, "Steering")
        assert found.verdict == "cannot be told"
        assert "no setting of each kind" in found.text


# --- scores under directions ---


def steered(made: study.Study, monkeypatch: Any, by_alpha: Mapping[float, Mapping[str, float]]) -> Any:
    """Score changes of 30 questions per strength, equal in all heads up to a little noise."""
    ids = asked(monkeypatch, made, 30)
    generator = torch.Generator().manual_seed(1)

    def noisy(value: float) -> torch.Tensor:
        return value + 0.002 * torch.randn(30, 1, 1, generator=generator)

    plain = {"long": scored(ids, **{kind: noisy(0.3) for kind in KINDS})}
    found = {
        alpha: {"long": scored(ids, **{kind: noisy(0.3 + by_kind.get(kind, 0.0)) for kind in KINDS})}
        for alpha, by_kind in by_alpha.items()
    }
    return steered_scores._Changes(made, found, plain, [fl.Head(0, 0), fl.Head(1, 1)])


@pytest.mark.parametrize(
    ("by_kind", "expected"),
    [
        ({"relevant": 0.1, "sink": -0.1}, ["holds", "holds"]),
        ({"relevant": 0.1, "sink": -0.04, "irrelevant": -0.06}, ["holds", "does not hold"]),
        ({"relevant": 0.1, "irrelevant": -0.1}, ["holds", "does not hold"]),
        ({"relevant": -0.1, "sink": 0.1}, ["does not hold", "does not hold"]),
        ({}, ["cannot be told", "cannot be told"]),
    ],
)
def test_what_the_relevant_document_gets_comes_mostly_from_the_sink(
    by_kind: Any, expected: list[str], made: study.Study, monkeypatch: Any
):
    changes = steered(made, monkeypatch, {0.5: by_kind, 2.0: {"relevant": 0.9}})
    assert [one.verdict for one in steered_scores._towards(changes)] == expected


@pytest.mark.parametrize(
    ("by_alpha", "expected"),
    [
        ({-1.0: {"relevant": -0.1}, 1.0: {"relevant": 0.1}, 2.0: {"relevant": 0.2}}, ["holds", "holds"]),
        ({-1.0: {"relevant": 0.1}, 1.0: {"relevant": 0.2}, 2.0: {"relevant": 0.1}}, ["does not hold"] * 2),
        ({-1.0: {}, 1.0: {}, 2.0: {}}, ["cannot be told"] * 2),
        ({1.0: {"relevant": 0.1}}, []),
    ],
)
def test_scores_follow_the_strength(by_alpha: Any, expected: list[str], made: study.Study, monkeypatch: Any):
    changes = steered(made, monkeypatch, by_alpha)
    assert [one.verdict for one in steered_scores._by_strength(changes)] == expected


@pytest.mark.parametrize(
    ("by_alpha", "expected"),
    [
        ({1.0: {"relevant": 0.1}, 8.0: {"relevant": 0.05, "irrelevant_max": 0.1}}, "holds"),
        ({1.0: {}, 8.0: {"relevant": 0.2, "irrelevant_max": 0.1}}, "does not hold"),  # the relevant document gains more
        ({1.0: {}, 8.0: {"relevant": -0.2}}, "cannot be told"),  # the irrelevant score does not rise
        ({1.0: {"irrelevant_max": 0.1}, 8.0: {"relevant": -0.2}}, "does not hold"),
        ({-1.0: {}, 8.0: {"irrelevant_max": 0.1}}, "cannot be told"),
    ],
)
def test_too_strong_a_direction_raises_the_largest_irrelevant_score(
    by_alpha: Any, expected: str, made: study.Study, monkeypatch: Any
):
    assert steered_scores._too_far(steered(made, monkeypatch, by_alpha)).verdict == expected


def test_nothing_said_is_nothing_told(made: study.Study, monkeypatch: Any):
    changes = steered(made, monkeypatch, {1.0: {}, 2.0: {}})
    changes.by_alpha[1.0]["long"].relevant.fill_(torch.nan)
    found = steered_scores._towards(changes)[0]
    assert (found.verdict, "(unknown: no responses)" in found.text) == ("cannot be told", True)
