"""Chat templates that would lose the prompt: read as parts, or refused."""

from __future__ import annotations

from typing import Any

import pytest

import focuslens as fl
from focuslens.prompts.encoder import PromptEncoder
from tests.support.checkpoints import CHATML

PARTS = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% for part in m['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SYSTEM_FIRST = (
    "{% if messages[0]['role'] != 'system' %}{{ raise_exception('a system message first') }}{% endif %}" + CHATML
)


@pytest.fixture
def tokenizer(load_model: Any) -> Any:
    tokenizer = load_model("qwen2", "bridge").tokenizer
    template = tokenizer.chat_template
    yield tokenizer
    tokenizer.chat_template = template


def test_a_template_that_reads_parts_gets_the_prompt_as_one_part(tokenizer: Any, samples: Any) -> None:
    tokenizer.chat_template = CHATML
    plain = PromptEncoder(tokenizer, True)
    prompt = samples[0].prompt()
    expected = plain.encode(prompt)
    tokenizer.chat_template = PARTS
    encoded = PromptEncoder(tokenizer, True).encode(prompt)
    assert encoded.text == expected.text
    assert encoded.spans == expected.spans
    assert encoded.tokens.tolist() == expected.tokens.tolist()


@pytest.mark.parametrize("template", ["{{ 'nothing of it' }}", "{% for m in messages %}{{ m['role'] }}{% endfor %}"])
def test_a_template_that_drops_the_prompt_is_refused(tokenizer: Any, template: str) -> None:
    tokenizer.chat_template = template
    encoder = PromptEncoder(tokenizer, True)
    for prompt in ("who opened the bridge?", fl.Prompt("who", {"x": [(0, 3)]})):
        with pytest.raises(ValueError, match=r"the chat template writes nothing of a user's message.* use chat=False"):
            encoder.encode(prompt)


def test_a_template_that_changes_the_text_is_refused_without_spans_too(tokenizer: Any) -> None:
    tokenizer.chat_template = CHATML.replace("message['content']", "(message['content'] | upper)")
    with pytest.raises(ValueError, match="the chat template changes the prompt's text"):
        PromptEncoder(tokenizer, True).encode("who opened the bridge?")


def test_a_template_that_refuses_the_message_is_quoted(tokenizer: Any) -> None:
    tokenizer.chat_template = SYSTEM_FIRST
    with pytest.raises(
        ValueError, match=r"refuses a single message of the user \(a system message first\); use chat=Fal"
    ):
        PromptEncoder(tokenizer, True).encode("who?")


def test_a_template_that_writes_the_message_twice_is_refused_for_spans(tokenizer: Any) -> None:
    tokenizer.chat_template = CHATML.replace("message['content']", "message['content'] + message['content']")
    assert tokenizer.chat_template != CHATML
    encoder = PromptEncoder(tokenizer, True)
    encoder.encode("who opened the bridge?")
    with pytest.raises(ValueError, match="writes a user's message more than once"):
        encoder.encode(fl.Prompt("who opened the bridge?", {"x": [(0, 3)]}))
