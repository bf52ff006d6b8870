"""Filter of documents: only the documents that given heads attend to from the question stay in the prompt."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from focuslens.evaluation.methods.interventions import checked_beside
from focuslens.evaluation.methods.scaled_attention import ScaledAttention
from focuslens.heads import Head, as_heads, check_heads
from focuslens.hooks import Intervention
from focuslens.model.generation import Generation
from focuslens.model.question_rows import QuestionRows, check_rows, question_attention
from focuslens.prompts.batch import EncodedPrompt, PromptBatch
from focuslens.prompts.prompt import Span
from focuslens.prompts.rewriting import removed_documents
from focuslens.util.checks import checked_integer, checked_number

if TYPE_CHECKING:
    from focuslens.model.focus_model import FocusModel

__all__ = ["DocumentFilter"]


@dataclass(frozen=True)
class DocumentFilter:
    """Answers from the documents that heads attend to most from the question.

    This is the first stage of CAFE (arXiv 2505.10063). The score of a document is the attention from the question's
    rows to its tokens: the mean over rows, and the sum over tokens and heads. The prompt is written anew without the
    other documents. The documents that stay keep their order and their numbers, as in the ``gold`` prompts of a sample.

    CAFE's second stage steers attention to the best of these documents. ``steer`` does this as PASTA does (arXiv
    2311.02262): in all rows of the heads, attention weights of all tokens of the prompt outside the best documents are
    multiplied by ``steer``, and the weights of a row are divided by their sum. The best documents also have the span
    ``attended``, so that any intervention of the setting can act on them.

    Interventions act on the answers to the new prompts.

    Args:
        heads: ``(layer, head)`` pairs that rank the documents, and whose attention is steered.
        top: Number of documents that stay. All documents stay if a prompt has no more.
        rows: Rows that rank: those of the ``question``, the ``tail`` from the question on, or the ``last``.
        steer: Factor of the attention to everything but the best documents, such as PASTA's 0.01; ``None`` for no
            steering.
        best: Number of documents to steer to.

    Raises:
        TypeError: If a value has another type.
        ValueError: If there are no heads, or if a number is out of range.
    """

    heads: tuple[Head, ...]
    top: int = 5
    rows: QuestionRows = "question"
    steer: float | None = None
    best: int = 1

    def __init__(
        self,
        heads: Iterable[tuple[int, int]],
        top: int = 5,
        *,
        rows: QuestionRows = "question",
        steer: float | None = None,
        best: int = 1,
    ) -> None:
        check_rows(rows)
        counts = {name: checked_integer(value, name) for name, value in (("top", top), ("best", best))}
        for name, count in counts.items():
            if count < 1:
                raise ValueError(f"{name} is {count}; it must be at least 1")
        factor = None if steer is None else checked_number(steer, "steer")
        if factor is not None and not 0 < factor < math.inf:
            raise ValueError(f"steer is {factor}; it must be a finite number above 0 (1 changes nothing)")
        for name, value in {"heads": as_heads(heads), "rows": rows, "steer": factor, **counts}.items():
            object.__setattr__(self, name, value)
        if not self.heads:
            raise ValueError("there are no heads to rank documents by; give at least one, such as scores.top_heads(16)")

    def describe(self) -> dict[str, Any]:
        """Kind and settings of the method as JSON values."""
        return {
            "kind": "document_filter",
            "top": self.top,
            "rows": self.rows,
            "steer": self.steer,
            "best": self.best,
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
            batch: The prompts, with a text and the spans ``document`` and ``question``.
            interventions: Interventions on the runs that generate. Their spans are names.
            max_new_tokens: Maximum length of a response, in tokens.

        Raises:
            ValueError: If the text of a prompt is unknown, if a head does not exist, or if an intervention acts on
                token positions.
            KeyError: If a prompt lacks a span.
            TypeError: If ``interventions`` is not a sequence of interventions.
        """
        interventions = checked_beside(self, interventions)
        filtered = PromptBatch.of(self.filtered(model, batch))
        if self.steer is not None:
            attended = filtered.columns("attended", filtered.width)
            # A prompt without documents has nothing to steer to.
            factors = torch.where(attended | ~attended.any(dim=1, keepdim=True), 1.0, self.steer)
            interventions = (*interventions, ScaledAttention(self.heads, factors))
        prefix = model.prefill(filtered, interventions, hold_last=True)
        return model.decode(prefix, interventions, max_new_tokens=max_new_tokens)

    def filtered(self, model: FocusModel, batch: PromptBatch) -> list[EncodedPrompt]:
        """The prompts with their best documents, and the further span ``attended``."""
        rankings = self.rankings(model, batch)
        return [self._filtered(model, prompt, order) for prompt, order in zip(batch.prompts, rankings, strict=True)]

    def rankings(self, model: FocusModel, batch: PromptBatch) -> list[list[int]]:
        """Indices of the documents of each prompt, the most attended first."""
        heads = check_heads(self.heads, model.shape.n_layers, model.shape.n_heads)
        documents = [prompt.resolve("document") for prompt in batch.prompts]
        prefix = model.prefill(batch, hold_last=True)
        attention = question_attention(model, prefix, heads, self.rows).attention.double().sum(dim=1)
        rankings: list[list[int]] = []
        for row, padding, spans in zip(attention, batch.padding, documents, strict=True):
            scores = [float(row[padding + start : padding + end].sum()) for start, end in spans]
            rankings.append(sorted(range(len(spans)), key=lambda i: -scores[i]))
        return rankings

    def _filtered(self, model: FocusModel, prompt: EncodedPrompt, order: Sequence[int]) -> EncodedPrompt:
        kept = sorted(order[: self.top])
        filtered = model.encoder.rewritten(prompt, removed_documents(prompt, kept))
        places = sorted(kept.index(i) for i in order[: min(self.best, self.top)])

        def best(spans: Sequence[Span]) -> tuple[Span, ...]:
            return tuple(spans[place] for place in places)

        return replace(
            filtered,
            spans={**filtered.spans, "attended": best(filtered.spans["document"])},
            characters={**filtered.characters, "attended": best(filtered.characters["document"])},
        )
