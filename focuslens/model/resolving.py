"""Interventions and the run of the prompt: the layer that they change first, and choices that they make from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol, cast, runtime_checkable

from focuslens.hooks import Cursor, HookTarget, Intervention, PromptLike, layer_of, on_prompt
from focuslens.model.generation import Prefix
from focuslens.model.hook_points import own_passes
from focuslens.prompts.batch import PromptBatch

__all__ = ["first_layer", "needs_prefix", "resolved", "resolved_before"]


@runtime_checkable
class PromptRunner(Protocol):
    """Model that runs prompts; the part of :class:`ModelRunner` that is needed here."""

    def prefill(self, prompts: PromptLike, *, hold_last: bool = False) -> Prefix:
        """Run prompts once; see :meth:`ModelRunner.prefill`."""
        ...


def needs_prefix(intervention: Any) -> bool:
    """Whether an intervention chooses from a prefix, by its method ``resolve(model, prefix, max_new_tokens)``.

    The method returns the batch of the prefix, with further spans, and the intervention to apply.
    """
    return hasattr(intervention, "resolve")


def resolved(
    model: HookTarget, prefix: Prefix, interventions: Sequence[Intervention], max_new_tokens: int
) -> tuple[Prefix, tuple[Intervention, ...]]:
    """The prefix and the interventions after all choices from the prefix.

    An intervention that changes the prompt has chosen before the prefix was run; see :func:`resolved_before`.

    Args:
        model: The model.
        prefix: Prefix of the prompts.
        interventions: Interventions of which some may choose.
        max_new_tokens: Maximum length of a response, in tokens.
    """
    applied: list[Intervention] = []
    for item in interventions:
        # A choice can be an intervention that chooses in turn, such as a strength for the chosen part.
        while needs_prefix(item) and not item.changes_prompt:
            batch, item = cast("Any", item).resolve(model, prefix, max_new_tokens)
            prefix = replace(prefix, batch=batch)
        applied.append(item)
    return prefix, tuple(applied)


def resolved_before(
    model: PromptRunner, batch: PromptBatch, settings: Sequence[Sequence[Intervention]]
) -> list[Sequence[Intervention]]:
    """Settings whose interventions that change the prompt have chosen, from a run of the prompts without any.

    Args:
        model: The model.
        batch: The prompts.
        settings: Interventions of each setting.
    """
    if not any(needs_prefix(item) and item.changes_prompt for items in settings for item in items):
        return list(settings)
    prefix = model.prefill(batch, hold_last=True)
    return [
        [
            cast("Any", item).resolve(model, prefix, 1)[1] if needs_prefix(item) and item.changes_prompt else item
            for item in items
        ]
        for items in settings
    ]


def first_layer(model: HookTarget, interventions: Sequence[Intervention], batch: PromptBatch) -> int:
    """First layer in which interventions change rows of the prompt; ``n_layers`` if none of them changes the prompt.

    The result is -1 if an intervention acts outside the layers, for example on the embedding.
    """
    with own_passes():
        hooks = [hook for item in on_prompt(interventions) for hook in item.hooks(model, batch, cursor=Cursor(0))]
    layers = [layer_of(name) for name, _ in hooks]
    return min((-1 if layer is None else layer for layer in layers), default=model.shape.n_layers)
