"""Contestants of ``bench.py`` on a real model, SmolLM2-135M-Instruct, with real passages.

The model is downloaded once, if it is not in the cache. The plain model and FocusLens get the same tokens, and each
generates 64 tokens; FocusLens also scores all heads. The time of the prompt alone is taken with one new token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from bench_model import Bench, Contestant, generate, in_memory, plain_generation
from transformers import AutoModelForCausalLM

import focuslens as fl
from focuslens.model.sources.names import checkpoint_path

__all__ = ["REAL", "REAL_DOCUMENTS", "REAL_TITLES", "RealBench", "real_rates"]

NAME = "smollm2-135m-instruct"
REAL_DOCUMENTS = (5, 20)
NEW_TOKENS = 64


@dataclass(frozen=True)
class RealBench(Bench):
    """The real model, and a sample of passages from the package, of which BM25 finds those most like the question.

    Args:
        documents: Number of documents.
    """

    documents: int = 20

    @classmethod
    def of(cls, documents: int, device: str, dtype: str) -> RealBench:
        """The model, from the cache or downloaded.

        Raises:
            FileNotFoundError: If it is not in the cache and cannot be downloaded.
        """
        return cls(Path(checkpoint_path(NAME)), 0, device, dtype, NEW_TOKENS, documents=documents)

    @cached_property
    def sample(self) -> fl.MultiDocSample:
        """The file's first question."""
        return fl.load_multidoc("passages", num_documents=self.documents, distractors="bm25", limit=1)[0]

    def hugging_face(self, attention: str) -> Any:
        """Load the Hugging Face model with an attention implementation, such as ``sdpa``."""
        model: Any = AutoModelForCausalLM.from_pretrained(
            self.directory, attn_implementation=attention, dtype=getattr(torch, self.dtype)
        )
        return in_memory(model.eval().to(self.device))

    @cached_property
    def _prompt(self) -> fl.EncodedPrompt:
        return self.focus("bridge").encode(self.sample.prompt())

    def encoded(self) -> fl.EncodedPrompt:
        """Tokens and spans of the prompt."""
        return self._prompt


def _with_one_token(bench: Bench) -> Callable[[], Any]:
    """Generation of one token, whose time is almost that of the prompt."""
    model, tokens = bench.hugging_face("sdpa"), bench.encoded().tokens[None].to(bench.device)
    return lambda: generate(model, tokens, 1)


def _scoring(backend: str, new_tokens: int = NEW_TOKENS) -> Contestant:
    def prepare(bench: Bench) -> Callable[[], Any]:
        model, sample = bench.focus(backend), bench.sample
        return lambda: fl.contextual_scores(model, [sample], max_new_tokens=new_tokens)

    return Contestant(prepare)


def _generating(new_tokens: int, *, focused: bool) -> Contestant:
    """Generation without scores, plain or with self-focus: eight heads choose, and twenty are focused."""

    def prepare(bench: Bench) -> Callable[[], Any]:
        model, prompt, ranking = bench.focus("hooked"), bench.encoded(), fl.load_ranking(NAME)
        interventions = [fl.SelfFocus(ranking[:8], 0.3, focused=ranking[:20])] if focused else []
        return lambda: model.generate(prompt, interventions, max_new_tokens=new_tokens)

    return Contestant(prepare)


FLOOR, HOOKED, BRIDGE = "Hugging Face, fused", "FocusLens, HookedTransformer", "FocusLens, TransformerBridge"
PROMPT_ONLY = "{}, one new token"
PLAIN, FOCUSED = f"{HOOKED}, without scores", f"{HOOKED}, self-focus without scores"
REAL: dict[str, dict[str, Contestant]] = {
    f"real_{documents}": {
        FLOOR: Contestant(plain_generation, part="a plain generation"),
        HOOKED: _scoring("hooked"),
        BRIDGE: _scoring("bridge"),
        PLAIN: _generating(NEW_TOKENS, focused=False),
        FOCUSED: _generating(NEW_TOKENS, focused=True),
        PROMPT_ONLY.format(FLOOR): Contestant(_with_one_token),
        PROMPT_ONLY.format(HOOKED): _scoring("hooked", 1),
        PROMPT_ONLY.format(BRIDGE): _scoring("bridge", 1),
    }
    for documents in REAL_DOCUMENTS
}
"""Contestants by number of documents, and by name."""
REAL_TITLES = {
    f"real_{documents}": f"Generate 64 tokens with SmolLM2-135M and score all heads, {documents} documents"
    for documents in REAL_DOCUMENTS
}
"""Tasks of this file, and the headings of their tables."""


def real_rates(rows: Mapping[str, Any], tokens: int) -> Sequence[Sequence[str]]:
    """Rows of a table of prompt tokens and answer tokens per second."""
    lines: list[list[str]] = []
    for name in (FLOOR, HOOKED, BRIDGE):
        prompt, whole = rows[PROMPT_ONLY.format(name)]["seconds"], rows[name]["seconds"]
        lines.append([name, f"{tokens / prompt:,.0f}", f"{(NEW_TOKENS - 1) / (whole - prompt):,.0f}"])
    return lines
