"""Interventions beside a method that writes prompts anew."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from focuslens.hooks import Intervention, checked_interventions
from focuslens.model.resolving import needs_prefix, resolved
from focuslens.prompts.batch import PromptBatch

if TYPE_CHECKING:
    from focuslens.model.focus_model import FocusModel

__all__ = ["checked_beside", "resolved_for"]


def checked_beside(method: Any, interventions: Sequence[Intervention]) -> tuple[Intervention, ...]:
    """The interventions, none of which acts on a range of token positions of the prompts as they were.

    Raises:
        ValueError: If an intervention has such a range.
        TypeError: If ``interventions`` is not a sequence of interventions.
    """
    checked = checked_interventions(interventions)
    for item in checked:
        span = getattr(item, "span", None)
        if span is not None and not isinstance(span, str):
            raise ValueError(
                f"{type(item).__name__} acts on the token positions {span!r}, and {type(method).__name__} runs prompts "
                "with other tokens; let the intervention act on a named span, such as 'document'"
            )
    return checked


def resolved_for(
    model: FocusModel, batch: PromptBatch, interventions: tuple[Intervention, ...], max_new_tokens: int
) -> tuple[PromptBatch, tuple[Intervention, ...]]:
    """The prompts and the interventions after the choices of interventions such as :class:`SelfFocus`.

    The prompts run once more if there is such an intervention.
    """
    if not any(needs_prefix(item) for item in interventions):
        return batch, interventions
    prefix = model.prefill(batch, interventions, hold_last=True)
    prefix, chosen = resolved(model, prefix, interventions, max_new_tokens)
    return prefix.batch, chosen
