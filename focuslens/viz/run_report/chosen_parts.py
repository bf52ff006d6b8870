"""Sentences on the parts of a prompt that interventions such as self-focus chose."""

from __future__ import annotations

from collections.abc import Sequence

from focuslens.hooks import Intervention
from focuslens.interventions.random_focus import RandomFocus
from focuslens.interventions.self_focus import SelfFocus
from focuslens.model.focus_model import FocusModel
from focuslens.prompts.batch import EncodedPrompt
from focuslens.prompts.prompt import Span
from focuslens.prompts.sample import MultiDocSample

__all__ = ["chosen_parts"]


def chosen_parts(model: FocusModel, sample: MultiDocSample, applied: Sequence[Intervention], limit: int) -> list[str]:
    """One text for each intervention that chooses parts, such as ``chosen: document 3 (share 0.82), gold``.

    Args:
        model: The model.
        sample: The sample, whose long prompt is answered.
        applied: Interventions, applied in order.
        limit: Maximum length of a whole answer, if the rows of a response choose.
    """
    choosing = [item for item in applied if isinstance(item, SelfFocus | RandomFocus)]
    if not choosing:
        return []
    prefix = model.prefill(sample.prompt("long"), applied, hold_last=True)
    (prompt,) = prefix.batch.prompts
    texts: list[str] = []
    for item in choosing:
        if isinstance(item, SelfFocus):
            (choice,) = item.choose(model, prefix, limit)
            parts = [(choice.parts[i], f" (share {choice.shares[i]:.2f})") for i in choice.chosen]
        else:
            batch, split = item.resolve(model, prefix)
            parts = [(span, " (at random)") for span in batch.prompts[0].spans[str(getattr(split, "span", ""))]]
        named = [f"{_name(prompt, part)}{detail}{_gold(prompt, part)}" for part, detail in parts]
        texts.append(f"chosen: {'; '.join(named) or 'no part, since the choice is not sure'}")
    return texts


def _name(prompt: EncodedPrompt, part: Span) -> str:
    documents = prompt.spans["document"]
    return f"document {documents.index(part) + 1}" if part in documents else f"tokens {part[0]} to {part[1] - 1}"


def _gold(prompt: EncodedPrompt, part: Span) -> str:
    """Whether a part overlaps the relevant document, as the end of a sentence."""
    gold = any(start < part[1] and part[0] < end for start, end in prompt.spans["relevant"])
    return ", gold" if gold else ", not gold"
