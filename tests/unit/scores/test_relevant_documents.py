"""Scores of each of several relevant documents, beside those of all of them together."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import focuslens as fl


def test_the_score_of_all_relevant_documents_is_the_sum_of_their_scores(load_model: Any, samples: Any) -> None:
    model = load_model("llama")
    several = [
        replace(samples[0], gold_index=None, gold_indices=(4, 1)),
        samples[1],
        replace(samples[2], gold_index=None, question_id="none"),
    ]
    scores = fl.document_scores(model, several, max_new_tokens=3)
    together = fl.contextual_scores(model, several, max_new_tokens=3)
    assert scores.responses == together.responses
    each = fl.relevant_scores(scores, several[::-1])
    assert [tuple(one) for one in each] == [(4, 1), (0,), ()]
    torch.testing.assert_close(each[0][4] + each[0][1], together.relevant[0])
    torch.testing.assert_close(each[1][0], together.relevant[1])
    assert together.relevant[2].isnan().all()
    # The attention of a pass over the whole text, summed over the tokens of one document.
    prompt = model.encode(several[0].prompt())
    response = model.encoder.encode_response(prompt, scores.responses[0])
    given = fl.contextual_scores(model, several[:1], responses=scores.responses[:1])
    tokens = torch.cat((prompt.tokens, response))[None]
    _, cache = model.hooked.run_with_cache(tokens)
    start, end = prompt.spans["document"][4]
    first, last = prompt.spans["document"][1]
    n = len(prompt.tokens)
    for layer in range(model.shape.n_layers):
        pattern = cache[f"blocks.{layer}.attn.hook_pattern"][0][:, n:]
        expected = (pattern[..., start:end].sum(-1) + pattern[..., first:last].sum(-1)).mean(-1)
        torch.testing.assert_close(given.relevant[0, layer], expected, atol=1e-5, rtol=1e-4)


def test_scores_of_other_samples_are_refused(load_model: Any, samples: Any) -> None:
    scores = fl.document_scores(load_model("llama"), samples[:1], max_new_tokens=1)
    with pytest.raises(ValueError, match="the scores are those of sample 'q0@2', which is not among the samples"):
        fl.relevant_scores(scores, samples[1:])


def test_outcomes_need_answers_and_attention_does_not(load_model: Any, samples: Any) -> None:
    model, unanswered = load_model("llama"), [replace(samples[0], answers=())]
    assert fl.contextual_scores(model, unanswered, max_new_tokens=1).correct == (False,)
    message = r"sample 'q0@2' has no accepted answers \(1 of 1 samples\), and "
    with pytest.raises(ValueError, match=f"{message}the group 'wrong' compares responses with them"):
        fl.contextual_scores(model, unanswered, "wrong", max_new_tokens=1)
    with pytest.raises(ValueError, match=f"{message}a group of right or wrong answers"):
        fl.contextual_scores_by_case(model, unanswered, max_new_tokens=1)
    with pytest.raises(ValueError, match=f"{message}an evaluation"):
        fl.evaluate(model, unanswered, max_new_tokens=1)
