"""Responses that end at stop strings, against ``generate(stop_strings=...)`` of transformers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import pytest
import torch
from transformers import AutoModelForCausalLM

import focuslens as fl
from focuslens.model.stop_strings import ResponseText

if TYPE_CHECKING:
    from collections.abc import Sequence

N = 20


def stop_strings(model: fl.FocusModel, response: fl.Generation, prompt: Any) -> list[str]:
    """Texts in the middle of a response: a whole token, the end of a token, and several tokens from inside the first.

    None of them begins in the white space at the beginning, where transformers would end the response.
    """
    texts = model.encoder.response_texts(model.encode(prompt), response.tokens)
    places = [i for i in range(4, N - 4) if len(texts[i].strip()) > 1 and "\ufffd" not in texts[i] + texts[i + 1]]
    assert places
    place = places[0]
    return [texts[place], texts[place].strip()[-1], texts[place][1:] + texts[place + 1]]


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_tokens_are_those_of_transformers(name: str, backend: str, load_model: Any, checkpoint: Any, samples: Any):
    plain = load_model(name, backend)
    hf: Any = cast("Any", AutoModelForCausalLM).from_pretrained(checkpoint(name))
    n_ended = n_shared = 0
    prompts = [sample.prompt() for sample in samples[:3]]
    responses = plain.generate(prompts, max_new_tokens=N)
    for strings in ([text] for text in stop_strings(plain, responses[0], prompts[0])):
        model = fl.FocusModel(plain.backend, plain.tokenizer, stop_strings=strings)
        for prompt, response in zip(prompts, model.generate(prompts, max_new_tokens=N), strict=True):
            tokens = expected_tokens(hf, model, prompt, strings)
            text = ResponseText(model.tokenizer, strings)
            n_searched = next((n for n, token in enumerate(tokens, start=1) if text.append(token)), None)
            if n_searched is None:
                assert response.tokens.tolist() == [token for token in tokens if token not in model.stop_tokens]
                continue
            # Transformers also ends at the first token with which the text contains a stop string.
            assert n_searched == len(tokens)
            assert response.tokens.tolist() == tokens[: text.length]
            assert response.finished
            assert response.stop is None
            decoded = model.tokenizer.decode(tokens, skip_special_tokens=True)
            assert response.text == decoded[: decoded.index(strings[0])].strip()
            n_ended, n_shared = n_ended + 1, n_shared + (text.length == len(tokens))
    assert n_ended >= 3
    assert n_shared >= 1  # a token with the end of the answer and the stop string


def expected_tokens(hf: Any, model: fl.FocusModel, prompt: Any, strings: Sequence[str]) -> list[int]:
    """Response tokens of transformers, up to the one that completes a stop string."""
    tokens = model.encode(prompt).tokens
    settings: dict[str, Any] = {"max_new_tokens": N, "do_sample": False, "eos_token_id": list(model.stop_tokens)}
    with torch.no_grad():
        ids = hf.generate(tokens[None], stop_strings=list(strings), tokenizer=model.tokenizer, **settings)
    return ids[0, len(tokens) :].tolist()
