"""Tiny checkpoints of families whose attention has a form of its own, and what FocusLens computes on them.

Every function returns the largest difference between FocusLens and Hugging Face's eager attention, or attention that is
written out in :mod:`tests.support.reference`.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import focuslens as fl
from focuslens.model import engine
from focuslens.model.backends import interfaced
from tests.support.architectures import ARCHITECTURES, build_architecture
from tests.support.checkpoints import _tokenizer, multidoc_samples
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

if TYPE_CHECKING:
    from focuslens import FocusModel, MultiDocSample

__all__ = [
    "FAMILIES",
    "HEADS",
    "RESPONSES",
    "Family",
    "counted_layers",
    "generation_gap",
    "logit_gap",
    "open_family",
    "score_gap",
    "split_gap",
    "steering_gap",
]

FAMILIES = {
    "Gemma 2": ("window 24", "full", "window 24"),
    "Gemma 3": ("window 24", "full", "window 24"),
    "gpt-oss": ("window 24, sink-gated", "full, sink-gated", "window 24, sink-gated"),
    "Qwen3-MoE": ("full",) * 3,
    "OLMo 2": ("full",) * 3,
    "OLMo 3": ("window 24", "full", "window 24"),
    "Granite": ("full",) * 3,
    "SmolLM3": ("full", "full, no rotary", "full"),
    "EXAONE 4": ("window 24", "full, no rotary", "window 24"),
    "Phi-3": ("full",) * 3,
    "GLM": ("full",) * 3,
    "Llama 4": ("chunk 64", "full, no rotary", "chunk 64"),
}
"""Architectures of :mod:`tests.support.architectures`, with the kinds of their layers' heads."""

HEADS = [(0, 1), (1, 2), (1, 0), (2, 0)]
"""Heads that interventions change, in every layer. No two of them share a key-value head."""

RESPONSES = ("The silver lantern", "queen 42.", "naïve señor of the winter harbour bridge", "x")


@dataclass(frozen=True)
class Family:
    """A tiny checkpoint in FocusLens and in Hugging Face."""

    name: str
    model: FocusModel
    hf: ReferenceModel
    samples: list[MultiDocSample]

    @property
    def sinks(self) -> bool:
        return self.name == "gpt-oss"

    def response(self, sample: MultiDocSample, text: str) -> tuple[Tensor, Tensor]:
        """Tokens of a prompt and of a response, as Hugging Face's tokenizer gives them for the whole text."""
        prompt = self.hf.ids(prompt_text(sample, "long"))
        whole = self.hf.tokenizer(prompt_text(sample, "long") + " " + text)["input_ids"]
        assert whole[: len(prompt)] == prompt.tolist()
        return prompt, torch.tensor(whole[len(prompt) :])


def open_family(name: str, directory: Path) -> Family:
    """Write the checkpoint of a family, and open it."""
    (architecture,) = [one for one in ARCHITECTURES if one.name == name]
    path = build_architecture(architecture, directory, _tokenizer(bos=True, chat_template=None))
    model = fl.FocusModel.from_pretrained(str(path), device="cpu", stop_strings=())
    return Family(name, model, ReferenceModel(path), multidoc_samples())


@contextmanager
def counted_layers() -> Generator[list[int]]:
    """List to which each layer on the engine appends its number of rows, inside a ``with`` block."""
    rows: list[int] = []
    original = interfaced.attend

    def count(points: Any, running: engine.Pass, *arguments: Any) -> Tensor:
        rows.append(running.n_rows)
        return original(points, running, *arguments)

    interfaced.attend = count
    try:
        yield rows
    finally:
        interfaced.attend = original


def logit_gap(family: Family) -> float:
    """Difference of logits in one pass, in rows over a cache, and in rows after a batch with padding."""
    model, hf = family.model, family.hf
    pairs = [family.response(sample, RESPONSES[2]) for sample in family.samples]
    expected = [hf.logits(torch.cat(pair)) for pair in pairs]
    gaps = [gap(model.logits(torch.cat(pair)), right) for pair, right in zip(pairs, expected, strict=True)]
    prompts = [model.encode(sample.prompt("long")) for sample in family.samples]
    assert len({len(prompt.tokens) for prompt in prompts}) > 2
    n = min(len(response) for _, response in pairs)
    for batch in ([0], list(range(len(pairs)))):
        prefix = model.completed(model.prefill([prompts[i] for i in batch], hold_last=True))
        for step in range(n + 1):
            assert prefix.logits is not None
            right = torch.stack([expected[i][len(pairs[i][0]) - 1 + step] for i in batch])
            gaps.append(gap(prefix.logits, right))
            if step < n:
                _, prefix = model.extend(prefix, torch.stack([pairs[i][1][step : step + 1] for i in batch]))
    together = model.prefill(prompts, hold_last=True)
    rows, _ = model.extend(together, torch.stack([response[:n] for _, response in pairs]))
    right = torch.stack([x[len(p) : len(p) + n] for (p, _), x in zip(pairs, expected, strict=True)])
    return max(*gaps, gap(rows, right))


def generation_gap(family: Family, n: int = 12) -> int:
    """Number of responses that differ from those of Hugging Face's ``generate``, alone or in a batch."""
    model = fl.FocusModel(family.model.backend, family.model.tokenizer, stop_strings=(), stop_tokens=())
    prompts = [model.encode(sample.prompt("long")) for sample in family.samples]
    wanted = [family.hf.generate(prompt.tokens, n, stop=(499,)) for prompt in prompts]
    alone = [model.generate(prompt, max_new_tokens=n).tokens.tolist() for prompt in prompts]
    batch = [response.tokens.tolist() for response in model.generate(prompts, max_new_tokens=n)]
    pairs = [*zip(alone, wanted, strict=True), *zip(batch, wanted, strict=True)]
    return sum(ours[: len(theirs)] != theirs for ours, theirs in pairs)


def score_gap(family: Family) -> float:
    """Difference of contextual scores from those of the full patterns of eager attention. Sinks count as sink."""
    expected: list[dict[str, Tensor]] = []
    for sample, text in zip(family.samples, RESPONSES, strict=True):
        prompt, response = family.response(sample, text)
        rows = family.hf.patterns(torch.cat((prompt, response)))[:, :, len(prompt) :]
        by_hand = scores_of_rows(family.hf, sample, "long", rows)
        if family.sinks:
            by_hand["sink"] = by_hand["sink"] + (1 - rows.double().sum(dim=-1)).mean(dim=-1)
            assert float((1 - rows.sum(dim=-1)).max()) > 0.05
        expected.append(by_hand)
    gaps: list[float] = []
    for batch_tokens in (1, 1000):
        scores = fl.contextual_scores(family.model, family.samples, responses=RESPONSES, batch_tokens=batch_tokens)
        gaps += [gap(getattr(scores, kind), torch.stack([one[kind] for one in expected])) for kind in expected[0]]
    return max(gaps)


def span_of(family: Family, sample: MultiDocSample) -> list[int]:
    text = prompt_text(sample, "long")
    characters = document_ranges(sample, text)[sample.gold_index or 0]
    return tokens_of_ranges(family.hf.offsets(text), characters)


def split_gap(family: Family, tau: float = 0.3) -> float:
    """Difference of logits under split-softmax from those of patched attention."""
    gaps: list[float] = []
    for sample in family.samples[:3]:
        prompt, response = family.response(sample, RESPONSES[2])
        tokens = torch.cat((prompt, response))
        rows = split_softmax_rows(HEADS, tau, span_of(family, sample), len(prompt) - 1, sinks=family.sinks)
        right = family.hf.logits(tokens, Edits(pattern=rows))
        assert gap(right, family.hf.logits(tokens)) > 0.05, "the edit changes nothing"
        split = fl.SplitSoftmax(HEADS, tau)
        gaps.append(gap(family.model.logits(tokens, [split], prompt=sample.prompt("long")), right))
        prefix = family.model.prefill(sample.prompt("long"), hold_last=True)
        logits, _ = family.model.extend(prefix, response[None], [split])
        gaps.append(gap(logits[0], right[len(prompt) :]))
    return max(gaps)


def steering_gap(family: Family, site: str) -> float:
    """Difference of logits under steering from those of patched queries, or of biased projections."""
    model, hf, shape = family.model, family.hf, family.model.shape
    generator = torch.Generator().manual_seed(5)
    query = torch.randn(len(HEADS), shape.d_head, generator=generator)
    key = torch.randn(len(HEADS), shape.d_head, generator=generator) if site == "projection" else None
    steering = fl.FocusSteering(fl.FocusDirections(HEADS, query, key, site), 0.7)  # type: ignore[arg-type]
    gaps: list[float] = []
    for sample in family.samples[:2]:
        prompt, response = family.response(sample, RESPONSES[2])
        tokens = torch.cat((prompt, response))
        if key is None:
            edits = Edits(query=add_to_rows(dict(zip(HEADS, query, strict=True)), 0.7))
            right = hf.logits(tokens, edits)
        else:
            with hf.biased(_biases(family, 0.7 * query, 0.7 * key)):
                right = hf.logits(tokens)
        assert gap(right, hf.logits(tokens)) > 0.05, "the edit changes nothing"
        gaps.append(gap(model.logits(tokens, [steering], prompt=sample.prompt("long")), right))
        prefix = model.prefill(sample.prompt("long"), [steering], hold_last=True)
        logits, _ = model.extend(prefix, response[None], [steering])
        gaps.append(gap(logits[0], right[len(prompt) :]))
    return max(gaps)


def _biases(family: Family, query: Tensor, key: Tensor) -> dict[str, dict[tuple[int, int], Tensor]]:
    """Vectors by projection and by head of the projection."""
    shape = family.model.shape
    keys = {(layer, shape.key_value_head(head)): vector for (layer, head), vector in zip(HEADS, key, strict=True)}
    queries = dict(zip(HEADS, query, strict=True))
    if family.name != "Phi-3":
        return {"q_proj": queries, "k_proj": keys}
    return {"qkv_proj": queries | {(layer, shape.n_heads + head): vector for (layer, head), vector in keys.items()}}
