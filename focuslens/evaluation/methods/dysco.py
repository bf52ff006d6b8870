"""DySCO: at each step, attention to the tokens that retrieval heads attend to is raised in all heads."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from focuslens.evaluation.methods.interventions import resolved_for
from focuslens.evaluation.methods.scaled_attention import ScaledAttention
from focuslens.heads import Head, as_heads, check_heads, heads_by_layer
from focuslens.hooks import Cursor, Hook, Intervention, checked_interventions, hook_name, on_prompt
from focuslens.model.generation import Generation, Prefix, identity_of
from focuslens.prompts.batch import PromptBatch
from focuslens.util.checks import checked_integer, checked_number, integers

if TYPE_CHECKING:
    from focuslens.model.focus_model import FocusModel
    from focuslens.model.passes import Step

__all__ = ["DySCO"]

_WITHOUT_TEMPLATE = 2
"""Value of ``template_rows`` for prompts without a chat template, as in the authors' evaluation."""


@dataclass(frozen=True)
class DySCO:
    r"""Decoding in which each row attends more to the tokens that retrieval heads have attended to (arXiv 2602.22175).

    The last rows of a prompt and the rows of the response run one by one. With the mean attention :math:`a_t` of the
    heads in row :math:`t`, the relevance of the tokens is :math:`r_t \propto a_t + \text{decay} \cdot r_{t-1}`, and
    sums to 1. The first rows only add to the relevance. Each later row runs twice. The first pass, up to the last of
    the heads, reads :math:`a_t`. The second pass adds :math:`\log \text{strength}` to the attention logits of the
    chosen tokens and of the newest token, in all heads of all layers. Its keys and values are those that later rows
    see.

    The most relevant tokens are chosen while their relevance sums to at most ``top_p``, at most ``top_k`` tokens and at
    least one. Tokens of the chat template and special tokens are then left out.

    As in the authors' code, the ``context_rows`` include the row before the template's end, which is scaled already:
    ``context_rows - 1`` rows are only read. A prompt that has no more rows than needed is read from its first row on.

    Prompts run one after another. Interventions act in both passes.

    Args:
        heads: ``(layer, head)`` pairs of the heads whose attention is read.
        strength: Factor of the chosen attention weights before they are normalised. 1 is plain generation.
        decay: Weight of the earlier relevance.
        top_p: Largest sum of the relevance of the chosen tokens; ``None`` for no limit.
        top_k: Maximum number of chosen tokens; ``None`` for no limit.
        context_rows: Number of prompt rows before the template's end that run one by one.
        template_rows: Number of rows at the template's end; by default the number of tokens with which the chat
            template begins a response, or 2 without a chat template.
        template: Token sequences to leave out of the choice, as in the authors' configurations; by default all special
            tokens and the chat template around the prompt.

    Raises:
        TypeError: If a value has another type.
        ValueError: If there are no heads, a number is out of range, or neither ``top_p`` nor ``top_k`` is given.
    """

    heads: tuple[Head, ...]
    strength: float = 2.0
    decay: float = 0.75
    top_p: float | None = 0.975
    top_k: int | None = 4096
    context_rows: int = 8
    template_rows: int | None = None
    template: tuple[tuple[int, ...], ...] | None = None

    def __init__(
        self,
        heads: Iterable[tuple[int, int]],
        *,
        strength: float = 2.0,
        decay: float = 0.75,
        top_p: float | None = 0.975,
        top_k: int | None = 4096,
        context_rows: int = 8,
        template_rows: int | None = None,
        template: Sequence[Sequence[int]] | None = None,
    ) -> None:
        sequences = None if template is None else tuple(tuple(integers(ids, "template")) for ids in template)
        values: dict[str, Any] = {
            "heads": as_heads(heads),
            "strength": _number(strength, "strength", above=0),
            "decay": _number(decay, "decay"),
            "top_p": None if top_p is None else _number(top_p, "top_p", above=0, most=1),
            "top_k": None if top_k is None else _count(top_k, "top_k", 1),
            "context_rows": _count(context_rows, "context_rows", 0),
            "template_rows": None if template_rows is None else _count(template_rows, "template_rows", 0),
            "template": sequences,
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)
        if not self.heads:
            raise ValueError("there are no heads to read; give at least one, such as scores.top_heads(16)")
        if self.top_p is None and self.top_k is None:
            raise ValueError("top_p and top_k are None, so all tokens would be chosen; give at least one of them")

    def describe(self) -> dict[str, Any]:
        """Kind and settings of the method as JSON values."""
        return {
            "kind": "dysco",
            "strength": self.strength,
            "decay": self.decay,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "context_rows": self.context_rows,
            "template_rows": self.template_rows,
            "template": None if self.template is None else [list(tokens) for tokens in self.template],
            "heads": [list(head) for head in self.heads],
        }

    def respond(
        self,
        model: FocusModel,
        batch: PromptBatch,
        interventions: Sequence[Intervention] = (),
        *,
        max_new_tokens: int = 100,
    ) -> list[Generation]:
        """One response per prompt.

        Args:
            model: The model.
            batch: The prompts.
            interventions: Interventions on all passes.
            max_new_tokens: Maximum length of a response, in tokens.

        Raises:
            ValueError: If a head does not exist, a prompt does not fit the context, or a sequence outgrows a rotary
                table.
            TypeError: If ``interventions`` is not a sequence of interventions.
        """
        check_heads(self.heads, model.shape.n_layers, model.shape.n_heads)
        batch, acting = resolved_for(model, batch, checked_interventions(interventions), max_new_tokens)
        runs = [_Run(self, model, PromptBatch.of([prompt]), acting) for prompt in batch.prompts]
        return [run.respond(max_new_tokens) for run in runs]

    def chosen(self, relevance: Float[Tensor, "column"]) -> Bool[Tensor, "column"]:
        """Mask of the most relevant tokens, from a relevance that sums to 1."""
        ordered, order = relevance.sort(descending=True, stable=True)
        n = len(order)
        if self.top_p is not None:
            n = max(1, int((ordered.cumsum(dim=0) <= self.top_p).sum()))
        mask = torch.zeros(len(order), dtype=torch.bool)
        mask[order[: n if self.top_k is None else min(n, self.top_k)]] = True
        return mask

    def template_mask(self, model: FocusModel, batch: PromptBatch) -> Bool[Tensor, "pos"]:
        """Mask of the tokens of one prompt that are never chosen."""
        (prompt,) = batch.prompts
        if self.template is None:
            return model.encoder.template_mask(prompt)
        mask = torch.zeros(len(prompt.tokens), dtype=torch.bool)
        for sequence in self.template:
            for start in range(len(mask) - len(sequence) + 1):
                if tuple(prompt.tokens[start : start + len(sequence)].tolist()) == sequence:
                    mask[start : start + len(sequence)] = True
        return mask


class _Run:
    """Run of one prompt and its response.

    Attributes:
        relevance: Relevance of the columns so far.
        first_scaled: First column whose row attends more to the chosen tokens.
    """

    def __init__(
        self, method: DySCO, model: FocusModel, batch: PromptBatch, interventions: Sequence[Intervention]
    ) -> None:
        self.method, self.model, self.batch, self.interventions = method, model, batch, tuple(interventions)
        rows = method.template_rows
        if rows is None:
            own = model.encoder.generation_prompt_length
            rows = _WITHOUT_TEMPLATE if own is None else own
        self.first = min(max(0, batch.width - rows - method.context_rows), batch.width - 1)
        self.first_scaled = batch.width - rows - 1
        self.relevance = torch.zeros(self.first, dtype=torch.float64)
        self._template = method.template_mask(model, batch)
        self._every_head = tuple(
            Head(layer, head) for layer in range(model.shape.n_layers) for head in range(model.shape.n_heads)
        )

    @torch.no_grad()
    def respond(self, max_new_tokens: int) -> Generation:
        model, width = self.model, self.batch.width
        model.require_room(width)
        tokens, mask = self.batch.tokens(model.pad_token), self.batch.mask()
        cache = model.backend.new_cache(1, width)
        if self.first:
            acting = on_prompt(self.interventions)
            model.run_prompts(acting, self.batch, tokens[:, : self.first], mask[:, : self.first], cache)
        for column in range(self.first, width - 1):
            self._row(tokens[:, column : column + 1], mask[:, : column + 1], cache)
        prefix = Prefix(
            self.batch, tokens[:, :-1], cache, mask[:, :-1], None, self.interventions, of=identity_of(model.hooked)
        )
        (response,) = model.decode(prefix, self.interventions, max_new_tokens=max_new_tokens, stepping=self._stepping)
        return response

    @contextmanager
    def _stepping(
        self,
        interventions: Sequence[Intervention],
        prompt: PromptBatch,
        cursor: Cursor,
        observers: Sequence[Hook],
        cache: Any,
        limit: int,
    ) -> Generator[Step]:
        """Passes of the rows that produce the response; see :meth:`PassRunner.stepping`."""
        yield lambda tokens, mask: self._row(tokens, mask, cache)

    def _row(self, tokens: Int[Tensor, "1 1"], mask: Int[Tensor, "1 column"], cache: Any) -> Float[Tensor, "1 d_vocab"]:
        """Logits of the newest row, which extends the cache and the relevance."""
        model, column, reading = self.model, mask.shape[1] - 1, _Reading(self.method.heads)
        if model.backend.outgrown(mask, 1):
            raise ValueError(
                f"the sequence outgrows a rotary table at {column + 1} tokens, and all keys would have to be computed "
                "again, without scaled attention; give DySCO a shorter prompt, or fewer new tokens"
            )
        if column < self.first_scaled:
            with model.intervened(self.interventions, self.batch, Cursor(column), reading.hooks()):
                logits = model.run(tokens, mask, cache, last_only=True)[:, -1]
            self._add(reading.mean())
            return logits
        with model.intervened(self.interventions, self.batch, Cursor(column), reading.hooks()):
            model.run_to(max(head.layer for head in self.method.heads), tokens, mask, model.backend.fork(cache))
        self._add(reading.mean())
        scaling = ScaledAttention(self._every_head, self._factors()[None])
        acting = self.interventions if self.method.strength == 1 else (*self.interventions, scaling)
        with model.intervened(acting, self.batch, Cursor(column)):
            return model.run(tokens, mask, cache, last_only=True)[:, -1]

    def _add(self, attention: Float[Tensor, "column"]) -> None:
        """Add the attention of the newest row to the relevance."""
        attention[:-1] += self.method.decay * self.relevance
        self.relevance = attention / attention.sum()

    def _factors(self) -> Float[Tensor, "column"]:
        """Factor of the attention to each column, in the newest row."""
        chosen = self.method.chosen(self.relevance)
        chosen[: len(self._template)] &= ~self._template[: len(chosen)]
        chosen[-1] = True
        return torch.where(chosen, self.method.strength, 1.0).double()


class _Reading:
    """Collector of the attention of the newest row of one sequence, for some heads."""

    def __init__(self, heads: Sequence[Head]) -> None:
        self._by_layer, self._n = heads_by_layer(heads), len(heads)
        self._sums: dict[int, Float[Tensor, "key"]] = {}

    def hooks(self) -> list[Hook]:
        """Hooks for a pass."""

        def reader(layer: int, heads: Int[Tensor, "chosen"]) -> Any:
            def read(pattern: Float[Tensor, "1 head row key"], hook: Any) -> None:
                self._sums[layer] = pattern[0, heads.to(pattern.device), -1].cpu().double().sum(dim=0)

            return read

        return [
            (hook_name(layer, "hook_pattern"), reader(layer, torch.as_tensor(heads)))
            for layer, heads in self._by_layer.items()
        ]

    def mean(self) -> Float[Tensor, "key"]:
        """Mean attention of the heads to each column."""
        return torch.stack(list(self._sums.values())).sum(dim=0) / self._n


def _number(value: Any, name: str, *, above: float | None = None, most: float = math.inf) -> float:
    number = checked_number(value, name)
    if not (math.isfinite(number) and number <= most and (number >= 0 if above is None else number > above)):
        lowest = "0 or more" if above is None else f"above {above}"
        highest = "" if most == math.inf else f" and at most {most:g}"
        raise ValueError(f"{name} is {number}; it must be a finite number, {lowest}{highest}")
    return number


def _count(value: Any, name: str, least: int) -> int:
    count = checked_integer(value, name)
    if count < least:
        raise ValueError(f"{name} is {count}; it must be at least {least}")
    return count
