"""Choices of self-focus for many samples, and how often they are right."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

import focuslens as fl
from focuslens.interventions import self_focus

HEADS = [fl.Head(1, 2), fl.Head(2, 0), fl.Head(0, 3)]


def test_choices_are_those_of_self_focus(tiny_model: fl.FocusModel, samples: Any) -> None:
    focus = fl.SelfFocus(HEADS, 0.1)
    found = fl.choices(tiny_model, samples, focus, batch_tokens=600)
    expected = [focus.choose(tiny_model, tiny_model.prefill(one.prompt(), hold_last=True))[0] for one in samples]
    assert [choice.chosen for choice in found.choices] == [choice.chosen for choice in expected]
    assert found.right() == [one.gold_index in choice.chosen for one, choice in zip(samples, expected, strict=True)]
    assert found.accuracy().mean == pytest.approx(sum(found.right()) / len(samples))
    assert (len(found), found.sample_ids) == (len(samples), tuple(one.id for one in samples))
    pair = [focus, fl.SelfFocus(HEADS[:1], 0.1, rows="response", top=2)]
    together = fl.choices(tiny_model, samples, pair, max_new_tokens=4, batch_tokens=600)
    assert together[0] == found
    assert together[1] == fl.choices(tiny_model, samples, pair[1], max_new_tokens=4, batch_tokens=600)
    assert together[1] != found
    every = fl.choices(tiny_model, samples, fl.SelfFocus(HEADS, 0.1, top=None))
    assert every.accuracy().mean == 1
    gated = fl.choices(tiny_model, samples, fl.SelfFocus(HEADS, 0.1, max_sink=0))
    assert gated.accuracy().mean == 0


def test_choices_from_the_same_rows_are_measured_once(
    tiny_model: fl.FocusModel, samples: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts: list[int] = []
    measure, prefill = self_focus.question_attention, fl.FocusModel.prefill
    monkeypatch.setattr(self_focus, "question_attention", lambda *given: (prompts.append(1), measure(*given))[1])
    monkeypatch.setattr(
        fl.FocusModel, "prefill", lambda *given, **more: (prompts.append(10), prefill(*given, **more))[1]
    )
    focuses = [fl.SelfFocus(HEADS, 0.1), fl.SelfFocus(HEADS, 0.1, top=2), fl.SelfFocus(HEADS, 0.1, min_margin=0.5)]
    fl.choices(tiny_model, samples[:1], focuses)
    assert prompts == [10, 1]


def test_samples_without_a_label(tiny_model: fl.FocusModel, samples: Any) -> None:
    unknown = replace(samples[0], gold_index=None, question_id="other")
    found = fl.choices(tiny_model, [*samples[:2], unknown], fl.SelfFocus(HEADS, 0.1))
    assert (len(found), len(found.right())) == (3, 2)
    with pytest.raises(ValueError, match="no sample has a gold document"):
        fl.choices(tiny_model, [unknown], fl.SelfFocus(HEADS, 0.1)).accuracy()
    with pytest.raises(ValueError, match="parts is 'sentence'; choices are compared with gold documents"):
        fl.choices(tiny_model, samples, fl.SelfFocus(HEADS, 0.1, parts="sentence"))
