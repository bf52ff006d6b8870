"""The embedded model is an ordinary checkpoint that answers from the relevant document and can be distracted."""

from __future__ import annotations

import json
from hashlib import sha256
from importlib import resources

import pytest

import focuslens as fl
from focuslens.data.synthetic import build_tokenizer
from focuslens.model.loading import load_tokenizer
from focuslens.model.sources.names import checkpoint_path
from focuslens.viz.run_report.samples import reopen_model


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


def test_its_name_opens_it_wherever_a_checkpoint_is_named(model):
    named = fl.FocusModel.from_pretrained("demo", device="cpu")
    assert named.description == model.description
    assert reopen_model(model.description, device="cpu").description == model.description
    text = fl.load_synthetic(1)[0].prompt()
    assert load_tokenizer(checkpoint_path("demo"))(text).input_ids == build_tokenizer()(text).input_ids
    assert fl.FocusModel.demo().decoding.describe() == {}


def test_it_answers_held_out_questions_from_the_relevant_document(model):
    samples = [s for i, s in enumerate(fl.load_synthetic(100, split="test")) if i % 5 == 0]
    gold = fl.evaluate(model, samples, case="gold", max_new_tokens=24)
    negative = fl.evaluate(model, samples, case="negative", max_new_tokens=24)
    assert gold.em.mean >= 0.9
    assert negative.em.mean <= 0.15


def test_few_heads_read_the_relevant_document_and_none_in_the_first_layer(model):
    samples = [s for i, s in enumerate(fl.load_synthetic(50, split="test")) if i % 5 == i // 5 % 5]
    long = fl.contextual_scores(model, samples, max_new_tokens=24)
    above = [head for head in long.ranking() if long.mean()[head] > 0.1]
    assert 0 < len(above) < 0.25 * long.relevant[0].numel()
    assert all(head.layer > 0 for head in above)


@pytest.mark.slow
def test_it_is_distracted_and_more_attention_to_the_relevant_document_repairs_it(model):
    samples = [s for i, s in enumerate(fl.load_synthetic(200, split="validation")) if i % 5 == i // 5 % 5]
    heads = fl.contextual_scores(model, samples[:20], max_new_tokens=24).top_heads(6)
    settings = [fl.Setting("baseline"), *fl.split_softmax_settings(heads, (0.1, 1000.0), (6,))]
    em = {
        name: result.em.mean
        for name, result in fl.run_sweep(model, samples, settings, max_new_tokens=24).evaluations.items()
    }
    baseline, up, down = em.values()
    # The bounds allow two standard errors of a proportion around the card's numbers. For forty questions, these are
    # 0.15.
    assert 0.35 <= baseline <= 0.95
    assert up >= 0.85
    assert up > baseline
    assert down <= 0.15


def test_the_card_was_measured_on_these_weights(model):
    with resources.as_file(resources.files("focuslens") / "assets" / "demo") as directory:
        measured = json.loads((directory / "measured.json").read_text())
        readme = (directory / "README.md").read_text()
        weights = (directory / "model.safetensors").read_bytes()
    # The digest depends on the kind of model. TransformerLens 4 has only the kind on which the card was not measured.
    if model.description["backend"] == measured["model"]["backend"]:
        assert measured["model"]["weights"] == model.description["weights"]
    assert measured["model"]["sha256"] == sha256(weights).hexdigest()
    assert len(weights) < 10 * 2**20
    assert sum(p.numel() for p in model.hooked.parameters()) < 5_000_000
    for row in (*measured["baselines"][1:], *measured["everywhere"]):
        assert f"{row['em']:.3f} ({row['em_low']:.3f} to {row['em_high']:.3f})" in readme
    assert measured["sizes"]["questions"] >= 500


def test_both_backends_give_the_same_answer(model):
    prompt = fl.load_synthetic(1, split="test")[0].prompt("gold")
    bridge = fl.FocusModel.demo(device="cpu", backend="bridge")
    assert bridge.generate(prompt, max_new_tokens=16).text == model.generate(prompt, max_new_tokens=16).text != ""
