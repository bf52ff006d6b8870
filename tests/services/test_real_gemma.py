"""Gemma 3 270M, with a SentencePiece vocabulary and windows of 512 tokens, against transformers on its GGUF file.

transformers rebuilds this vocabulary correctly, unlike that of SmolLM2. These tests are about the conversion: tokens,
configuration and weights. The parity tests of families compare the attention of Gemma 3 with Hugging Face's.
``FOCUSLENS_REAL_MODELS`` names the folder for the download.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from transformers import AutoTokenizer

import focuslens as fl
from tests.support.hard_text import HARD_PAGE
from tests.support.real_models import gguf_model, prompt_of_length
from tests.support.reference import gap

pytestmark = [pytest.mark.download, pytest.mark.slow]

NAME = "gemma-3-270m"
FULL, WINDOW = (5, 11, 17), 512
"""Layers whose heads see all tokens, and the number of tokens that the heads of other layers see."""


@pytest.fixture(scope="module")
def gguf(real_model) -> Path:
    return real_model(NAME)[0]


@pytest.fixture(scope="module")
def model(real_model) -> fl.FocusModel:
    return fl.FocusModel.from_pretrained(NAME, device="cpu")


@pytest.fixture(scope="module")
def prompt() -> str:
    """Prompt of more than 512 tokens."""
    return str(prompt_of_length(6).prompt())


def test_a_page_of_hard_text_has_the_tokens_of_transformers(gguf, model):
    original = cast("Any", AutoTokenizer).from_pretrained(gguf.parent, gguf_file=gguf.name)
    expected = original(HARD_PAGE).input_ids
    assert model.tokenizer(HARD_PAGE).input_ids == expected
    assert expected[0] == 2
    # Like every SentencePiece vocabulary, this one has one token for a space and for the sign that stands for it.
    assert model.tokenizer.decode(expected[1:]) == HARD_PAGE.replace("▁", " ")


def test_logits_are_those_of_transformers_on_the_file(gguf, model, prompt):
    tokens = model.encode(prompt).tokens
    # Every fourth row: with a vocabulary of 262,144 tokens, all rows would take 1 GB.
    rows = torch.arange(3, len(tokens), 4)
    with torch.no_grad():
        expected = gguf_model(gguf)(tokens[None], logits_to_keep=rows).logits[0]
    assert len(tokens) > WINDOW + 100
    # Logits reach 30 or so, and 1.4e-4 is measured: float32 sums in another order.
    assert gap(model.logits(tokens)[rows], expected) < 1e-3


def test_three_layers_see_everything_and_the_others_512_tokens(model, prompt):
    layers = range(18)
    assert [model.backend.window(layer) for layer in layers] == [None if i in FULL else WINDOW for i in layers]
    heads = [fl.Head(layer, head) for layer in layers for head in range(4)]
    attention = fl.response_attention(model, prompt, heads, response="a short response")
    tokens = model.encode(prompt).tokens
    for head, rows in zip(heads, attention.rows, strict=True):
        for i, row in enumerate(rows):
            first = len(tokens) + i - WINDOW + 1
            assert (row[:first].max() > 0) == (head.layer in FULL), (head, i)
            assert row[first] > 0, (head, i)
