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
from pathlib import Path
from typing import Any

import torch
from bench_model import DOCUMENTS, SEED, Bench, Contestant, generate, plain_generation
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask
from transformers.models.llama.modeling_llama import eager_attention_forward

import focuslens as fl

__all__ = ["CONTESTANTS", "WORK", "PaperTraining", "focus_training", "split_softmax_grid"]

HEADS = 20
TAUS = (0.1, 0.3, 0.6, 1.5, 1000.0)
KS = (1, 2, 3, 5, 8, 12, 16, 20, 25, 30, 40, 50, 60)
SAMPLES, TRAINED_SAMPLES, EPOCHS = 100, 5, 10


# --- scores of all heads ---


def _focus_scores(backend: str) -> Callable[[Bench], Callable[[], Any]]:
    def prepare(bench: Bench) -> Callable[[], Any]:
        model, sample = bench.focus(backend), bench.sample
        return lambda: fl.contextual_scores(model, [sample], max_new_tokens=bench.new_tokens)

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
        whole = generate(model, tokens, bench.new_tokens)
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
                tokens, max_new_tokens=bench.new_tokens, do_sample=False, stop_at_eos=False, verbose=False
            )
            _, cache = hooked.run_with_cache(whole, names_filter=names)
        return _scored(whole, list(cache.values()), prompt)

    return run


# --- a sweep of split-softmax ---


def split_softmax_grid(model: fl.FocusModel) -> list[fl.Setting]:
    """78 settings of split-softmax: five strengths and one strength of heads in another order, each in 13 sizes."""
    heads = [fl.Head(layer, head) for layer in range(model.shape.n_layers) for head in range(model.shape.n_heads)]
    random.Random(1).shuffle(heads)
    drawn = heads[::-1]
    return [*fl.split_softmax_settings(heads, TAUS, KS), *fl.split_softmax_settings(drawn, (0.3,), KS, label="random")]


def _focus_sweep(backend: str) -> Callable[[Bench], Callable[[], Any]]:
    def prepare(bench: Bench) -> Callable[[], Any]:
        model, sample = bench.focus(backend), bench.sample
        settings = split_softmax_grid(model)
        return lambda: fl.run_sweep(model, [sample], settings, max_new_tokens=bench.new_tokens)

    return prepare


def _paper_run(bench: Bench) -> Callable[[], Any]:
    model, tokens = bench.hugging_face("eager"), bench.encoded().tokens[None].to(bench.device)
    return lambda: generate(model, tokens, bench.new_tokens)


def _lens_run(bench: Bench) -> Callable[[], Any]:
    model, prompt = bench.focus("hooked"), bench.encoded()
    hooked, tokens = model.hooked, prompt.tokens[None].to(bench.device)
    hooks = split_softmax_grid(model)[5].interventions[0].hooks(model, prompt)

    def run() -> Tensor:
        with torch.no_grad(), hooked.hooks(fwd_hooks=hooks):
            return hooked.generate(
                tokens, max_new_tokens=bench.new_tokens, do_sample=False, stop_at_eos=False, verbose=False
            )

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
        settings: dict[str, Any] = {"epochs": EPOCHS, "max_new_tokens": bench.new_tokens, **more}
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
        self.tokens = torch.cat((prompt.tokens, prompt.tokens[: bench.new_tokens]))[None].to(bench.device)
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
        return lambda: model.generate(prompt, acting, max_new_tokens=bench.new_tokens)

    return prepare


N_SETTINGS = len(TAUS) * len(KS) + len(KS)
WORK: dict[str, Any] = {
    "new_tokens": Bench.new_tokens,
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
        FLOOR: Contestant(plain_generation),
        "FocusLens, HookedTransformer": Contestant(_focus_scores("hooked")),
        "FocusLens, TransformerBridge": Contestant(_focus_scores("bridge")),
        "the paper's procedure": Contestant(_paper_scores),
        "TransformerLens, run_with_cache": Contestant(_lens_scores),
    },
    "sweep": {
        FLOOR: Contestant(plain_generation, part="one generation, unswept"),
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
