"""SmolLM2-135M-Instruct against its original tokenizer and against Hugging Face's attention.

Unlike the tiny checkpoints of the other tests, this model was trained: it has 30 layers, 9 heads on 3 key-value heads,
logits with a standard deviation of about 8, and sinks that receive most of the attention. ``FOCUSLENS_REAL_MODELS``
names the folder for the download.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor

import focuslens as fl
from focuslens.model import engine
from tests.support.hard_text import HARD_PAGE
from tests.support.real_models import digit_splitting_tokenizer, gguf_model, prompt_of_length
from tests.support.reference import (
    Edits,
    ReferenceModel,
    add_to_rows,
    document_ranges,
    gap,
    prompt_text,
    scores_of_rows,
    split_softmax_rows,
    tokens_of_ranges,
)

pytestmark = [pytest.mark.download, pytest.mark.slow]

NAME = "smollm2-135m-instruct"
END = 2
"""Token that ends a response, ``<|im_end|>``."""

LOGITS, SCORES = 1e-3, 1e-4
"""Tolerances. Logits reach 40, and differences of 1e-4 are measured on both backends.

Sums in another order change float32 logits of this size by about that much after 30 layers. ``HookedTransformer`` also
computes its rotary tables in another way. Contextual scores are sums of attention weights between 0 and 1.
"""

HEADS = [(0, 4), (3, 8), (7, 0), (12, 3), (12, 5), (18, 1), (23, 6), (29, 2)]
"""Heads in all parts of the model. Two of them, in layer 12, share a key-value head."""

TEXTS = {
    "What is the capital of France?": [1780, 314, 260, 3575, 282, 4649, 47],
    "Quelle est la capitale de la France ? Réponds en une phrase.": [
        65, 2726, 290, 1264, 2618, 47765, 1121, 367, 2618, 4649, 9148, 428, 2756, 96, 19870, 430, 16520, 8715, 30,
    ],
    "hello world": [28120, 905],
}  # fmt: skip
"""Texts with their tokens, as programs that use the original ``tokenizer.json`` have recorded them."""

SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
SYSTEM_TOKENS = [
    1, 9690, 198, 2683, 359, 253, 5356, 5646, 11173, 3365, 3511, 308, 34519, 28, 7018, 411, 407, 19712, 8182, 2, 198,
]  # fmt: skip


@pytest.fixture(scope="module")
def gguf(real_model) -> Path:
    return real_model(NAME)[0]


@pytest.fixture(scope="module")
def directory(real_model) -> Path:
    return real_model(NAME)[1]


@pytest.fixture(scope="module")
def model(backend, real_model) -> fl.FocusModel:
    return fl.FocusModel.from_pretrained(NAME, backend=backend, device="cpu")


@pytest.fixture(scope="module")
def hf(directory) -> ReferenceModel:
    return ReferenceModel(directory)


@pytest.fixture(scope="module")
def original(gguf) -> Tokenizer:
    return digit_splitting_tokenizer(gguf)


@pytest.fixture(scope="module")
def short() -> fl.MultiDocSample:
    """Sample with a prompt of about 300 tokens."""
    return fl.load_synthetic(1, num_documents=4)[0]


@pytest.fixture
def attention_rows(monkeypatch) -> dict[str, list[int]]:
    """Numbers of rows in calls of the fused kernel and of the engine's explicit attention."""
    rows: dict[str, list[int]] = {"fused": [], "explicit": []}
    fused, explicit = torch.nn.functional.scaled_dot_product_attention, engine.attend_explicitly

    def count_fused(q: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        rows["fused"].append(q.shape[2])
        return fused(q, *args, **kwargs)

    def count_explicit(q: Tensor, *args: Any) -> Tensor:
        rows["explicit"].append(q.shape[1])
        return explicit(q, *args)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", count_fused)
    monkeypatch.setattr(engine, "attend_explicitly", count_explicit)
    return rows


def vectors(seed: int) -> Tensor:
    """One vector per head with a norm of about 8. The norms of this model's queries and keys are about 15."""
    return torch.randn(len(HEADS), 64, generator=torch.Generator().manual_seed(seed))


def by_head(values: Tensor) -> dict[tuple[int, int], Tensor]:
    return dict(zip(HEADS, values, strict=True))


def projection_steering() -> fl.FocusSteering:
    return fl.FocusSteering(fl.FocusDirections(HEADS, vectors(1), vectors(2), site="projection"), 1.0)


# Tokens


def test_tokens_are_those_that_the_original_tokenizer_gave(model):
    for text, tokens in TEXTS.items():
        assert model.tokenizer(text).input_ids == tokens
        assert model.tokenizer.decode(tokens) == text


def test_a_page_of_hard_text_has_the_tokens_of_the_original_rules(original, model):
    for text, tokens in TEXTS.items():
        assert original.encode(text).ids == tokens
    expected = original.encode(HARD_PAGE).ids
    assert model.tokenizer(HARD_PAGE).input_ids == expected
    assert model.tokenizer.decode(expected) == HARD_PAGE


def test_the_page_tells_other_rules_apart(original):
    """The page contains control tokens, and its tokens change with the rule for digits."""
    expected = original.encode(HARD_PAGE).ids
    assert sorted(original.get_added_tokens_decoder()) == list(range(17))
    assert {0, 1, 2, 3, 5, 6, 7, 8, 16} <= set(expected)
    other = Tokenizer.from_str(original.to_str())
    other.pre_tokenizer = ByteLevel(add_prefix_space=False)
    assert other.encode(HARD_PAGE).ids != expected


def test_a_message_is_rendered_by_the_original_chat_template(model):
    question = "What is the capital of France?"
    text = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
    message = [{"role": "user", "content": question}]
    assert model.tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True) == text
    tokens = [*SYSTEM_TOKENS, 1, 4093, 198, *TEXTS[question], END, 198, 1, 520, 9531, 198]
    assert model.encode(question).tokens.tolist() == tokens
    assert model.stop_tokens == (END,)


# Numbers


@pytest.fixture(scope="module")
def file_logits(gguf, hf, short) -> Tensor:
    """Logits ``[pos d_vocab]`` of the short prompt from the model that transformers itself makes of the file."""
    with torch.no_grad():
        return gguf_model(gguf)(hf.ids(prompt_text(short, "long"))[None]).logits[0]


def test_logits_are_those_of_transformers_on_the_file(file_logits, model, short):
    assert len(file_logits) > 250
    assert file_logits.std() > 5
    assert gap(model.logits(short.prompt()), file_logits) < LOGITS


def test_a_greedy_answer_makes_sense(model):
    assert "Paris" in model.generate("What is the capital of France?", max_new_tokens=12).text


@dataclass(frozen=True)
class LongPrompt:
    """Sample with a prompt of about 2,500 tokens, and a response to it.

    Attributes:
        sample: The sample.
        answer: Text of the response.
        lengths: Numbers of tokens of the prompt and of the response.
        rows: Rows of Hugging Face's full patterns from the prompt's last token on, ``[layer head row key]``.
    """

    sample: fl.MultiDocSample
    answer: str
    lengths: tuple[int, int]
    rows: Tensor


@pytest.fixture(scope="module")
def long(hf) -> LongPrompt:
    sample = prompt_of_length(17)
    prompt, answer = hf.ids(prompt_text(sample, "long")), f"The answer is {sample.answers[0]}."
    response = torch.tensor(hf.tokenizer(answer).input_ids)
    rows = hf.pattern_rows(torch.cat((prompt, response)), len(prompt) - 1)
    return LongPrompt(sample, answer, (len(prompt), len(response)), rows)


def test_contextual_scores_at_2500_tokens_are_those_of_full_patterns(model, hf, long, attention_rows):
    n_prompt, n_response = long.lengths
    assert 2000 < n_prompt < 3500
    assert long.rows.shape == (30, 9, n_response + 1, n_prompt + n_response)
    expected = scores_of_rows(hf, long.sample, "long", long.rows[:, :, 1:])
    scores = fl.contextual_scores(model, [long.sample], responses=[long.answer])
    # The prompt ran through the kernel once, except in the last layer, whose output is not needed. Explicit attention
    # computed the rows of the response once, and fewer at a time otherwise: of the prompt's last token, and of the four
    # tokens with which a model's hook points are tried first.
    assert sum(attention_rows["fused"]) == 29 * (n_prompt - 1)
    assert max(attention_rows["explicit"]) == n_response
    assert attention_rows["explicit"].count(n_response) == 30
    for kind, values in expected.items():
        assert gap(getattr(scores, kind)[0], values) < SCORES, kind
        assert values.max() > 100 * SCORES, kind
    shifted = scores_of_rows(hf, long.sample, "long", long.rows[:, :, :-1])
    assert gap(scores.relevant[0], shifted["relevant"]) > 10 * SCORES


@pytest.mark.parametrize("tau", [0.1, 1000])
def test_split_softmax_is_that_of_edited_rows(tau, model, hf, short):
    text = prompt_text(short, "long")
    prompt = hf.ids(text)
    tokens = torch.cat((prompt, torch.tensor([504, 3575, 282])))
    relevant = tokens_of_ranges(hf.offsets(text), document_ranges(short, hf.text(text))[short.gold_index])
    edits = Edits(pattern=split_softmax_rows(HEADS, tau, relevant, len(prompt) - 1))
    expected = hf.logits(tokens, edits)
    actual = model.logits(tokens, [fl.SplitSoftmax(HEADS, tau)], prompt=short.prompt())
    assert gap(actual, expected) < LOGITS
    assert gap(expected, hf.logits(tokens)) > 100 * LOGITS


def test_rotary_steering_is_that_of_patched_attention(model, hf, short):
    tokens = hf.ids(prompt_text(short, "long"))
    expected = hf.logits(tokens, Edits(query=add_to_rows(by_head(vectors(1)), 1.0)))
    steering = fl.FocusSteering(fl.FocusDirections(HEADS, vectors(1)), 1.0)
    assert gap(model.logits(tokens, [steering]), expected) < LOGITS
    assert gap(expected, hf.logits(tokens)) > 100 * LOGITS


def test_projection_steering_is_that_of_biases(model, hf, short):
    """Heads of one key-value head share the mean of their key vectors."""
    tokens = hf.ids(prompt_text(short, "long"))
    by_group: dict[tuple[int, int], list[Tensor]] = {}
    for (layer, head), vector in by_head(vectors(2)).items():
        by_group.setdefault((layer, head // 3), []).append(vector)
    assert len(by_group) == len(HEADS) - 1
    keys = {place: torch.stack(group).mean(dim=0) for place, group in by_group.items()}
    with hf.biased({"q_proj": by_head(vectors(1)), "k_proj": keys}):
        expected = hf.logits(tokens)
    with hf.biased({"q_proj": by_head(vectors(1))}):
        without_keys = hf.logits(tokens)
    assert gap(model.logits(tokens, [projection_steering()]), expected) < LOGITS
    assert gap(expected, hf.logits(tokens)) > 100 * LOGITS
    assert gap(expected, without_keys) > 100 * LOGITS


@pytest.fixture(scope="module")
def folded(directory, tmp_path_factory) -> Iterator[ReferenceModel]:
    """The checkpoint with the directions folded into it, in plain transformers."""
    out = fl.fold(directory, projection_steering(), tmp_path_factory.mktemp("folded") / "model").directory
    yield ReferenceModel(out)
    shutil.rmtree(out)


def test_the_folded_checkpoint_gives_the_steered_answers(model, hf, folded, short):
    prompts = [hf.ids(prompt_text(short, case)) for case in ("long", "gold", "negative")]
    answers = model.generate(
        [short.prompt(case) for case in ("long", "gold", "negative")], [projection_steering()], max_new_tokens=20
    )
    expected = [folded.generate(prompt, 20, stop=(END,)) for prompt in prompts]
    assert [answer.tokens.tolist() for answer in answers] == expected
    plain = [hf.generate(prompt, 20, stop=(END,)) for prompt in prompts]
    assert all(a != b for a, b in zip(expected, plain, strict=True))
