"""SelfElicit: sentences that upper layers attend to are marked in the prompt, which is then answered."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange, reduce
from jaxtyping import Float
from torch import Tensor

from focuslens.evaluation.methods.interventions import checked_beside
from focuslens.heads import Head
from focuslens.hooks import Intervention
from focuslens.model.generation import Generation
from focuslens.model.question_rows import question_attention
from focuslens.prompts.batch import EncodedPrompt, PromptBatch
from focuslens.prompts.rewriting import Edit
from focuslens.util.checks import checked_number, checked_text

if TYPE_CHECKING:
    from focuslens.model.focus_model import FocusModel

__all__ = ["SelfElicit"]

_SHORTEST = 6
"""Minimum number of characters, without spaces, of a sentence that is marked."""

_NOTE = (
    "The most important sentences are between {start} and {end}. Pay attention to them, answer briefly, and leave out "
    "the markers."
)


@dataclass(frozen=True)
class SelfElicit:
    """Answers to prompts whose most attended sentences are marked (SelfElicit, arXiv 2502.08767).

    The row of the prompt's last token is read in the upper layers. The attention to the documents is averaged over the
    heads of a layer, divided by its sum, and averaged over the layers. The score of a sentence is the mean over its
    tokens. Markers are written around sentences with at least ``alpha`` of the largest score, and a note about the
    markers into the instruction, or before the question if the prompt has no span ``instruction``.

    The authors' code differs in three ways: it rewrites the documents with one sentence per line, spaCy finds its
    sentences, and its instruction has other words. Here, the text stays as it is except for markers and note, and
    sentences end as :meth:`PromptEncoder.sentences` describes. As in the authors' code, sentences with less than six
    characters are not marked.

    Interventions act on the answers to the marked prompts.

    Args:
        alpha: Fraction of the largest score that a sentence needs, from 0 (all sentences are marked) to 1.
        layers: Part of the layers to read, as fractions of their number.
        markers: Texts before and after a sentence.
        note: Text about the markers, with ``{start}`` and ``{end}`` in place of the markers.

    Raises:
        TypeError: If a value has another type.
        ValueError: If ``alpha`` or ``layers`` is out of range, or if a text is empty.
    """

    alpha: float = 0.5
    layers: tuple[float, float] = (0.5, 1.0)
    markers: tuple[str, str] = ("<START_IMPORTANT>", "<END_IMPORTANT>")
    note: str = _NOTE

    def __post_init__(self) -> None:
        alpha = checked_number(self.alpha, "alpha")
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha is {alpha}; it must be a number from 0 to 1")
        object.__setattr__(self, "alpha", alpha)
        for name, example in (("layers", "(0.5, 1.0)"), ("markers", "('<b>', '</b>')")):
            pair = getattr(self, name)
            if isinstance(pair, str) or not isinstance(pair, Sequence) or len(pair) != 2:
                raise TypeError(f"{name} is {pair!r:.80}; it must be a pair, such as {example}")
        first, last = (checked_number(share, "layers") for share in self.layers)
        if not 0 <= first < last <= 1:
            raise ValueError(f"layers is {self.layers}; it must be two fractions with 0 <= first < last <= 1")
        object.__setattr__(self, "layers", (first, last))
        object.__setattr__(
            self, "markers", tuple(checked_text(text, "markers", may_be_empty=False) for text in self.markers)
        )
        checked_text(self.note, "note", may_be_empty=False)

    def describe(self) -> dict[str, Any]:
        """Kind and settings of the method as JSON values."""
        return {
            "kind": "self_elicit",
            "alpha": self.alpha,
            "layers": list(self.layers),
            "markers": list(self.markers),
            "note": self.note,
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
            batch: The prompts, with a text, the span ``document``, and the span ``instruction`` or ``question``.
            interventions: Interventions on the runs that generate. Their spans are names.
            max_new_tokens: Maximum length of a response, in tokens.

        Raises:
            ValueError: If the text or the documents of a prompt are unknown, if no layer is chosen, if a marked prompt
                does not fit the context, or if an intervention acts on token positions.
            TypeError: If ``interventions`` is not a sequence of interventions.
        """
        interventions = checked_beside(self, interventions)
        marked = PromptBatch.of(self.marked(model, batch))
        prefix = model.prefill(marked, interventions, hold_last=True)
        return model.decode(prefix, interventions, max_new_tokens=max_new_tokens)

    def marked(self, model: FocusModel, batch: PromptBatch) -> list[EncodedPrompt]:
        """The prompts with markers and note."""
        for prompt in batch.prompts:
            _require_parts(prompt)
        attention = self._attention(model, batch)
        return [
            self._marked(model, prompt, row[padding:])
            for prompt, row, padding in zip(batch.prompts, attention, batch.padding, strict=True)
        ]

    def _attention(self, model: FocusModel, batch: PromptBatch) -> Float[Tensor, "batch column"]:
        """Attention to the documents, averaged over the layers. It sums to 1 per prompt."""
        first, last = (int(share * model.shape.n_layers) for share in self.layers)
        if first == last:
            raise ValueError(f"layers {self.layers} of {model.shape.n_layers} layers are none; give a larger part")
        heads = [Head(layer, head) for layer in range(first, last) for head in range(model.shape.n_heads)]
        read = question_attention(model, model.prefill(batch, hold_last=True), heads, "last").attention.double()
        means = reduce(read, "batch (layer head) column -> batch layer column", "mean", head=model.shape.n_heads)
        inside = torch.where(rearrange(batch.columns("document", batch.width), "b column -> b 1 column"), means, 0.0)
        return reduce(inside / inside.sum(dim=-1, keepdim=True), "batch layer column -> batch column", "mean")

    def _marked(self, model: FocusModel, prompt: EncodedPrompt, attention: Float[Tensor, "pos"]) -> EncodedPrompt:
        sentences = model.encoder.sentence_spans(prompt)
        scores = torch.stack([attention[start:end].mean() for _, (start, end) in sentences])
        edits = [self._note(prompt)]
        for ((start, end), _), is_chosen in zip(sentences, (scores >= self.alpha * scores.max()).tolist(), strict=True):
            if is_chosen and len(prompt.text[start:end].replace(" ", "")) >= _SHORTEST:
                edits += [Edit(start, start, f"{self.markers[0]} "), Edit(end, end, f" {self.markers[1]}", closes=True)]
        return model.encoder.rewritten(prompt, edits)

    def _note(self, prompt: EncodedPrompt) -> Edit:
        """Insertion of the note at the end of the instruction, or on a line before the question."""
        note = self.note.replace("{start}", self.markers[0]).replace("{end}", self.markers[1])
        if instruction := prompt.characters.get("instruction"):
            return Edit(instruction[-1][1], instruction[-1][1], f" {note}", closes=True)
        question = prompt.characters["question"][0][0]
        line = prompt.text.rfind("\n", 0, question) + 1
        return Edit(line, line, f"{note}\n") if line else Edit(question, question, f"{note}\n")


def _require_parts(prompt: EncodedPrompt) -> None:
    """Raise ``ValueError`` unless the text of a prompt, its documents and its instruction or question are known."""
    if not prompt.text or not prompt.characters.get("document"):
        raise ValueError(
            "the prompt has no text with a span 'document', whose sentences could be marked; give sample.prompt(), or "
            "fl.Prompt(text, spans={'document': [(start, end), ...]}) with character positions"
        )
    if not (prompt.characters.get("instruction") or prompt.characters.get("question")):
        raise ValueError(
            "the prompt has no span 'instruction' or 'question', so there is no place for a note about the markers; "
            f"it has {sorted(prompt.characters)}"
        )
