"""Small tokenizers with the rules, control tokens and chat templates of several families of models.

The vocabularies are trained on a few sentences. The rules are those of the families: byte-level BPE (Llama 3, Qwen and
SmolLM), BPE over characters with a fallback to bytes and spaces as ``▁`` (Gemma), the same with a space before the
first word (Mistral, and Phi-3, whose control tokens also take the white space after them).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

__all__ = ["FAMILIES", "family_tokenizer"]

_SENTENCES = [
    "Write a high-quality answer for the given question using only the provided search results",
    "Document [1](Title: The bridge) The bridge over the harbour was opened in March 1932.",
    "Question: when was the bridge opened?\nAnswer: system user assistant model end start of turn",
]

LLAMA3 = (
    "{{- bos_token }}{%- for message in messages %}{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>' "
    "+ '\n\n' + message['content'] | trim + '<|eot_id|>' }}{%- endfor %}{%- if add_generation_prompt %}"
    "{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
)
CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{%- if messages[0]['role'] == 'system' -%}{%- set first = messages[0]['content'] + '\n\n' -%}"
    "{%- set loop_messages = messages[1:] -%}{%- else -%}{%- set first = '' -%}{%- set loop_messages = messages -%}"
    "{%- endif -%}{%- for message in loop_messages -%}"
    "{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{%- endif -%}"
    "{%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}"
    "{{ '<start_of_turn>' + role + '\n' + (first if loop.first else '') }}{{ message['content'] | trim }}"
    "{{ '<end_of_turn>\n' }}{%- endfor -%}{%- if add_generation_prompt -%}{{'<start_of_turn>model\n'}}{%- endif -%}"
)
MISTRAL = (
    "{%- if messages[0]['role'] == 'system' %}{%- set system = messages[0]['content'] %}"
    "{%- set loop_messages = messages[1:] %}{%- else %}{%- set loop_messages = messages %}{%- endif %}{{- bos_token }}"
    "{%- for message in loop_messages %}{%- if message['role'] == 'user' %}{%- if loop.last and system is defined %}"
    "{{- '[INST] ' + system + '\n\n' + message['content'] + '[/INST]' }}{%- else %}"
    "{{- '[INST] ' + message['content'] + '[/INST]' }}{%- endif %}{%- else %}"
    "{{- ' ' + message['content'] + eos_token }}{%- endif %}{%- endfor %}"
)
PHI3 = (
    "{% for message in messages %}{{'<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)


def _byte_level(specials: list[AddedToken], bos: str | None) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    pattern = Regex(r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # type: ignore[assignment]
        [
            pre_tokenizers.Split(pattern, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(_SENTENCES, trainer)
    tokenizer.add_special_tokens(specials)  # as in these families, they are in no vocabulary of the model
    return _beginning(tokenizer, bos)


def _with_spaces(specials: list[AddedToken], bos: str | None, *, first: bool) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if first:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)  # type: ignore[assignment]
    else:
        tokenizer.normalizer = normalizers.Replace(" ", "▁")  # type: ignore[assignment]
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", behavior="merged_with_previous")  # type: ignore[assignment]
    tokenizer.decoder = decoders.Sequence(  # type: ignore[assignment]
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    # As in these families, control tokens and bytes are in the vocabulary of the model.
    names = ["<unk>", *(str(token.content) for token in specials), *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=names, show_progress=False)
    words = [part.replace(" ", "▁") for text in _SENTENCES for part in text.split("\n")]
    plain = Tokenizer(models.BPE(unk_token="<unk>"))
    plain.train_from_iterator(words, trainer)
    rules: dict[str, Any] = json.loads(plain.to_str())
    tokenizer.model = models.BPE(
        vocab=rules["model"]["vocab"],
        merges=[tuple(pair) for pair in rules["model"]["merges"]],
        unk_token="<unk>",
        byte_fallback=True,
        fuse_unk=True,
    )
    tokenizer.add_special_tokens([AddedToken("<unk>", special=True), *specials])
    return _beginning(tokenizer, bos)


def _beginning(tokenizer: Tokenizer, bos: str | None) -> Tokenizer:
    if bos is not None:
        tokenizer.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    return tokenizer


def _tokens(*names: str, **rules: bool) -> list[AddedToken]:
    return [AddedToken(name, special=True, normalized=False, **rules) for name in names]


FAMILIES: dict[str, tuple[Callable[[], Tokenizer], str, dict[str, str | None]]] = {
    "llama3": (
        lambda: _byte_level(
            _tokens("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
            "<|begin_of_text|>",
        ),
        LLAMA3,
        {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
    ),
    "chatml": (
        # Qwen3 and SmolLM3 add the tokens of thinking as tokens that are not special.
        lambda: _with_thinking(_byte_level(_tokens("<|endoftext|>", "<|im_start|>", "<|im_end|>"), None)),
        CHATML,
        {"bos_token": None, "eos_token": "<|im_end|>"},
    ),
    "gemma": (
        lambda: _with_spaces(
            _tokens("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"), "<bos>", first=False
        ),
        GEMMA,
        {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"},
    ),
    "mistral": (
        lambda: _with_spaces(_tokens("<s>", "</s>", "[INST]", "[/INST]"), "<s>", first=True),
        MISTRAL,
        {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    ),
    "phi3": (
        lambda: _with_spaces(
            [
                *_tokens("<s>", "</s>"),
                *_tokens("<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>", rstrip=True),
            ],
            None,
            first=True,
        ),
        PHI3,
        {"bos_token": "<s>", "eos_token": "<|endoftext|>", "unk_token": "<unk>"},
    ),
}
"""Families of tokenizers: the tokenizer's maker, its chat template, and the names of its special tokens."""


def _with_thinking(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.add_tokens([AddedToken("<think>", normalized=False), AddedToken("</think>", normalized=False)])
    return tokenizer


def family_tokenizer(name: str, *, chat: bool = True) -> PreTrainedTokenizerFast:
    """A small tokenizer of a family, with or without its chat template."""
    make, template, special = FAMILIES[name]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=make(), clean_up_tokenization_spaces=False, **special)
    tokenizer.chat_template = template if chat else None
    return tokenizer
