"""What ``bench.py`` times: FocusLens, the plain fused model, the paper's procedure, and plain TransformerLens.

Each contestant is a function that loads what it needs and gives a function to be timed. All run the same sample with a
random Llama of 8 layers, 8 heads and d_model 256, and generate the same number of tokens.
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
from transformers import LlamaConfig, LlamaForCausalLM

import focuslens as fl
from focuslens.data.synthetic import build_tokenizer

__all__ = ["CONTESTANTS", "EPOCHS", "HEADS", "N_SETTINGS", "SAMPLES", "Bench", "Contestant", "PaperTraining"]

NEW_TOKENS = 16
HEADS = 20
TAUS = (0.1, 0.3, 0.6, 1.5, 1000.0)
KS = (1, 2, 3, 5, 8, 12, 16, 20, 25, 30, 40, 50, 60)
SAMPLES, TRAINED_SAMPLES, EPOCHS = 100, 5, 10


@dataclass(frozen=True)
class Bench:
    """The checkpoint and the sample that all contestants share.

    Args:
        directory: Where the checkpoint lies, or is made.
        length: Tokens of the prompt.
        device: Where models run.
        dtype: Of their weights.
    """

    directory: Path
    length: int = 3072
    device: str = "cpu"
    dtype: str = "float32"

    def make_checkpoint(self) -> None:
        """Write the random model, the same every time."""
        tokenizer = build_tokenizer()
        torch.manual_seed(0)
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
        """Twenty documents of random words that are one token each, the gold document in the middle."""
        tokenizer, rng = build_tokenizer(), random.Random(0)
        vocabulary = (token.removeprefix("Ġ") for token in tokenizer.get_vocab() if token.startswith("Ġ"))
        plain = sorted(word for word in vocabulary if word.isalpha() and len(tokenizer.tokenize(f"a {word}")) == 2)
        words = [rng.choice(plain) for _ in range(self.length)]

        def made(n: int) -> fl.MultiDocSample:
            cuts = [i * n // 20 for i in range(21)]
            documents = tuple(fl.Document("The", " ".join(words[a:b])) for a, b in pairwise(cuts))
            return fl.MultiDocSample("What was it?", ("nothing at all",), documents, 10, "bench")

        n = self.length
        while (excess := len(tokenizer(str(made(n).prompt())).input_ids) - self.length) > 0:
            n -= excess
        return made(n)

    def hugging_face(self, attention: str) -> Any:
        """The Hugging Face model."""
        model: Any = LlamaForCausalLM.from_pretrained(
            self.directory, attn_implementation=attention, dtype=getattr(torch, self.dtype)
        )
        return model.eval().to(self.device)

    def focus(self, backend: Any) -> fl.FocusModel:
        """The FocusModel; its responses have no end, so that all are of one length."""
        model = fl.FocusModel.from_pretrained(
            str(self.directory), device=self.device, dtype=self.dtype, backend=backend
        )
        return fl.FocusModel(model.hooked, model.tokenizer, stop_tokens=(), name="bench")

    def encoded(self) -> fl.EncodedPrompt:
        """The prompt's tokens and parts, without a model."""
        from focuslens.tokens import PromptEncoder

        return PromptEncoder(build_tokenizer(), False, {}).encode(self.sample.prompt())


@dataclass(frozen=True)
class Contestant:
    """Something to be timed.

    Args:
        prepare: Loads what is needed; gives what is timed.
        times: How many times the whole work is as much as what is timed.
        part: What of the work is timed, where that is not all of it.
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


def _span_means(patterns: Sequence[Tensor], prompt: fl.EncodedPrompt) -> list[float]:
    """Contextual scores, head by head, from every layer's ``[batch head row key]``."""
    ((start, end),), first = prompt.spans["relevant"], len(prompt.tokens)
    return [
        float(pattern[0, head, first:, start:end].sum(dim=-1).mean())
        for pattern in patterns
        for head in range(pattern.shape[1])
    ]


def _paper_scores(bench: Bench) -> Callable[[], Any]:
    model, prompt = bench.hugging_face("eager"), bench.encoded()
    tokens = prompt.tokens[None].to(bench.device)

    def run() -> list[float]:
        whole = _generate(model, tokens)
        with torch.no_grad():
            return _span_means(model(whole, output_attentions=True).attentions, prompt)

    return run


def _lens_scores(bench: Bench) -> Callable[[], Any]:
    hooked, prompt = bench.focus("hooked").hooked, bench.encoded()
    tokens = prompt.tokens[None].to(bench.device)
    names = [f"blocks.{layer}.attn.hook_pattern" for layer in range(hooked.cfg.n_layers)]

    def run() -> list[float]:
        with torch.no_grad():
            whole = hooked.generate(
                tokens, max_new_tokens=NEW_TOKENS, do_sample=False, stop_at_eos=False, verbose=False
            )
            _, cache = hooked.run_with_cache(whole, names_filter=names)
        return _span_means(list(cache.values()), prompt)

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


def _focus_training(backend: str) -> Callable[[Bench], Callable[[], Any]]:
    def prepare(bench: Bench) -> Callable[[], Any]:
        model = bench.focus(backend)
        samples = [bench.sample] * TRAINED_SAMPLES
        heads = [fl.Head(layer, head) for layer in range(model.shape.n_layers) for head in range(3)][:HEADS]
        settings: dict[str, Any] = {"epochs": EPOCHS, "max_new_tokens": NEW_TOKENS}
        return lambda: fl.train_focus_directions(model, samples, heads, **settings)

    return prepare


class PaperTraining:
    """The paper's training in the two parts that it is made of: full patterns, one head at a time."""

    def __init__(self, bench: Bench) -> None:
        self._hooked, prompt = bench.focus("hooked").hooked, bench.encoded()
        self._tokens = torch.cat((prompt.tokens, prompt.tokens[:NEW_TOKENS]))[None].to(bench.device)
        self._device, self._first = bench.device, len(prompt.tokens)
        ((self._start, self._end),) = prompt.spans["relevant"]
        self._folder = tempfile.TemporaryDirectory(prefix="bench-")  # gone with this object

    def cache_activations(self) -> int:
        """Write one sample's queries and keys of every layer to disk; how many bytes that is."""
        names = [f"blocks.{layer}.attn.hook_rot_{x}" for layer in range(self._hooked.cfg.n_layers) for x in "qk"]
        with torch.no_grad():
            _, cache = self._hooked.run_with_cache(self._tokens, names_filter=names)
        for name in names:
            torch.save(cache[name][0].cpu(), self._path(name))
        return sum(self._path(name).stat().st_size for name in names)

    def step(self) -> None:
        """One step of one head on that sample."""
        loaded = [torch.load(self._path(f"blocks.0.attn.hook_rot_{x}"))[:, 0].to(self._device) for x in "qk"]
        q, k = loaded
        direction = torch.zeros(q.shape[1], device=self._device, requires_grad=True)
        optimizer = torch.optim.AdamW([direction], lr=1e-3)
        scores = (q + direction) @ k.T / q.shape[1] ** 0.5
        pattern = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf).softmax(dim=-1)
        loss = -pattern[self._first :, self._start : self._end].sum(dim=-1).mean()
        loss.backward()
        optimizer.step()

    def __call__(self) -> None:
        """Both parts, once."""
        self.cache_activations()
        self.step()

    def _path(self, name: str) -> Path:
        return Path(self._folder.name) / f"{name}.pt"


# --- steering ---


def _focus_generation(steered: bool) -> Callable[[Bench], Callable[[], Any]]:
    def prepare(bench: Bench) -> Callable[[], Any]:
        model, prompt = bench.focus("hooked"), bench.encoded()
        heads = [fl.Head(layer, head) for layer in range(model.shape.n_layers) for head in range(3)][:HEADS]
        vectors = torch.randn(len(heads), model.shape.d_head, generator=torch.Generator().manual_seed(0))
        directions = fl.FocusDirections(heads=heads, query=vectors, key=None, site="rotary")
        acting = [fl.FocusSteering(directions, 0.3)] if steered else []
        return lambda: model.generate(prompt, acting, max_new_tokens=NEW_TOKENS)

    return prepare


N_SETTINGS = len(TAUS) * len(KS) + len(KS)
FLOOR = "Hugging Face, fused"
PART = f"{TRAINED_SAMPLES} of {SAMPLES} samples"
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
        "FocusLens, HookedTransformer": Contestant(_focus_training("hooked"), SAMPLES / TRAINED_SAMPLES, PART),
        "FocusLens, TransformerBridge": Contestant(_focus_training("bridge"), SAMPLES / TRAINED_SAMPLES, PART),
        "the paper's procedure": Contestant(PaperTraining, 1, "a sample's activations, and a step of a head"),
    },
    "steer": {
        "FocusLens, unsteered": Contestant(_focus_generation(False)),
        "FocusLens, steered": Contestant(_focus_generation(True)),
    },
}
"""Work to contestants; the first of each is what the others are compared with."""
