"""Contestants of ``bench.py``: FocusLens, the plain model, the paper's procedure, and TransformerLens.

Each contestant is a function that loads its inputs and returns the function to time. All contestants run one sample
with a random Llama of 8 layers, 8 heads and d_model 256, and generate the same number of tokens. The plain model uses
fused attention.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, LlamaConfig, LlamaForCausalLM
from transformers.masking_utils import eager_mask
from transformers.models.llama.modeling_llama import eager_attention_forward

import focuslens as fl
from focuslens.data.synthetic import build_tokenizer

__all__ = ["CONTESTANTS", "SHORTEST", "WORK", "Bench", "Contestant", "PaperTraining", "focus_training", "in_memory"]

SEED = 0
NEW_TOKENS = 16
HEADS = 20
TAUS = (0.1, 0.3, 0.6, 1.5, 1000.0)
KS = (1, 2, 3, 5, 8, 12, 16, 20, 25, 30, 40, 50, 60)
SAMPLES, TRAINED_SAMPLES, EPOCHS = 100, 5, 10
DOCUMENTS, SHORTEST = 20, 90


@dataclass(frozen=True)
class Bench:
    """Checkpoint and sample that all contestants use.

    Args:
        directory: Folder of the checkpoint.
        length: Number of tokens in the prompt.
        device: Device of the models.
        dtype: Dtype of the models' weights.
    """

    directory: Path
    length: int = 3072
    device: str = "cpu"
    dtype: str = "float32"

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
        tokenizer = build_tokenizer()
        torch.manual_seed(SEED)
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=256,
            intermediate_size=704,
            num_hidden_layers=8,
            num_attention_heads=8,
            num_key_value_heads=8,
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
            return fl.MultiDocSample("What was it?", ("nothing at all",), texts, documents // 2, "bench")

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

    def focus(self, backend: Any) -> fl.FocusModel:
        """Load the ``FocusModel`` without stop tokens, so that all responses have the same length."""
        model = fl.FocusModel.from_pretrained(
            str(self.directory), device=self.device, dtype=self.dtype, backend=backend
        )
        return fl.FocusModel(in_memory(model.hooked), model.tokenizer, stop_strings=(), stop_tokens=(), name="bench")

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
    """

    prepare: Callable[[Bench], Callable[[], Any]]
    times: float = 1.0
    part: str = ""


def _generate(model: Any, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        mask = torch.ones_like(tokens)
        return model.generate(
            tokens, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0
        )


def _floor(bench: Bench) -> Callable[[], Any]:
    model, tokens = bench.hugging_face("sdpa"), bench.encoded().tokens[None].to(bench.device)
    return lambda: _generate(model, tokens)


# --- scores of all heads ---


def _focus_scores(backend: str) -> Callable[[Bench], Callable[[], Any]]:
    def prepare(bench: Bench) -> Callable[[], Any]:
        model, sample = bench.focus(backend), bench.sample
        return lambda: fl.contextual_scores(model, [sample], max_new_tokens=NEW_TOKENS)

    return prepare


@dataclass(frozen=True)
class _Scored:
    """Tokens of a response, and contextual scores of all heads, layer by layer."""

    response: list[int]
    scores: list[float]


def _scored(whole: Tensor, patterns: Sequence[Tensor], prompt: fl.EncodedPrompt) -> _Scored:
    """Response tokens and contextual scores, from the attention pattern ``[batch head row key]`` of each layer."""
    ((start, end),), first = prompt.spans["relevant"], len(prompt.tokens)
    scores = [
        float(pattern[0, head, first:, start:end].sum(dim=-1).mean())
        for pattern in patterns
        for head in range(pattern.shape[1])
    ]
    return _Scored(whole[0, first:].tolist(), scores)


def _paper_scores(bench: Bench) -> Callable[[], Any]:
    model, prompt = bench.hugging_face("eager"), bench.encoded()
    tokens = prompt.tokens[None].to(bench.device)

    def run() -> _Scored:
        whole = _generate(model, tokens)
        with torch.no_grad():
            return _scored(whole, model(whole, output_attentions=True).attentions, prompt)

    return run


def _lens_scores(bench: Bench) -> Callable[[], Any]:
    hooked, prompt = bench.focus("hooked").hooked, bench.encoded()
    tokens = prompt.tokens[None].to(bench.device)
    names = [f"blocks.{layer}.attn.hook_pattern" for layer in range(hooked.cfg.n_layers)]

    def run() -> _Scored:
        with torch.no_grad():
            whole = hooked.generate(
                tokens, max_new_tokens=NEW_TOKENS, do_sample=False, stop_at_eos=False, verbose=False
            )
            _, cache = hooked.run_with_cache(whole, names_filter=names)
        return _scored(whole, list(cache.values()), prompt)

    return run


# --- a sweep of split-softmax ---


def _settings(model: fl.FocusModel) -> list[fl.Setting]:
    heads = [fl.Head(layer, head) for layer in range(model.shape.n_layers) for head in range(model.shape.n_heads)]
    random.Random(1).shuffle(heads)
    drawn = heads[::-1]
    return [*fl.split_softmax_settings(heads, TAUS, KS), *fl.split_softmax_settings(drawn, (0.3,), KS, label="random")]


def _focus_sweep(backend: str) -> Callable[[Bench], Callable[[], Any]]:
    def prepare(bench: Bench) -> Callable[[], Any]:
        model, sample = bench.focus(backend), bench.sample
        settings = _settings(model)
        return lambda: fl.run_sweep(model, [sample], settings, max_new_tokens=NEW_TOKENS)

    return prepare


def _paper_run(bench: Bench) -> Callable[[], Any]:
    model, tokens = bench.hugging_face("eager"), bench.encoded().tokens[None].to(bench.device)
    return lambda: _generate(model, tokens)


def _lens_run(bench: Bench) -> Callable[[], Any]:
    model, prompt = bench.focus("hooked"), bench.encoded()
    hooked, tokens = model.hooked, prompt.tokens[None].to(bench.device)
    hooks = _settings(model)[5].interventions[0].hooks(model, prompt)

    def run() -> Tensor:
        with torch.no_grad(), hooked.hooks(fwd_hooks=hooks):
            return hooked.generate(tokens, max_new_tokens=NEW_TOKENS, do_sample=False, stop_at_eos=False, verbose=False)

    return run


# --- training ---


def _heads(model: fl.FocusModel) -> list[fl.Head]:
    """Twenty heads to train and steer: the first three heads of each layer, from layer 0 until there are twenty."""
    return [fl.Head(layer, head) for layer in range(model.shape.n_layers) for head in range(3)][:HEADS]


def focus_training(backend: str, **more: Any) -> Callable[[Bench], Callable[[], fl.FocusDirections]]:
    """Function that prepares training with FocusLens. ``more`` goes to :func:`focuslens.train_focus_directions`."""

    def prepare(bench: Bench) -> Callable[[], fl.FocusDirections]:
        model = bench.focus(backend)
        samples, heads = [bench.sample] * TRAINED_SAMPLES, _heads(model)
        settings: dict[str, Any] = {"epochs": EPOCHS, "max_new_tokens": NEW_TOKENS, **more}
        return lambda: fl.train_focus_directions(model, samples, heads, **settings)

    return prepare


_KEEPING = "eager-keeping"
"""Name under which :func:`_keeping_attention` is registered with transformers."""


def _keeping_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    recorded: dict[int, tuple[Tensor, Tensor]],
    **settings: Any,
) -> tuple[Tensor, Tensor]:
    """Eager attention that stores a layer's rotated queries and keys, ``[batch head pos d_head]``, in ``recorded``."""
    recorded[module.layer_idx] = (query, key)
    return eager_attention_forward(module, query, key, value, mask, **settings)


AttentionInterface.register(_KEEPING, _keeping_attention)
AttentionMaskInterface.register(_KEEPING, eager_mask)  # without this mask, attention would not be causal


class PaperTraining:
    """Training by the paper's procedure: cache activations, then take steps on the full attention pattern of a head.

    The timing favours the paper's procedure in three ways. No logits are computed. Only queries have a direction. The
    time of a step excludes loading the head's activations and creating the mask and the optimizer.
    """

    def __init__(self, bench: Bench) -> None:
        self._model, prompt = bench.hugging_face(_KEEPING), bench.encoded()
        self.tokens = torch.cat((prompt.tokens, prompt.tokens[:NEW_TOKENS]))[None].to(bench.device)
        self._device, self._first, n = bench.device, len(prompt.tokens), self.tokens.shape[1]
        ((self._start, self._end),) = prompt.spans["relevant"]
        self._folder = tempfile.TemporaryDirectory(prefix="bench-")  # deleted with this object
        self._hidden = torch.ones(n, n, dtype=torch.bool, device=self._device).triu(1)
        self.direction = torch.zeros(self._model.config.head_dim, device=self._device, requires_grad=True)
        self._optimizer = torch.optim.AdamW([self.direction], lr=1e-3)

    def cache_activations(self) -> int:
        """Write the queries and keys of every layer for one sample to disk, and return their size in bytes."""
        recorded: dict[int, tuple[Tensor, Tensor]] = {}
        with torch.no_grad():
            self._model.model(self.tokens, use_cache=False, recorded=recorded)
        paths: list[Path] = []
        for layer, pair in recorded.items():
            for x, activations in zip("qk", pair, strict=True):
                paths.append(self.path(layer, x))
                torch.save(activations[0].cpu(), paths[-1])
        return sum(path.stat().st_size for path in paths)

    def load(self, layer: int = 0, head: int = 0) -> None:
        """Read one head's activations from disk as float32, the dtype of the softmax and the direction."""
        q, k = (torch.load(self.path(layer, x))[head].to(self._device).float() for x in "qk")
        self._loaded = q, k

    def step(self) -> Tensor:
        """Take one optimizer step for the loaded head, and return the loss before the step."""
        q, k = self._loaded
        self._optimizer.zero_grad()
        scores = (q + self.direction) @ k.T / q.shape[1] ** 0.5
        pattern = scores.masked_fill(self._hidden, -torch.inf).softmax(dim=-1)
        loss = -pattern[self._first :, self._start : self._end].sum(dim=-1).mean()
        loss.backward()
        self._optimizer.step()
        return loss.detach()

    def __call__(self) -> None:
        """Cache activations, load one head and take one step."""
        self.cache_activations()
        self.load()
        self.step()

    def path(self, layer: int, x: str) -> Path:
        """Path of the file with a layer's queries (``q``) or keys (``k``), ``[head pos d_head]``."""
        return Path(self._folder.name) / f"{layer}-{x}.pt"


# --- steering ---


def _focus_generation(backend: str, steered: bool) -> Callable[[Bench], Callable[[], Any]]:
    def prepare(bench: Bench) -> Callable[[], Any]:
        model, prompt = bench.focus(backend), bench.encoded()
        heads = _heads(model)
        vectors = torch.randn(len(heads), model.shape.d_head, generator=torch.Generator().manual_seed(0))
        drawn = fl.FocusDirections(heads=heads, query=vectors, key=None, site="rotary")
        acting = [fl.FocusSteering(drawn, 0.3)] if steered else []
        return lambda: model.generate(prompt, acting, max_new_tokens=NEW_TOKENS)

    return prepare


N_SETTINGS = len(TAUS) * len(KS) + len(KS)
WORK: dict[str, Any] = {
    "new_tokens": NEW_TOKENS,
    "documents": DOCUMENTS,
    "taus": TAUS,
    "ks": KS,
    "sweep_settings": N_SETTINGS,
    "heads": HEADS,
    "samples": SAMPLES,
    "samples_timed": TRAINED_SAMPLES,
    "epochs": EPOCHS,
    "seed": SEED,
}
"""Parameters of the tasks of all contestants."""
FLOOR = "Hugging Face, fused"
PART = f"{TRAINED_SAMPLES} samples, all copies of one, times {SAMPLES // TRAINED_SAMPLES}"
PAPER_PART = f"caching a sample + {HEADS * EPOCHS} x a head's step, times {SAMPLES}"
CONTESTANTS: dict[str, dict[str, Contestant]] = {
    "score": {
        FLOOR: Contestant(_floor),
        "FocusLens, HookedTransformer": Contestant(_focus_scores("hooked")),
        "FocusLens, TransformerBridge": Contestant(_focus_scores("bridge")),
        "the paper's procedure": Contestant(_paper_scores),
        "TransformerLens, run_with_cache": Contestant(_lens_scores),
    },
    "sweep": {
        FLOOR: Contestant(_floor, part="one generation, unswept"),
        "FocusLens, HookedTransformer": Contestant(_focus_sweep("hooked")),
        "FocusLens, TransformerBridge": Contestant(_focus_sweep("bridge")),
        "the paper's procedure": Contestant(_paper_run, N_SETTINGS, "one run without an edit, times the settings"),
        "TransformerLens, run_with_hooks": Contestant(_lens_run, N_SETTINGS, "one setting, times the settings"),
    },
    "train": {
        "FocusLens, HookedTransformer": Contestant(focus_training("hooked"), SAMPLES / TRAINED_SAMPLES, PART),
        "FocusLens, TransformerBridge": Contestant(focus_training("bridge"), SAMPLES / TRAINED_SAMPLES, PART),
        "the paper's procedure": Contestant(PaperTraining, 1, PAPER_PART),
    },
    "steer": {
        "HookedTransformer, unsteered": Contestant(_focus_generation("hooked", False)),
        "HookedTransformer, steered": Contestant(_focus_generation("hooked", True)),
    },
    "steer_bridge": {
        "TransformerBridge, unsteered": Contestant(_focus_generation("bridge", False)),
        "TransformerBridge, steered": Contestant(_focus_generation("bridge", True)),
    },
}
"""Contestants of each task, by name. Ratios are relative to the first contestant of a task."""
