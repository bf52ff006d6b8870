"""Methods that edit prompts, logits or decoding, against loops over Hugging Face's eager attention in float64.

The loops follow the equations and the procedures of the methods' authors. They use no cache and no code of FocusLens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

import focuslens as fl
from tests.support.reference import (
    INSTRUCTION,
    Edits,
    ReferenceModel,
    document_ranges,
    gap,
    prompt_text,
    tokens_of_ranges,
)
from tests.support.tiers import first_quick

if TYPE_CHECKING:
    from focuslens import MultiDocSample

FAMILIES = pytest.mark.parametrize("family", first_quick(["llama", "llama_chat", "qwen2", "qwen3"]))
NEW = 6
STOP = 1
TOLERANCE = {"bridge": 1e-4, "hooked": 2e-3}
"""Largest difference between logits that counts as rounding, per backend; see ``logit_tolerance``. A method adds two
logits with weights up to 3."""


def greedy(step: Callable[[list[int]], Tensor], new: int = NEW) -> tuple[list[int], list[Tensor]]:
    """Response tokens before the stop token, and the logits of each step."""
    response: list[int] = []
    logits: list[Tensor] = []
    for _ in range(new):
        logits.append(step(response))
        token = int(logits[-1].argmax())
        if token == STOP:
            break
        response.append(token)
    return response, logits


def last_logits(hf: ReferenceModel, prompt: Tensor, response: list[int]) -> Tensor:
    return hf.logits(torch.cat((prompt, torch.tensor(response, dtype=torch.long))))[-1].double()


def greedy_response(hf: ReferenceModel, prompt: str) -> list[int]:
    ids = hf.ids(prompt)
    return greedy(lambda response: last_logits(hf, ids, response))[0]


# --- context-aware decoding ---


def divergence(first: Tensor, second: Tensor) -> float:
    """Jensen-Shannon divergence in nats, token by token."""
    p, q = first.softmax(dim=-1).tolist(), second.softmax(dim=-1).tolist()
    mean = [(a + b) / 2 for a, b in zip(p, q, strict=True)]
    sums = [math.fsum(a * math.log(a / m) for a, m in zip(x, mean, strict=True) if a > 0) for x in (p, q)]
    return (sums[0] + sums[1]) / 2


def context_aware(
    hf: ReferenceModel, sample: MultiDocSample, alpha: float | None, floor: float
) -> tuple[list[int], list[Tensor], list[float]]:
    """Tokens and logits of context-aware decoding, and the weight of each step."""
    weights: list[float] = []
    own = hf.ids(prompt_text(sample, "long"))
    without = hf.ids(f"{INSTRUCTION}\n\nQuestion: {sample.question}\nAnswer:")

    def step(response: list[int]) -> Tensor:
        first, second = last_logits(hf, own, response), last_logits(hf, without, response)
        weights.append(max(divergence(first, second), floor) if alpha is None else alpha)
        return (1 + weights[-1]) * first - weights[-1] * second

    return *greedy(step), weights


@FAMILIES
@pytest.mark.parametrize(("alpha", "floor"), [(1.0, 0.0), (0.5, 0.0), (None, 0.0), (None, 0.4)])
def test_context_aware_decoding(
    family: str,
    alpha: float | None,
    floor: float,
    backend: str,
    load_model: Any,
    reference: Any,
    samples: list[MultiDocSample],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, hf = load_model(family, backend), reference(family, torch.float64)
    method = fl.ContextAwareDecoding(alpha, floor)
    logits: list[Tensor] = []
    combined = fl.ContextAwareDecoding.combined

    def record(self: Any, *rows: Tensor) -> Tensor:
        logits.append(combined(self, *rows))
        return logits[-1]

    monkeypatch.setattr(fl.ContextAwareDecoding, "combined", record)
    chosen = samples[1:3]
    batched = method.respond(model, model.batch([sample.prompt() for sample in chosen]), max_new_tokens=NEW)
    together, logits = logits, []
    plain = [response.tokens.tolist() for response in model.generate([s.prompt() for s in chosen], max_new_tokens=NEW)]
    expected = [context_aware(hf, sample, alpha, floor) for sample in chosen]
    for i, (sample, (tokens, steps, weights)) in enumerate(zip(chosen, expected, strict=True)):
        logits.clear()
        (alone,) = method.respond(model, model.batch(sample.prompt()), max_new_tokens=NEW)
        assert alone.tokens.tolist() == batched[i].tokens.tolist() == tokens
        assert alone.finished == (len(tokens) < NEW)
        for step, wanted in enumerate(steps):
            assert gap(logits[step][0], wanted) < TOLERANCE[backend]
            assert gap(together[step][i], wanted) < TOLERANCE[backend]
        assert all(0 <= weight <= math.log(2) for weight in weights) or alpha is not None
    # The test shows nothing unless the method changes a response.
    assert [tokens for tokens, _, _ in expected] != plain


# --- SelfElicit ---


def marked_prompt(hf: ReferenceModel, sample: MultiDocSample, alpha: float, note: str) -> tuple[str, list[float]]:
    """The marked prompt, and the score of each document, which is one sentence."""
    prompt = prompt_text(sample, "long")
    offsets, patterns = hf.offsets(prompt), hf.patterns(hf.ids(prompt)).double()
    ranges = document_ranges(sample, hf.text(prompt))
    tokens = [tokens_of_ranges(offsets, ranges[i]) for i in range(len(sample.documents))]
    inside = [token for document in tokens for token in document]
    layers = range(int(0.5 * len(patterns)), len(patterns))
    shares = []
    for layer in layers:
        row = patterns[layer, :, -1].mean(dim=0)
        shares.append(row / row[inside].sum())
    mean = torch.stack(shares).mean(dim=0)
    scores = [float(mean[document].mean()) for document in tokens]
    lines = []
    for i, document in enumerate(sample.documents):
        text = f"(Title: {document.title}) {document.text}"
        if scores[i] >= alpha * max(scores):
            text = f"<START_IMPORTANT> {text} <END_IMPORTANT>"
        lines.append(f"Document [{i + 1}]{text}")
    documents = "\n".join(lines)
    return f"{INSTRUCTION} {note}\n\n{documents}\n\nQuestion: {sample.question}\nAnswer:", scores


@FAMILIES
@pytest.mark.parametrize("alpha", [0.5, 0.9])
def test_self_elicit(
    family: str, alpha: float, backend: str, load_model: Any, reference: Any, samples: list[MultiDocSample]
) -> None:
    model, hf = load_model(family, backend), reference(family, torch.float64)
    method = fl.SelfElicit(alpha, note="Read between {start} and {end}.")
    note = "Read between <START_IMPORTANT> and <END_IMPORTANT>."
    batch = model.batch([sample.prompt() for sample in samples])
    marked = method.marked(model, batch)
    batched = method.respond(model, batch, max_new_tokens=NEW)
    for i, sample in enumerate(samples):
        text, scores = marked_prompt(hf, sample, alpha, note)
        # No score is so close to the limit that rounding decides.
        assert min(abs(score - alpha * max(scores)) for score in scores) > 1e-5 * max(scores)
        assert marked[i].text == hf.text(text)
        tokens = greedy_response(hf, text)
        (alone,) = method.respond(model, model.batch(sample.prompt()), max_new_tokens=NEW)
        assert alone.tokens.tolist() == batched[i].tokens.tolist() == tokens
        parts = [marked[i].text[start:end] for start, end in marked[i].characters["document"]]
        assert [part.startswith("<START_IMPORTANT> (Title") for part in parts] == [
            score >= alpha * max(scores) for score in scores
        ]
    assert (
        0
        < sum(prompt.text.count("<START_IMPORTANT> (") for prompt in marked)
        < sum(len(sample.documents) for sample in samples)
    )


# --- filter of documents ---

HEADS = [(0, 3), (1, 2), (2, 0)]


def ranked(hf: ReferenceModel, sample: MultiDocSample) -> list[int]:
    """Documents by the attention of the question's rows, summed over tokens and heads, the most attended first."""
    prompt = prompt_text(sample, "long")
    offsets, text, patterns = hf.offsets(prompt), hf.text(prompt), hf.patterns(hf.ids(prompt)).double()
    start, ranges = text.rindex(sample.question), document_ranges(sample, text)
    rows = tokens_of_ranges(offsets, (start, start + len(sample.question)))
    scores = [
        math.fsum(
            float(patterns[layer, head, row, key]) / len(rows)
            for layer, head in HEADS
            for row in rows
            for key in tokens_of_ranges(offsets, ranges[i])
        )
        for i in range(len(sample.documents))
    ]
    return sorted(range(len(scores)), key=lambda i: scores[i], reverse=True)


def scaled(factor: float, span: list[int], n_prompt: int) -> Edits:
    """PASTA: attention of the heads to tokens of the prompt outside the span times a factor, in every row."""

    def scale(layer: int, pattern: Tensor, first: int) -> Tensor:
        result = pattern.clone()
        for head in (head for where, head in HEADS if where == layer):
            for row in range(pattern.shape[2]):
                weights = pattern[0, head, row].tolist()
                changed = [w * (factor if j < n_prompt and j not in span else 1) for j, w in enumerate(weights)]
                result[0, head, row] = torch.tensor([w / math.fsum(changed) for w in changed], dtype=pattern.dtype)
        return result

    return Edits(pattern=scale)


@FAMILIES
@pytest.mark.parametrize(("top", "steer", "best"), [(2, None, 1), (3, 0.01, 1), (3, 0.2, 2)])
def test_document_filter(
    family: str,
    top: int,
    steer: float | None,
    best: int,
    backend: str,
    load_model: Any,
    reference: Any,
    samples: list[MultiDocSample],
) -> None:
    model, hf = load_model(family, backend), reference(family, torch.float64)
    method, chosen = fl.DocumentFilter(HEADS, top, steer=steer, best=best), samples[2:]
    batch = model.batch([sample.prompt() for sample in chosen])
    filtered = method.filtered(model, batch)
    batched = method.respond(model, batch, max_new_tokens=4)
    changed = False
    for i, sample in enumerate(chosen):
        order = ranked(hf, sample)
        lines = [
            f"Document [{n + 1}](Title: {sample.documents[n].title}) {sample.documents[n].text}"
            for n in sorted(order[:top])
        ]
        prompt = f"{INSTRUCTION}\n\n" + "\n".join(lines) + f"\n\nQuestion: {sample.question}\nAnswer:"
        assert filtered[i].text == hf.text(prompt)
        ids, ranges = hf.ids(prompt), document_ranges(sample, hf.text(prompt))
        span = [token for n in order[:best] for token in tokens_of_ranges(hf.offsets(prompt), ranges[n])]
        edits = None if steer is None else scaled(steer, span, len(ids))

        def step(response: list[int], ids: Tensor = ids, edits: Edits | None = edits) -> Tensor:
            return hf.logits(torch.cat((ids, torch.tensor(response, dtype=torch.long))), edits)[-1]

        expected, _ = greedy(step, 4)
        (alone,) = method.respond(model, model.batch(sample.prompt()), max_new_tokens=4)
        assert alone.tokens.tolist() == batched[i].tokens.tolist() == expected
        changed = changed or expected != greedy_response(hf, prompt)[:4]
    assert changed == (steer is not None)


# --- DySCO ---


class Rescaled:
    """DySCO step by step, without a cache: each row that has run keeps the factors with which it ran."""

    def __init__(self, hf: ReferenceModel, ids: Tensor, template: Tensor, settings: dict[str, Any]) -> None:
        self.hf, self.ids, self.template, self.settings = hf, ids, template, settings
        self.factors: dict[int, Tensor] = {}
        self.relevance: Tensor | None = None

    def edits(self) -> Edits:
        def scale(layer: int, pattern: Tensor, first: int) -> Tensor:
            logits = pattern.log()
            for row, factors in self.factors.items():
                if row < pattern.shape[2]:
                    logits[0, :, row, : row + 1] += factors.log()
            return logits.softmax(dim=-1)

        return Edits(pattern=scale)

    def read(self, tokens: Tensor) -> None:
        """Add the attention of the newest row, which is not scaled yet, to the relevance."""
        patterns = self.hf.patterns(tokens, self.edits()).double()
        attention = torch.stack([patterns[layer, head, -1] for layer, head in HEADS]).mean(dim=0)
        if self.relevance is not None:
            attention[:-1] += self.settings["decay"] * self.relevance
        self.relevance = attention / attention.sum()

    def scale(self, row: int) -> None:
        """Choose tokens for the newest row, as the authors' nucleus does, and keep its factors."""
        assert self.relevance is not None
        relevance: list[float] = self.relevance.tolist()
        order = sorted(range(len(relevance)), key=lambda i: relevance[i], reverse=True)
        total, chosen = 0.0, [order[0]]
        for place, token in enumerate(order):
            total += relevance[token]
            if total <= self.settings["top_p"] and place:
                chosen.append(token)
        chosen = chosen if len(chosen) <= self.settings["top_k"] else order[: self.settings["top_k"]]
        self.factors[row] = torch.ones(row + 1, dtype=torch.float64)
        for token in chosen:
            if token >= len(self.template) or not self.template[token]:
                self.factors[row][token] = self.settings["strength"]
        self.factors[row][row] = self.settings["strength"]

    def run(self, new: int, warmup: int) -> tuple[list[int], list[Tensor]]:
        """Response and logits. ``warmup`` is the number of rows at the template's end."""
        n = len(self.ids)
        for row in range(n - warmup - self.settings["context_rows"], n - 1):
            self.read(self.ids[: row + 1])
            # The authors' loop counts the tokens so far, of which there are row + 1.
            if row + 1 >= n - warmup:
                self.scale(row)

        def step(response: list[int]) -> Tensor:
            tokens = torch.cat((self.ids, torch.tensor(response, dtype=torch.long)))
            self.read(tokens)
            self.scale(len(tokens) - 1)
            return self.hf.logits(tokens, self.edits())[-1]

        return greedy(step, new)


@FAMILIES
@pytest.mark.parametrize(
    "settings",
    [
        {"strength": 2.0, "decay": 0.75, "top_p": 0.9, "top_k": 4096, "context_rows": 8},
        {"strength": 20.0, "decay": 0.3, "top_p": 0.975, "top_k": 7, "context_rows": 5},
    ],
    ids=["nucleus", "most"],
)
def test_dysco(
    family: str,
    settings: dict[str, Any],
    backend: str,
    load_model: Any,
    reference: Any,
    samples: list[MultiDocSample],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, hf = load_model(family, backend), reference(family, torch.float64)
    method, chosen = fl.DySCO(HEADS, **settings), samples[2:]
    logits: list[Tensor] = []
    monkeypatch.setattr(model, "_require_numbers", lambda rows: logits.append(rows.clone()))
    batched = method.respond(model, model.batch([sample.prompt() for sample in chosen]), max_new_tokens=4)
    differs = False
    for i, sample in enumerate(chosen):
        prompt = prompt_text(sample, "long")
        ids, offsets, text = hf.ids(prompt), hf.offsets(prompt), hf.text(prompt)
        own = tokens_of_ranges(offsets, (text.index(prompt), text.index(prompt) + len(prompt)))
        template = torch.tensor([token not in own for token in range(len(ids))])
        begins = {"llama": None, "llama_chat": "[assistant]\n"}.get(family, "<|im_start|>assistant\n")
        warmup = 2 if begins is None else len(hf.tokenizer(begins, add_special_tokens=False)["input_ids"])
        expected, steps = Rescaled(hf, ids, template, settings).run(4, warmup)
        logits.clear()
        (alone,) = method.respond(model, model.batch(sample.prompt()), max_new_tokens=4)
        assert alone.tokens.tolist() == batched[i].tokens.tolist() == expected
        for found, wanted in zip(logits, steps, strict=True):
            assert gap(found[0], wanted) < TOLERANCE[backend]
        differs = differs or gap(steps[0], last_logits(hf, ids, [])) > 0.01
    assert differs
