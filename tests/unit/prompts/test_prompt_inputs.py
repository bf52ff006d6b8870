"""What is handed in as a prompt is taken for what it is, or refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import focuslens as fl

pytestmark = pytest.mark.usefixtures("unchecked")


@pytest.fixture
def model(load_model: Any) -> fl.FocusModel:
    return load_model("qwen2", "bridge")


def test_tokens_are_a_prompt(model: fl.FocusModel) -> None:
    tokens = model.to_tokens("the river")
    expected = model.generate("the river", max_new_tokens=4).tokens.tolist()
    prompts: tuple[Any, ...] = (tokens, tokens[0], tokens[0].tolist(), model.encode("the river"))
    for prompt in prompts:
        assert model.generate(prompt, max_new_tokens=4).tokens.tolist() == expected
        assert model.encode(prompt).tokens.tolist() == tokens[0].tolist()
    mixed: Any = [tokens[0], model.encode("a")]
    both = model.generate(mixed, max_new_tokens=2)
    assert [len(response.tokens) for response in both] == [2, 2]


def test_messages_are_one_prompt(model: fl.FocusModel) -> None:
    turns = [
        {"role": "user", "content": "the river"},
        {"role": "assistant", "content": "stone"},
        {"role": "user", "content": "and the lantern"},
    ]
    encoded = model.encode(turns)
    assert encoded.text == (
        "<|im_start|>user\nthe river<|im_end|>\n<|im_start|>assistant\nstone<|im_end|>\n<|im_start|>user\n"
        "and the lantern<|im_end|>\n<|im_start|>assistant\n"
    )
    assert model.encode(turns[:1]).tokens.tolist() == model.encode("the river").tokens.tolist()
    assert isinstance(model.generate(turns, max_new_tokens=1), fl.Generation)
    plain = fl.FocusModel(model.backend, model.tokenizer, chat=False)
    with pytest.raises(ValueError, match="a list of messages, but prompts are not put into a chat template"):
        plain.encode(turns)


@pytest.mark.parametrize("prompt", [None, 7, 2.5, object(), {"role": "user", "content": "x"}, [], [None], b"bytes"])
def test_everything_else_is_refused(model: fl.FocusModel, prompt: Any) -> None:
    with pytest.raises(
        TypeError, match=r"the prompt is .*; it must be a text, an EncodedPrompt, token ids, or a list of"
    ):
        model.encode(prompt)


@pytest.mark.parametrize(
    "tokens", [torch.zeros(2, 3, dtype=torch.long), torch.zeros(4), torch.zeros(0, dtype=torch.long)]
)
def test_tensors_that_are_no_sequence_of_tokens_are_refused(model: fl.FocusModel, tokens: Any) -> None:
    with pytest.raises(ValueError, match=r"the prompt is a tensor of the shape .*integers \[pos\] or \[1, pos\]"):
        model.encode(tokens)


@pytest.mark.parametrize("tokens", [[-1, 5], [5, 10**6]])
def test_tokens_without_an_embedding_are_refused(model: fl.FocusModel, tokens: list[int]) -> None:
    with pytest.raises(
        ValueError, match=r"the prompt has token ids from .*; the model's vocabulary has the ids 0 to 499"
    ):
        model.generate(tokens, max_new_tokens=1)


def test_numpy_integers_are_tokens(model: fl.FocusModel) -> None:
    tokens: Any = list(np.array([5, 6, 7]))
    assert model.encode(tokens).tokens.tolist() == [5, 6, 7]
