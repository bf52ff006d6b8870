"""Regression tests for fixed bugs: the context limit, half precision, and the heads that a command uses."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

import focuslens as fl
from focuslens.cli import common, rankings
from focuslens.cli.main import _parser, main
from tests.support.versions import needs_hooked


def test_a_short_prompt_has_the_same_room_in_a_batch_as_alone(load_model, backend):
    model = load_model("llama", backend, n_ctx=64)
    model = fl.FocusModel(model.hooked, model.tokenizer, stop_strings=(), stop_tokens=())
    ids = torch.arange(5, 67)
    prompts = [fl.EncodedPrompt(ids, {}), fl.EncodedPrompt(ids[:20], {}), fl.EncodedPrompt(ids.repeat(2)[:64], {})]
    together = model.generate(prompts, max_new_tokens=10)
    alone = [model.generate(prompt, max_new_tokens=10) for prompt in prompts]
    assert [len(one.tokens) for one in alone] == [2, 10, 0]
    assert [one.tokens.tolist() for one in together] == [one.tokens.tolist() for one in alone]


def test_an_identity_on_every_head_changes_nothing_in_half_precision(load_model, backend, samples):
    model = load_model("llama", backend, dtype="bfloat16")
    heads = [(layer, head) for layer in range(model.shape.n_layers) for head in range(model.shape.n_heads)]
    prompt = samples[0].prompt()

    def rows(*interventions):
        """Output of the last layer at every row of the response."""
        seen = []
        prefix = model.prefill(prompt, hold_last=True)
        observer = (f"blocks.{model.shape.n_layers - 1}.hook_resid_post", lambda x, hook: seen.append(x[0, -1].clone()))
        model.decode(prefix, interventions, max_new_tokens=4, observers=[observer])
        return torch.stack(seen)

    assert torch.equal(rows(fl.SplitSoftmax(heads, 1.0)), rows())
    assert not torch.equal(rows(fl.SplitSoftmax(heads, 0.1))[:2], rows()[:2])


def test_samples_made_by_hand_are_questions_of_their_own(load_model):
    documents = (fl.Document(title="T", text="It is red."),)
    samples = [
        fl.MultiDocSample(question=question, answers=("red",), documents=documents, gold_index=0)
        for question in ("what is it?", "what was it?")
    ]
    assert samples[0].question_id != samples[1].question_id
    assert len(fl.evaluate(load_model("llama"), samples, max_new_tokens=2)) == 2


def test_logits_take_the_batch_of_one_that_to_tokens_gives(load_model, samples):
    model = load_model("llama")
    prompt = samples[0].prompt()
    assert torch.equal(model.logits(model.to_tokens(prompt)), model.logits(prompt))
    with pytest.raises(ValueError, match=r"\(2, 3\)"):
        model.logits(torch.zeros(2, 3, dtype=torch.long))


def settings_of(split):
    options = [] if split is None else ["--split", split]
    return common.RunSettings.of(_parser().parse_args(["heads", "--documents", "2", *options]))


@pytest.mark.parametrize("split", [None, "test"])
def test_heads_are_ranked_on_the_training_half_whatever_is_evaluated(split, load_model, monkeypatch):
    asked = []

    def stop(options, part):
        asked.append(options.split or part)
        raise KeyboardInterrupt

    monkeypatch.setattr(rankings, "open_samples", stop)
    with pytest.raises(KeyboardInterrupt):
        rankings.get_ranking(None, settings_of(split), load_model("llama"))
    assert asked == ["train"]


@pytest.mark.parametrize("split", ["train", "all"])
def test_heads_are_not_ranked_on_what_is_evaluated(split, load_model):
    with pytest.raises(ValueError, match="--heads"):
        rankings.get_ranking(None, settings_of(split), load_model("llama"))


def test_steering_without_a_ranking_takes_the_best_heads_not_the_first_of_the_file(checkpoint, tmp_path, monkeypatch):
    directory = checkpoint("llama")
    heads = [fl.Head(layer, head) for layer in range(3) for head in range(4)]
    fl.FocusDirections(heads, torch.ones(12, 16)).save(tmp_path / "directions")
    best = [fl.Head(2, 1), fl.Head(0, 3)]
    ranking = best + [head for head in heads if head not in best]
    monkeypatch.setattr("focuslens.cli.steer.get_ranking", lambda *given: (ranking, "made up"))
    options = ["--model", str(directory), "--samples", "1", "--max-new-tokens", "2", "--documents", "4"]
    options += ["--n-ctx", "4096", "--directions", str(tmp_path / "directions"), "--alpha", "1", "--k", "2,99"]
    assert main(["steer", *options, "--out", str(tmp_path / "out")]) == 0
    assert json.loads((tmp_path / "out" / "steering.json").read_text())["heads"] == [[2, 1], [0, 3]]
    assert main(["steer", *options[:-1], "99", "--out", str(tmp_path / "other")]) == 1


def test_scores_have_the_same_room_in_a_batch_as_alone(load_model, backend, samples):
    longest = max(len(load_model("llama", backend).encode(s.prompt()).tokens) for s in samples)
    model = load_model("llama", backend, n_ctx=longest + 4)
    model = fl.FocusModel(model.hooked, model.tokenizer, stop_strings=(), stop_tokens=())
    together = fl.contextual_scores(model, samples, max_new_tokens=20, batch_tokens=600)
    alone = fl.contextual_scores(model, samples, max_new_tokens=20)
    assert together.responses == alone.responses
    assert len({len(response) for response in alone.responses}) > 1
    torch.testing.assert_close(together.relevant, alone.relevant, atol=1e-5, rtol=0)


def test_interventions_have_the_same_room_in_a_batch_as_alone(load_model, backend, samples):
    longest = max(len(load_model("llama", backend).encode(s.prompt()).tokens) for s in samples)
    model = load_model("llama", backend, n_ctx=longest + 4)
    model = fl.FocusModel(model.hooked, model.tokenizer, stop_strings=(), stop_tokens=())
    split, prompts = fl.SplitSoftmax([(0, 1), (2, 2)], 0.1), [sample.prompt() for sample in samples]
    together = model.generate(prompts, [split], max_new_tokens=20)
    assert [one.text for one in together] == [model.generate(p, [split], max_new_tokens=20).text for p in prompts]


def test_samples_without_a_relevant_document_do_not_dilute_its_score(load_model, samples):
    model = load_model("llama")
    none = fl.MultiDocSample("who?", ("x",), samples[0].documents, None)
    scores = fl.contextual_scores(model, [samples[0], none], responses=["river stone", "river stone"])
    assert scores.relevant[1].isnan().all()
    assert not scores.irrelevant.isnan().any()
    torch.testing.assert_close(scores.mean(), scores.relevant[0])


def test_training_does_not_mind_that_gradients_are_off(load_model, backend, samples):
    model = load_model("llama", backend)
    settings: dict[str, Any] = {"epochs": 1, "max_new_tokens": 2, "site": "projection"}
    expected = fl.train_focus_directions(model, samples[3:], [(1, 2)], **settings)
    for off in (torch.no_grad(), torch.inference_mode()):
        with off:
            trained = fl.train_focus_directions(model, samples[3:], [(1, 2)], **settings)
        assert torch.equal(trained.query, expected.query)


@pytest.mark.parametrize("site", ["rotary", "projection"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_model_with_norms_in_half_precision_can_be_trained_on(site, dtype, load_model, backend, samples):
    model = load_model("qwen3", backend, dtype=dtype)
    trained = fl.train_focus_directions(
        model, samples[3:], [(1, 2)], site=site, epochs=2, max_new_tokens=2, learning_rate=0.05
    )
    assert trained.losses is not None
    assert trained.losses[1] < trained.losses[0]


def test_a_heads_direction_does_not_depend_on_the_heads_trained_beside_it(load_model, samples):
    model = load_model("llama")
    many = fl.train_focus_directions(model, samples[3:], [(0, 1), (1, 2), (2, 0)], epochs=2, max_new_tokens=2)
    alone = fl.train_focus_directions(model, samples[3:], [(1, 2)], epochs=2, max_new_tokens=2)
    torch.testing.assert_close(many.select([(1, 2)]).query, alone.query, atol=1e-6, rtol=0)


def test_training_uses_the_room_that_the_context_leaves(load_model, samples):
    length = len(load_model("llama").encode(samples[0].prompt()).tokens)
    tight = load_model("llama", n_ctx=length + 2)
    tight = fl.FocusModel(tight.hooked, tight.tokenizer, stop_strings=(), stop_tokens=())
    fl.train_focus_directions(tight, samples[:1], [(1, 2)], epochs=1, max_new_tokens=50)
    full = load_model("llama", n_ctx=length)
    with pytest.raises(ValueError, match=r"the long prompt of sample q0@2 leaves no room for a response"):
        fl.train_focus_directions(full, samples[:1], [(1, 2)], epochs=1)


@needs_hooked
def test_ungrouped_keys_are_refused(load_model, samples):
    model = load_model("llama", "hooked")
    directions = fl.FocusDirections([(1, 2)], torch.ones(1, 16), torch.ones(1, 16), "projection")
    model.hooked.set_ungroup_grouped_query_attention(True)
    try:
        for call in (
            lambda: model.generate("river"),
            lambda: model.logits("river", [fl.FocusSteering(directions, 1.0)]),
            lambda: fl.FocusSteering(directions, 1.0).hooks(model),
        ):
            with pytest.raises(ValueError, match=r"set_ungroup_grouped_query_attention\(False\)"):
                call()
    finally:
        model.hooked.set_ungroup_grouped_query_attention(False)


@needs_hooked
def test_a_users_own_attention_is_used_and_stays(load_model, samples):
    model = load_model("llama", "hooked")
    layer, calls = model.hooked.blocks[1].attn, []
    original = layer.forward
    layer.forward = lambda *args, **kwargs: calls.append(1) or original(*args, **kwargs)
    try:
        model.logits(samples[0].prompt())
        assert calls == [1]
        assert "forward" in vars(layer)
    finally:
        del layer.forward


def test_hooks_on_something_else_than_their_prompt_say_so(load_model, backend, samples):
    """Hooks raise an error on inputs other than their prompt: a prompt without the chat template, and two prompts."""
    model, prompt = load_model("qwen3", backend), samples[0].prompt()
    tokens = model.to_tokens(prompt)
    split = fl.SplitSoftmax([(1, 2)], 0.1).hooks(model, prompt)
    focus = fl.FocusSteering(fl.FocusDirections([(1, 2)], torch.ones(1, 24)), 1.0, positions="response")
    for hooks in (split, focus.hooks(model, prompt)):
        with pytest.raises(ValueError, match="these hooks are for a prompt of"):
            model.hooked.run_with_hooks(tokens[:, 7:], fwd_hooks=hooks)
        with pytest.raises(ValueError, match=r"these hooks are for 1 prompt\(s\), and the pass has 2"):
            model.hooked.run_with_hooks(tokens.repeat(2, 1), fwd_hooks=hooks)


def test_a_prefix_that_holds_its_last_token_is_not_steered(load_model, backend, samples):
    model = load_model("llama", backend)
    prefix = model.prefill(samples[0].prompt(), hold_last=True)
    with pytest.raises(ValueError, match="an intervention changes the prompt's own rows"):
        model.decode(prefix, [fl.HeadAblation([(1, 2)])])


def test_one_prompt_is_not_taken_for_its_characters(load_model):
    with pytest.raises(TypeError, match=r"prompts is one string; give a list of prompts"):
        fl.mean_head_outputs(load_model("llama"), "river", [(0, 0)])


def test_answers_that_match_everything_are_refused_before_anything_runs(load_model, samples):
    sample = fl.MultiDocSample("who?", ("The",), samples[0].documents, 0)
    model = load_model("llama")
    for call in (fl.evaluate, fl.contextual_scores):
        with pytest.raises(ValueError, match="the answer 'The' is empty after normalisation"):
            call(model, [sample])
