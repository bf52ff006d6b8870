"""The embedded model is an ordinary checkpoint that answers from the relevant document, and is distracted by others."""

from __future__ import annotations

import pytest

import focuslens as fl


@pytest.fixture(scope="module")
def model():
    return fl.FocusModel.demo(device="cpu")


def test_it_is_small_grouped_and_has_a_long_enough_context(model):
    assert model.name == "demo"
    assert model.shape.n_layers >= 4
    assert model.shape.n_heads >= 8
    assert model.shape.n_key_value_heads < model.shape.n_heads
    longest = max(len(model.encode(s.prompt("long")).tokens) for s in fl.load_synthetic(10, split="test"))
    assert longest + 100 < model.shape.n_ctx


def test_it_answers_held_out_questions_from_the_relevant_document(model):
    samples = [s for i, s in enumerate(fl.load_synthetic(100, split="test")) if i % 5 == 0]
    gold = fl.evaluate(model, samples, case="gold", max_new_tokens=24, batch_size=10)
    negative = fl.evaluate(model, samples, case="negative", max_new_tokens=24, batch_size=10)
    assert gold.em.mean >= 0.8
    assert negative.em.mean <= 0.3


def test_both_backends_give_the_same_answer(model):
    prompt = fl.load_synthetic(1, split="test")[0].prompt("gold")
    bridge = fl.FocusModel.demo(device="cpu", backend="bridge")
    assert bridge.generate(prompt, max_new_tokens=16).text == model.generate(prompt, max_new_tokens=16).text != ""
