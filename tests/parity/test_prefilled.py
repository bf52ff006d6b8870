"""Functions on a prefix against the same functions on its prompt, and against Hugging Face's eager attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import focuslens as fl
from focuslens.scores.contextual_scores import attention_pattern
from tests.support.reference import gap, prompt_text
from tests.support.tiers import first_quick

HEADS = [(2, 3), (0, 1), (2, 0)]
TOLERANCE = 1e-4  # see test_scores.py


def steering(model: fl.FocusModel) -> fl.FocusSteering:
    generator = torch.Generator().manual_seed(3)
    heads = [fl.Head(0, 1), fl.Head(1, 3), fl.Head(2, 2)]
    query = 4 * torch.randn(len(heads), model.shape.d_head, generator=generator)
    return fl.FocusSteering(fl.FocusDirections(heads, query), 1.0)


def interventions(kind: str, model: fl.FocusModel) -> list[Any]:
    split = fl.SplitSoftmax([fl.Head(*head) for head in HEADS], tau=0.2)
    return {"none": [], "split": [split], "steering": [steering(model)], "both": [steering(model), split]}[kind]


@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral_window"])
def test_a_prefix_gives_hugging_faces_response_and_patterns(name, backend, load_model, reference, samples):
    model, hf, sample = load_model(name, backend), reference(name), samples[0]
    ids = hf.ids(prompt_text(sample, "long"))
    made = torch.tensor(hf.generate(ids, 5))
    patterns = hf.patterns(torch.cat((ids, made)))
    expected = torch.stack([patterns[layer, head] for layer, head in HEADS])
    prefix = model.prefill(sample.prompt("long"))
    assert torch.equal(model.generate(prefix, max_new_tokens=5).tokens, made)
    rows = fl.response_attention(model, prefix, HEADS, max_new_tokens=5).rows
    assert gap(rows, expected[:, len(ids) :]) < TOLERANCE
    window = fl.window_attention(model, prefix, HEADS, margin=2, max_new_tokens=5)
    places = torch.tensor(window.positions)
    assert gap(window.pattern, expected[:, places][:, :, places]) < TOLERANCE


@pytest.mark.parametrize("engine", [True, False])
@pytest.mark.parametrize("hold_last", [True, False])
@pytest.mark.parametrize("kind", first_quick(["both", "none", "split", "steering"]))
def test_a_prefix_stands_for_its_prompt(kind, hold_last, engine, tiny_model, samples, backend, monkeypatch):
    if not engine:
        monkeypatch.setattr(f"focuslens.model.backends.{backend}._can_fuse", lambda hooked: False)
    model, sample = tiny_model, samples[1]
    prompt, applied = sample.prompt("long"), interventions(kind, tiny_model)
    changing = [item for item in applied if item.changes_prompt]
    prefix = model.prefill(prompt, changing, hold_last=hold_last)
    alone = model.generate(prompt, applied, max_new_tokens=5)
    for _ in range(2):  # the prefix stays as it is
        assert torch.equal(model.generate(prefix, applied, max_new_tokens=5).tokens, alone.tokens)
    settings: dict[str, Any] = {"interventions": applied, "max_new_tokens": 5}
    shared, own = (fl.response_attention(model, one, HEADS, **settings) for one in (prefix, prompt))
    assert gap(shared.rows, own.rows) < 1e-5
    assert (shared.tokens, shared.spans, shared.text) == (own.tokens, own.spans, own.text)
    window = fl.window_attention(model, prefix, HEADS, **settings)
    whole = attention_pattern(model, prompt, alone.tokens, HEADS, window.positions, interventions=applied)
    assert gap(window.pattern, whole) < 1e-5
    if kind != "none":  # the interventions matter
        plain = attention_pattern(model, prompt, alone.tokens, HEADS, window.positions)
        assert gap(window.pattern, plain) > 1e-3


def test_a_prefix_gives_the_patterns_of_a_given_response(tiny_model, samples):
    prompt, applied = samples[0].prompt("long"), interventions("both", tiny_model)
    prefix = tiny_model.prefill(prompt, applied)
    settings: dict[str, Any] = {"interventions": applied, "response": "The silver lantern"}
    shared, own = (fl.response_attention(tiny_model, one, HEADS, **settings) for one in (prefix, prompt))
    assert gap(shared.rows, own.rows) < 1e-5
    window = fl.window_attention(tiny_model, prefix, HEADS, ["question"], **settings)
    ids = tiny_model.encoder.encode_response(tiny_model.encode(prompt), "The silver lantern")
    whole = attention_pattern(tiny_model, prompt, ids, HEADS, window.positions, interventions=applied)
    assert gap(window.pattern, whole) < 1e-5


def test_a_prefix_of_several_prompts_gives_a_response_to_each(tiny_model, samples):
    prompts = [sample.prompt("long") for sample in samples]
    applied = interventions("both", tiny_model)
    found = tiny_model.generate(tiny_model.prefill(prompts, applied), applied, max_new_tokens=4)
    assert [made.tokens.tolist() for made in found] == [
        tiny_model.generate(prompt, applied, max_new_tokens=4).tokens.tolist() for prompt in prompts
    ]
