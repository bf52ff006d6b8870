"""Model, prompt and contestants of the benchmarks, whatever they measure."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import focuslens as fl
from focuslens.data.synthetic import build_tokenizer

__all__ = ["DOCUMENTS", "SEED", "SHORTEST", "Bench", "Contestant", "Shape", "generate", "in_memory", "plain_generation"]

SEED = 0
DOCUMENTS, SHORTEST = 20, 90


@dataclass(frozen=True)
class Shape:
    """Sizes of a random Llama."""

    layers: int = 8
    d_model: int = 256
    d_mlp: int = 704
    heads: int = 8
    kv_heads: int = 8


@dataclass(frozen=True)
class Bench:
    """Checkpoint and sample that all contestants use.

    Args:
        directory: Folder of the checkpoint.
        length: Number of tokens in the prompt.
        device: Device of the models.
        dtype: Dtype of the models' weights.
        new_tokens: Number of tokens to generate.
        shape: Sizes of the random model.
        question: Question of the prompt.
    """

    directory: Path
    length: int = 3072
    device: str = "cpu"
    dtype: str = "float32"
    new_tokens: int = 16
    shape: Shape = Shape()
    question: str = "What was it?"

    def make_checkpoint(self) -> None:
        """Write the random model. Every call writes the same weights.

        Raises:
            FileExistsError: If the folder is not empty, because it may contain a user's model.
        """
        if self.directory.exists() and (not self.directory.is_dir() or any(self.directory.iterdir())):
            raise FileExistsError(
                f"{self.directory} is not an empty folder; the random model is written to a new or an empty one, so "
                "name another, or none for a temporary one"
            )
        tokenizer, shape = build_tokenizer(), self.shape
        torch.manual_seed(SEED)
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=shape.d_model,
            intermediate_size=shape.d_mlp,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads,
            max_position_embeddings=65536,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
            initializer_range=0.1,
        )
        LlamaForCausalLM(config).save_pretrained(self.directory)
        tokenizer.save_pretrained(self.directory)

    @cached_property
    def sample(self) -> fl.MultiDocSample:
        """Sample with documents of random one-token words, and the gold document in the middle.

        The sample has 20 documents, or fewer if the titles of 20 documents would leave no room for words.
        """
        tokenizer, rng, documents = build_tokenizer(), random.Random(SEED), min(DOCUMENTS, self.length // 30)
        vocabulary = (token.removeprefix("Ġ") for token in tokenizer.get_vocab() if token.startswith("Ġ"))
        plain = sorted(word for word in vocabulary if word.isalpha() and len(tokenizer.tokenize(f"a {word}")) == 2)
        words = [rng.choice(plain) for _ in range(self.length)]

        def with_words(n: int) -> fl.MultiDocSample:
            cuts = [i * n // documents for i in range(documents + 1)]
            texts = tuple(fl.Document("The", " ".join(words[a:b])) for a, b in pairwise(cuts))
            return fl.MultiDocSample(self.question, ("nothing at all",), texts, documents // 2, "bench")

        if self.length < SHORTEST:
            raise ValueError(f"length is {self.length}; a prompt with some documents has at least {SHORTEST} tokens")
        n = self.length
        while (excess := len(tokenizer(str(with_words(n).prompt())).input_ids) - self.length) > 0:
            n -= excess
        return with_words(n)

    def hugging_face(self, attention: str) -> Any:
        """Load the Hugging Face model with an attention implementation, such as ``sdpa``."""
        model: Any = LlamaForCausalLM.from_pretrained(
            self.directory, attn_implementation=attention, dtype=getattr(torch, self.dtype)
        )
        return in_memory(model.eval().to(self.device))

    def focus(self, backend: Any, *, compile: bool = False) -> fl.FocusModel:
        """Load the ``FocusModel`` without stop tokens, so that all responses have the same length."""
        model = fl.FocusModel.from_pretrained(
            str(self.directory), device=self.device, dtype=self.dtype, backend=backend
        )
        settings: dict[str, Any] = {"stop_strings": (), "stop_tokens": (), "name": "bench", "compile": compile}
        return fl.FocusModel(in_memory(model.hooked), model.tokenizer, **settings)

    def encoded(self) -> fl.EncodedPrompt:
        """Tokens and spans of the prompt, computed without a model."""
        from focuslens.prompts.encoder import PromptEncoder

        return PromptEncoder(build_tokenizer(), False, {}).encode(self.sample.prompt())


def in_memory(model: Any) -> Any:
    """Read all weights of a model, and return the model.

    Weights in a memory-mapped file would otherwise be read during the first timed run.
    """
    for weights in model.parameters():
        weights.sum()
    return model


@dataclass(frozen=True)
class Contestant:
    """Contestant of the benchmark.

    Args:
        prepare: Function that loads the inputs and returns the function to time.
        times: Ratio of the whole work to the timed part.
        part: Description of the timed part; empty if the whole work is timed.
        on_gpu: Whether the contestant takes part on a GPU only.
    """

    prepare: Callable[[Bench], Callable[[], Any]]
    times: float = 1.0
    part: str = ""
    on_gpu: bool = False


def generate(model: Any, tokens: Tensor, new_tokens: int) -> Tensor:
    """Greedy generation with Hugging Face, ``[1 token]`` with the prompt, which no token ends early."""
    with torch.no_grad():
        mask = torch.ones_like(tokens)
        return model.generate(
            tokens, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False, eos_token_id=None, pad_token_id=0
        )


def plain_generation(bench: Bench) -> Callable[[], Tensor]:
    """Generation with Hugging Face's fused attention, which looks at nothing and edits nothing."""
    model, tokens = bench.hugging_face("sdpa"), bench.encoded().tokens[None].to(bench.device)
    return lambda: generate(model, tokens, bench.new_tokens)
