"""Interventions and the run of the prompt: the layer that they change first, and choices that they make from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

from focuslens.hooks import Cursor, HookTarget, Intervention, layer_of, on_prompt
from focuslens.model.generation import Prefix
from focuslens.prompts.batch import PromptBatch

__all__ = ["first_layer", "needs_prefix", "resolved"]


def needs_prefix(intervention: Any) -> bool:
    """Whether an intervention chooses from a prefix, by its method ``resolve(model, prefix, max_new_tokens)``.

    The method returns the batch of the prefix, with further spans, and the intervention to apply.
    """
    return hasattr(intervention, "resolve")


def resolved(
    model: HookTarget, prefix: Prefix, interventions: Sequence[Intervention], max_new_tokens: int
) -> tuple[Prefix, tuple[Intervention, ...]]:
    """The prefix and the interventions after all choices.

    Args:
        model: The model.
        prefix: Prefix of the prompts.
        interventions: Interventions of which some may choose.
        max_new_tokens: Maximum length of a response, in tokens.
    """
    applied: list[Intervention] = []
    for item in interventions:
        if needs_prefix(item):
            batch, chosen = cast("Any", item).resolve(model, prefix, max_new_tokens)
            prefix = replace(prefix, batch=batch)
            applied.append(chosen)
        else:
            applied.append(item)
    return prefix, tuple(applied)


def first_layer(model: HookTarget, interventions: Sequence[Intervention], batch: PromptBatch) -> int:
    """First layer in which interventions change rows of the prompt; ``n_layers`` if none of them changes the prompt.

    The result is -1 if an intervention acts outside the layers, for example on the embedding.
    """
    hooks = [hook for item in on_prompt(interventions) for hook in item.hooks(model, batch, cursor=Cursor(0))]
    layers = [layer_of(name) for name, _ in hooks]
    return min((-1 if layer is None else layer for layer in layers), default=model.shape.n_layers)
