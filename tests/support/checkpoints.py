"""Tiny random checkpoints in Hugging Face format, and samples to run them on. Tests build both and download nothing.

The random weights must expose a loader that forgets anything. Initial values are therefore large enough for attention
to be far from flat, biases are nonzero, and norm weights differ from one.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

if TYPE_CHECKING:
    from focuslens import MultiDocSample

__all__ = ["CHATML", "CHECKPOINTS", "OWN_BOS_TEMPLATE", "WINDOW", "build_checkpoint", "multidoc_samples"]

VOCABULARY = 500
"""Size of the tokenizer's vocabulary, including special tokens."""

WINDOW = 24
"""Sliding window of ``mistral_window``, shorter than any prompt of :func:`multidoc_samples`."""

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""A chat template in the style of Qwen, without a BOS token."""

OWN_BOS_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '[' + message['role'] + ']\n' + (message['content'] | trim) }}\n"
    "{% endfor %}{% if add_generation_prompt %}{{ '[assistant]\n' }}{% endif %}"
)
"""A chat template in the style of Llama 3, which writes the BOS token itself and strips the message."""

_WORDS = [
    "river",
    "stone",
    "lantern",
    "harbour",
    "copper",
    "meadow",
    "winter",
    "garden",
    "bridge",
    "tower",
    "market",
    "silver",
    "forest",
    "island",
    "castle",
    "wagon",
    "baker",
    "painter",
    "sailor",
    "teacher",
    "farmer",
    "doctor",
    "queen",
    "café",
    "naïve",
    "über",
    "señor",
    "Zoë",
]


def _words(rng: random.Random, least: int, most: int) -> str:
    return " ".join(rng.choice(_WORDS) for _ in range(rng.randint(least, most)))


def multidoc_samples() -> list[MultiDocSample]:
    """Four samples: three of 6 documents with the gold document in the middle, first or last, and one of 4."""
    from focuslens import Document, MultiDocSample

    rng = random.Random(7)
    samples: list[MultiDocSample] = []
    for number, (documents, gold) in enumerate(((6, 2), (6, 0), (6, 5), (4, 1))):
        texts = [
            Document(title=_words(rng, 1, 3).title(), text=f"{_words(rng, 3, 9).capitalize()} {rng.randint(2, 999)}.")
            for _ in range(documents)
        ]
        samples.append(
            MultiDocSample(
                question=f"where is the {_words(rng, 1, 4)}?",
                answers=(_words(rng, 1, 2),),
                documents=tuple(texts),
                gold_index=gold,
                question_id=f"q{number}",
            )
        )
    return samples


def _tokenizer(*, bos: bool, chat_template: str | None, extra: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on the samples' prompts, so that tokens span words and brackets."""
    specials = ["<s>", "</s>", "<pad>", *extra]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=specials, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator([str(sample.prompt("long")) for sample in multidoc_samples()], trainer)
    steps: list[Any] = [processors.ByteLevel(trim_offsets=False)]
    if bos:
        steps.append(processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)]))
    tokenizer.post_processor = processors.Sequence(steps)  # type: ignore[assignment]
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>" if bos else None,
        eos_token="</s>",
        pad_token="<pad>",
        clean_up_tokenization_spaces=False,
        additional_special_tokens=list(extra),
    )
    fast.chat_template = chat_template
    return fast


_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}

_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}


def _llama(**settings: Any) -> Any:
    options: dict[str, Any] = {**_SIZES, **settings}
    return LlamaForCausalLM(LlamaConfig(**options))


def _mistral(**settings: Any) -> Any:
    options: dict[str, Any] = {**_SIZES, **settings}
    return MistralForCausalLM(MistralConfig(**options))


def _qwen2(**settings: Any) -> Any:
    everything: dict[str, Any] = {**_SIZES, "bos_token_id": None, **settings}
    return Qwen2ForCausalLM(Qwen2Config(**everything))


def _qwen3(**settings: Any) -> Any:
    everything: dict[str, Any] = {**_SIZES, "bos_token_id": None, "head_dim": 24, **settings}
    return Qwen3ForCausalLM(Qwen3Config(**everything))


CHECKPOINTS: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "llama": (_llama, {"bos": True, "chat_template": None}),
    "llama_bias": (lambda: _llama(attention_bias=True), {"bos": True, "chat_template": None}),
    "llama_rope": (lambda: _llama(rope_parameters=_LLAMA3), {"bos": True, "chat_template": None}),
    "llama_linear": (lambda: _llama(rope_parameters=_LINEAR), {"bos": True, "chat_template": None}),
    "llama_tied": (lambda: _llama(tie_word_embeddings=True), {"bos": True, "chat_template": None}),
    "llama_mha": (lambda: _llama(num_key_value_heads=4), {"bos": True, "chat_template": None}),
    "llama_chat": (_llama, {"bos": True, "chat_template": OWN_BOS_TEMPLATE}),
    "qwen2": (_qwen2, {"bos": False, "chat_template": CHATML, "extra": ("<|im_start|>", "<|im_end|>")}),
    "qwen2_window": (
        lambda: _qwen2(use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1),
        {"bos": False, "chat_template": None},
    ),
    "qwen3": (_qwen3, {"bos": False, "chat_template": CHATML, "extra": ("<|im_start|>", "<|im_end|>")}),
    "mistral": (lambda: _mistral(sliding_window=None), {"bos": True, "chat_template": None}),
    "mistral_window": (lambda: _mistral(sliding_window=WINDOW), {"bos": True, "chat_template": None}),
}
"""Checkpoint name to a function that builds the model and the tokenizer's settings.

All models have 3 layers, 4 query heads, 2 key-value heads (``llama_mha``: 4) and 1,024 positions. They differ in:

- ``qwen2``, ``qwen3``: a chat template and no BOS token. ``qwen3`` has a ``head_dim`` of 24 instead of 64 / 4.
- ``llama_chat``: a chat template that writes the BOS token itself.
- ``llama_rope``: llama3 rotary scaling. ``llama_linear``: linear rotary scaling.
- ``llama_bias``: biases on q, k, v and o.
- ``llama_tied``: an unembedding tied to the embedding.
- ``mistral_window``: a sliding window of :data:`WINDOW` keys in all layers.
- ``qwen2_window``: a sliding window of :data:`WINDOW` keys in all layers except the first.
"""


def build_checkpoint(name: str, directory: Path) -> Path:
    """Write the checkpoint called ``name`` in :data:`CHECKPOINTS` to a directory."""
    make, tokenizer = CHECKPOINTS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11 + list(CHECKPOINTS).index(name))
        model = make()
        with torch.no_grad():
            for parameter, values in model.named_parameters():
                if parameter.endswith("bias"):
                    values.normal_(0, 0.5)
                elif parameter.endswith(("q_norm.weight", "k_norm.weight")):
                    values.normal_(1.5, 0.3)
                elif parameter.endswith("norm.weight"):
                    values.normal_(1, 0.2)
    model.save_pretrained(directory)
    cast("Any", _tokenizer(**tokenizer)).save_pretrained(directory)
    return directory
