"""Responses that one already has: their forms, and the errors for other values."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import focuslens as fl
from focuslens.scores.given_responses import given_responses, response_text, response_tokens


def test_forms_of_responses_become_texts_or_token_ids(tiny_model: fl.FocusModel, samples: list[fl.MultiDocSample]):
    generation = fl.Generation("x", torch.tensor([5, 6]), True)
    given: Any = ["a text", generation, torch.tensor([[7, 8]]), [9]]
    assert given_responses(given, samples, tiny_model) == ("a text", (5, 6), (7, 8), (9,))
    by_id = {sample.id: one for sample, one in reversed(list(zip(samples, given, strict=True)))}
    assert given_responses(by_id, samples, tiny_model) == ("a text", (5, 6), (7, 8), (9,))


def test_token_ids_end_at_the_first_stop_token(tiny_model: fl.FocusModel, samples: list[fl.MultiDocSample]):
    prompt, stop = tiny_model.encode(samples[0].prompt()), tiny_model.stop_tokens[0]
    assert response_tokens(tiny_model, prompt, (40, 50, stop, 60)).tolist() == [40, 50]
    assert response_text(tiny_model, (40, 50, stop, 60)) == response_text(tiny_model, (40, 50))
    assert response_tokens(tiny_model, prompt, (stop,)).tolist() == []
    assert response_tokens(tiny_model, prompt, " \n").tolist() == []


@pytest.mark.parametrize(
    ("responses", "kind", "message"),
    [
        ("a", TypeError, "responses is 'a', a str; it must be a list with one response per sample"),
        (5, TypeError, "responses is 5, a int"),
        (["a"], ValueError, "there are 1 responses for 4 samples; give one per sample"),
        (
            ["a", None, "b", "c"],
            TypeError,
            r"responses\[1\] is None, a NoneType; it must be a text, token ids or a Gen",
        ),
        ([1, 2, 3, 4], TypeError, r"responses\[0\] is 1, a int; it must be a text"),
        (["a", [1, 500], "b", "c"], ValueError, r"responses\[1\] has the token id 500; the model's vocabulary has"),
        (["a", [1.5], "b", "c"], TypeError, r"responses\[1\]\[0\] is 1.5, a float; it must be an integer"),
        (["a", torch.zeros(2, 2), "b", "c"], ValueError, r"responses\[1\] is a tensor of the shape \(2, 2\)"),
        (
            {"q0@2": "a"},
            ValueError,
            "3 of 4 samples have no response, such as 'q1@0'; the responses have the ids 'q0@2'",
        ),
        (
            {"q0@2": "a", "q1@0": "a", "q2@5": "a", "q3@1": "a", "q9": "b"},
            ValueError,
            "1 responses have ids of no sample, such as 'q9'; the samples have the ids 'q0@2', 'q1@0', 'q2@5' and 1 m",
        ),
    ],
)
def test_other_values_are_refused(
    responses: Any, kind: type[Exception], message: str, load_model: Any, samples: Any, unchecked: None
):
    with pytest.raises(kind, match=message):
        fl.document_scores(load_model("llama"), samples, responses=responses)


def test_a_window_and_rows_refuse_an_empty_response(tiny_model: fl.FocusModel, samples: Any):
    with pytest.raises(ValueError, match="the response is empty"):
        fl.response_attention(tiny_model, samples[0].prompt(), [(0, 0)], response=[tiny_model.stop_tokens[0], 5])
