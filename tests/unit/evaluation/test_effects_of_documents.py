"""Effects of documents: their comparison with an attribution by hand, their arguments, and samples without a result."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

import focuslens as fl
from focuslens.evaluation.effects_of_documents import DocumentEffects
from focuslens.evaluation.faithfulness import compare_effects
from focuslens.scores.document_scores import DocumentScores

EFFECTS = [[4.0, 1.0, 0.0], [0.5, 2.0, 2.0], [1.0, 3.0, -1.0, 0.0], [math.nan] * 3, [7.0]]
SCORES = [[0.9, 0.3, 0.2], [0.1, 0.5, 0.4], [0.8, 0.1, 0.2, 0.3], [0.1, 0.2, 0.3], [0.4]]
QUESTIONS = ("a", "b", "b", "c", "d")
CORRECT = (True, True, False, True, False)


def effects(gold: tuple[int | None, ...] = (0, 2, 1, 0, 0)) -> DocumentEffects:
    names = tuple(f"{question}@{i}" for i, question in enumerate(QUESTIONS))
    tensors = tuple(torch.tensor(row, dtype=torch.float64) for row in EFFECTS)
    return DocumentEffects(
        tensors, (-1.0, -2.0, -3.0, 0.0, -4.0), (2, 4, 1, 0, 2), "knockout", gold, names, QUESTIONS, names, CORRECT
    )


def scores() -> DocumentScores:
    """Scores of one layer with two heads. All scores of the second head are zero."""
    measured = effects()
    tensors = tuple(torch.tensor([[row, [0.0] * len(row)]]) for row in SCORES)
    return DocumentScores(tensors, measured.gold, measured.sample_ids, QUESTIONS, measured.responses, CORRECT)


def test_faithfulness_by_hand():
    result = effects().faithfulness(scores(), [(0, 0)])
    assert result.sample_ids == ("a@0", "b@1", "b@2")
    assert result.attributed == (0, 1, 0)
    assert result.attributed_effect.mean == pytest.approx((4 + 2 + 1) / 3)
    assert result.other_effect.mean == pytest.approx((0.5 + 1.25 + 2 / 3) / 3)
    assert result.difference.mean == pytest.approx((3.5 + 0.75 + 1 / 3) / 3)
    # Sample 2 shares the largest effect. Two of the three others of sample 3 have smaller effects, and one a larger.
    assert result.larger.mean == pytest.approx((1 + 0.75 + 2 / 3) / 3)
    assert result.largest.mean == pytest.approx(1 / 3)
    # The values of the questions are 2 and 1 + 1, so that two of the four sums are as far from zero as 4.
    assert result.p_value == 0.5
    # Ranks of sample 2 are 1, 3, 2 and 1, 2.5, 2.5; those of sample 3 are 4, 1, 2, 3 and 3, 4, 1, 2.
    assert result.correlation is not None
    assert result.correlation.mean == pytest.approx((1 + 1.5 / math.sqrt(2 * 1.5) + -0.2) / 3)
    assert str(result).startswith("3 samples: effect 2.333")


def test_smaller_and_larger_effects_count_in_the_test():
    """Of the 16 sums of 2, -3, 3 and 1 with other signs, 12 are as far from zero as 3."""
    rows = [[1.0, 0, 0], [-1.0, 0, 0, 0], [1.0, 0, 0, 0], [1.0, 0]]
    tensors = [torch.tensor(row) for row in rows]
    first = [torch.tensor([1.0] + [0.0] * (len(row) - 1)) for row in rows]
    result = compare_effects(first, tensors, list("abcd"), list("abcd"))
    assert result.p_value == 12 / 16
    assert result.larger.mean == 0.75


def test_faithfulness_of_some_answers_and_per_token():
    right = effects().faithfulness(scores(), [(0, 0)], correct=True)
    assert right.sample_ids == ("a@0", "b@1")
    wrong = effects().faithfulness(scores(), [(0, 0)], correct=False)
    assert (wrong.attributed, wrong.difference.mean) == ((0,), pytest.approx(1 / 3))
    per_token = effects().faithfulness(scores(), [(0, 0)], per_token=True)
    assert per_token.difference.mean == pytest.approx((3.5 / 2 + 0.75 / 4 + 1 / 3) / 3)
    assert effects().per_token()[1].tolist() == [0.125, 0.5, 0.5]


def test_equal_scores_have_no_correlation():
    result = effects().faithfulness(scores(), [(0, 1)])
    assert result.correlation is None
    assert result.attributed == (0, 0, 0)


def test_effects_rank_the_gold_document():
    found = effects().attribution()
    assert found.rank == (1, 2, 1, 1)  # a tie does not count as first
    assert effects().attribution(correct=True).rank == (1, 2)
    with pytest.raises(ValueError, match="no sample has a gold document"):
        effects((None,) * 5).attribution()


def test_effects_of_two_kinds_are_compared():
    other = replace(effects(), by="removal", effects=tuple(2 * values for values in effects().effects))
    result = other.faithfulness(effects())
    assert result.largest.mean == pytest.approx(2 / 3)  # a tie for the largest effect does not count
    assert result.correlation is not None
    assert result.correlation.mean == pytest.approx(1)


def test_rankings_that_do_not_fit_are_refused():
    measured = effects()
    with pytest.raises(ValueError, match="the ranking is of other samples"):
        measured.faithfulness(replace(scores(), sample_ids=("x",) * 5), [(0, 0)])
    with pytest.raises(ValueError, match="the ranking is of other responses"):
        measured.faithfulness(replace(scores(), responses=("x",) * 5), [(0, 0)])
    with pytest.raises(ValueError, match="heads is None"):
        measured.faithfulness(scores())
    with pytest.raises(ValueError, match="heads has no use with DocumentEffects"):
        measured.faithfulness(measured, [(0, 0)])
    with pytest.raises(ValueError, match=r"head \(1, 0\) does not exist"):
        measured.faithfulness(scores(), [(1, 0)])
    with pytest.raises(ValueError, match="sample a@0 has 2 scores and 3 effects"):
        measured.faithfulness(replace(measured, effects=(torch.zeros(2), *measured.effects[1:])))
    empty = replace(measured, effects=tuple(torch.full_like(values, torch.nan) for values in measured.effects))
    with pytest.raises(ValueError, match="no sample has a response and two or more documents"):
        empty.faithfulness(scores(), [(0, 0)])


@pytest.mark.parametrize("by", ["knockout", "removal"])
def test_samples_without_a_label_or_a_second_document(by: Any, tiny_model: fl.FocusModel, samples: Any):
    single = replace(samples[0], documents=samples[0].documents[:1], gold_index=None, question_id="single")
    measured = fl.document_effects(tiny_model, [samples[1], single], by=by, responses=["the river", "stone"])
    assert [len(values) for values in measured.effects] == [6, 1]
    assert measured.gold == (0, None)
    assert not measured.effects[1].isnan().any()
    assert (measured.by, len(measured), measured.responses) == (by, 2, ("the river", "stone"))
    assert repr(measured) == f"DocumentEffects({by}: 2 samples, 0 answered right)"
    assert len(measured.attribution().rank) == 1


def test_effects_fit_rankings_of_every_kind(tiny_model: fl.FocusModel, samples: Any):
    heads = [fl.Head(1, 2), fl.Head(2, 0)]
    found = fl.document_scores(tiny_model, samples, max_new_tokens=3)
    measured = fl.document_effects(tiny_model, samples, max_new_tokens=3)
    assert measured.responses == found.responses
    attributed = tuple(int(values.argmax()) for values in found.of(heads))
    assert measured.faithfulness(found, heads).attributed == attributed
    question = fl.question_scores(tiny_model, samples, heads, null=None)
    assert measured.faithfulness(question, heads).attributed == tuple(int(v.argmax()) for v in question.of(heads))
    chosen = fl.choices(tiny_model, samples, fl.SelfFocus(heads, 0.1))
    assert measured.faithfulness(chosen).attributed == tuple(choice.chosen[0] for choice in chosen.choices)


def test_wrong_arguments_are_refused(tiny_model: fl.FocusModel, samples: Any, unchecked: None):
    with pytest.raises(ValueError, match="by is 'mask'; it must be one of knockout, removal"):
        fl.document_effects(tiny_model, samples, by="mask")  # type: ignore[arg-type]  # pyright: ignore
    with pytest.raises(ValueError, match="there are 1 responses for 4 samples"):
        fl.document_effects(tiny_model, samples, responses=["a"])
    with pytest.raises(TypeError, match="responses is 'a'"):
        fl.document_effects(tiny_model, samples, responses="a")
    with pytest.raises(ValueError, match="there are no samples to score"):
        fl.document_effects(tiny_model, [])
    measured = fl.document_effects(tiny_model, samples[:2], responses=["", " "])
    assert all(bool(values.isnan().all()) for values in measured.effects)
