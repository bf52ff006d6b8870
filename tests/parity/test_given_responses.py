"""Scores of responses that one already has equal those of the generation and those of Hugging Face's patterns."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import focuslens as fl
from focuslens import FocusModel
from tests.support.reference import ReferenceModel, document_ranges, gap, prompt_text, tokens_of_ranges

NAMES = ("llama", "llama_chat", "qwen2", "mistral_window")
TOLERANCE = 1e-4
"""See ``test_scores.py``."""
ROUNDING = 2e-5
"""Difference between one pass over a response and one pass per token."""


def stopped_model(loaded: FocusModel, hf: ReferenceModel, samples: Any) -> tuple[FocusModel, list[list[int]]]:
    """A model whose responses have unequal lengths, one of them none, and their tokens from Hugging Face."""
    prompts = [hf.ids(prompt_text(sample, "long")) for sample in samples]
    free = [hf.generate(ids, 5) for ids in prompts]
    stop = [free[1][2], free[2][0]]
    responses = [hf.generate(ids, 5, stop=stop) for ids in prompts]
    assert [] in responses
    assert len({len(response) for response in responses}) > 1
    return FocusModel(loaded.hooked, loaded.tokenizer, stop_strings=(), stop_tokens=stop), responses


def by_hand(hf: ReferenceModel, sample: Any, response: torch.Tensor) -> torch.Tensor:
    """Scores ``[layer head document]`` from the whole pattern of Hugging Face's attention."""
    prompt = prompt_text(sample, "long")
    ids, offsets = hf.ids(prompt), hf.offsets(prompt)
    rows = hf.patterns(torch.cat((ids, response)))[:, :, len(ids) :].double()
    ranges = document_ranges(sample, hf.text(prompt))
    tokens = [tokens_of_ranges(offsets, ranges[i]) for i in range(len(sample.documents))]
    return torch.stack([rows[..., places].sum(dim=-1).mean(dim=-1) for places in tokens], dim=-1)


@pytest.mark.parametrize("name", NAMES)
def test_a_generation_that_is_given_has_the_scores_of_generating_it(name, backend, load_model, reference, samples):
    hf = reference(name)
    model, responses = stopped_model(load_model(name, backend), hf, samples)
    expected = fl.document_scores(model, samples, max_new_tokens=5, batch_tokens=600)
    generations = model.generate([sample.prompt() for sample in samples], max_new_tokens=5)
    assert [one.tokens.tolist() for one in generations] == responses
    stop = model.stop_tokens[0]
    forms: list[Any] = [
        generations,
        [one.tokens for one in generations],
        # What another program returns: with the stop token, and with padding up to a common length.
        {
            sample.id: [*ids, stop, *[7] * (6 - len(ids))]
            for sample, ids in reversed(list(zip(samples, responses, strict=True)))
        },
    ]
    for given in forms:
        for batch_tokens in (1, 600):
            scores = fl.document_scores(model, samples, responses=given, batch_tokens=batch_tokens)
            assert scores.responses == expected.responses
            for one, other, response in zip(scores.scores, expected.scores, responses, strict=True):
                if response:
                    assert gap(one, other) < ROUNDING
                else:
                    assert one.isnan().all()
                    assert other.isnan().all()
    for sample, values, response in zip(samples, expected.scores, responses, strict=True):
        if response:
            assert gap(values, by_hand(hf, sample, torch.tensor(response))) < TOLERANCE


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_token_ids_are_not_tokenised_again(name, backend, load_model, reference, samples):
    """Tokens of single bytes, whose text a tokenizer would write with other tokens."""
    model, hf = load_model(name, backend), reference(name)
    text = "The silver lantern"
    split = [token for letter in text for token in hf.tokenizer(letter, add_special_tokens=False)["input_ids"]]
    prompt = model.encode(samples[0].prompt())
    whole = model.encoder.encode_response(prompt, text).tolist()
    assert len(split) > len(whole) + 4
    wanted = by_hand(hf, samples[0], torch.tensor(split))
    (scores,) = fl.document_scores(model, samples[:1], responses=[split]).scores
    (of_text,) = fl.document_scores(model, samples[:1], responses=[text]).scores
    assert gap(scores, wanted) < TOLERANCE
    assert gap(of_text, by_hand(hf, samples[0], torch.tensor(whole))) < TOLERANCE
    assert gap(scores, of_text) > 0.01  # the two would be told apart
    heads = [(2, 1), (0, 3)]
    rows = fl.response_attention(model, prompt, heads, response=split)
    patterns = hf.patterns(torch.cat((prompt.tokens, torch.tensor(split))))
    for row, (layer, head) in zip(rows.rows, heads, strict=True):
        assert gap(row, patterns[layer, head, len(prompt.tokens) :]) < TOLERANCE
    window = fl.window_attention(model, prompt, heads, response=torch.tensor(split))
    (layer, head), places = heads[0], list(window.positions)
    assert gap(window.pattern[0], patterns[layer, head][places][:, places]) < TOLERANCE


def test_other_scores_take_the_same_responses(backend, load_model, reference, samples):
    hf = reference("qwen2")
    model, responses = stopped_model(load_model("qwen2", backend), hf, samples)
    contextual = fl.contextual_scores(model, samples, responses=responses, batch_tokens=600)
    generated = fl.contextual_scores(model, samples, max_new_tokens=5, batch_tokens=600)
    budget = fl.attention_budget(model, samples, responses=responses, batch_tokens=600)
    budget_generated = fl.attention_budget(model, samples, max_new_tokens=5, batch_tokens=600)
    effects = fl.document_effects(model, samples, responses=responses)
    effects_generated = fl.document_effects(model, samples, max_new_tokens=5)
    assert contextual.responses == generated.responses == budget.responses == effects.responses
    answered = [i for i, response in enumerate(responses) if response]
    assert gap(contextual.relevant[answered], generated.relevant[answered]) < ROUNDING
    assert gap(budget.shares[answered], budget_generated.shares[answered]) < ROUNDING
    for i in answered:
        assert gap(effects.effects[i], effects_generated.effects[i]) < 1e-3
    assert effects.n_tokens == tuple(map(len, responses))
