"""Defects that a review found: near the context limit, in half precision, and in which heads a command takes."""

from __future__ import annotations

import argparse
import json

import pytest
import torch

import focuslens as fl
from focuslens.cli import main
from focuslens.commands import common


def test_a_short_prompt_has_the_same_room_in_a_batch_as_alone(load_model, backend):
    model = load_model("llama", backend, n_ctx=64)
    model = fl.FocusModel(model.hooked, model.tokenizer, stop_tokens=())
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
    assert torch.equal(model.logits(prompt, [fl.SplitSoftmax(heads, tau=1)]), model.logits(prompt))
    assert not torch.equal(model.logits(prompt, [fl.SplitSoftmax(heads, tau=0.1)]), model.logits(prompt))


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


@pytest.mark.parametrize("split", [None, "test"])
def test_heads_are_ranked_on_the_training_half_whatever_is_evaluated(split, load_model, monkeypatch):
    asked = []

    def stop(args, model, side):
        asked.append(args.split or side)
        raise KeyboardInterrupt

    monkeypatch.setattr(common, "open_samples", stop)
    with pytest.raises(KeyboardInterrupt):
        common.get_ranking(argparse.Namespace(heads=None, split=split), load_model("llama"))
    assert asked == ["train"]


@pytest.mark.parametrize("split", ["train", "all"])
def test_heads_are_not_ranked_on_what_is_evaluated(split, load_model):
    with pytest.raises(ValueError, match="--heads"):
        common.get_ranking(argparse.Namespace(heads=None, split=split), load_model("llama"))


def test_steering_without_a_ranking_takes_the_best_heads_not_the_first_of_the_file(checkpoint, tmp_path, monkeypatch):
    directory = checkpoint("llama")
    heads = [fl.Head(layer, head) for layer in range(3) for head in range(4)]
    fl.FocusDirections(heads, torch.ones(12, 16)).save(tmp_path / "directions")
    best = [fl.Head(2, 1), fl.Head(0, 3)]
    ranking = best + [head for head in heads if head not in best]
    monkeypatch.setattr("focuslens.commands.sweeps.get_ranking", lambda args, model: (ranking, "made up"))
    options = ["--model", str(directory), "--samples", "1", "--max-new-tokens", "2", "--documents", "4"]
    options += ["--n-ctx", "4096", "--directions", str(tmp_path / "directions"), "--alpha", "1", "--k", "2,99"]
    assert main(["steer", *options, "--out", str(tmp_path / "out")]) == 0
    assert json.loads((tmp_path / "out" / "steering.json").read_text())["heads"] == [[2, 1], [0, 3]]
    assert main(["steer", *options[:-1], "99", "--out", str(tmp_path / "other")]) == 1
