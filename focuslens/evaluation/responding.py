"""A batch of prompts under several settings: what settings have in common is run once."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jaxtyping import Float
from torch import Tensor

from focuslens.hooks import Intervention
from focuslens.interventions.lanes import Lanes
from focuslens.model.generation import Generation, Prefix
from focuslens.model.runner import first_layer
from focuslens.prompts.batch import PromptBatch
from focuslens.scores.masses import Parts, ResponseMasses

if TYPE_CHECKING:
    from focuslens.model.focus_model import FocusModel

__all__ = ["SCORES", "Answered", "respond"]

SCORES = 1024
"""Attention scores a layer that may be held at a time for each token of a batch's budget."""


@dataclass(frozen=True, eq=False)
class Answered:
    """What a batch of prompts gave under one setting.

    Attributes:
        setting: Which, counted from 0.
        responses: One a prompt.
        masses: Attention from each response to the parts of its prompt, averaged over the response's tokens; ``None``
            where no parts were asked for.
    """

    setting: int
    responses: Sequence[Generation]
    masses: Float[Tensor, "batch layer head part"] | None = None


def respond(
    model: FocusModel,
    batch: PromptBatch,
    settings: Sequence[Sequence[Intervention]],
    *,
    max_new_tokens: int,
    budget: int,
    parts: Parts | None = None,
    repetition_penalty: float = 1.0,
    stop_tokens: Sequence[int] | None = None,
) -> Generator[Answered]:
    """Greedy responses of a batch under every setting, in whatever order is cheapest.

    Settings that leave the prompt as it is decode together over one run of it; those that change it start from the
    first layer they touch.

    Args:
        model: The model.
        batch: The prompts.
        settings: Interventions of each setting; none for a baseline.
        max_new_tokens: Of a response.
        budget: Prompt tokens that are run at a time, copies for settings included.
        parts: Of the prompts, to which the responses' attention is added up in the rows that generation runs anyway.
        repetition_penalty: Of tokens that prompt or response hold already; 1 is none.
        stop_tokens: Tokens that end a response; by default the model's.
    """
    groups: dict[int | None, list[int]] = {}
    for place, interventions in enumerate(settings):
        changes = any(one.changes_prompt for one in interventions)
        layer = first_layer(model, interventions, batch) if changes else None
        groups.setdefault(layer, []).append(place)
    shared = _shared_run(model, batch, groups)
    for layer, group in groups.items():
        # Of settings that share the prompt's keys and values only the response rows' scores take memory.
        sharing = layer is None and shared is not None and shared.is_shared
        taken = model.shape.n_heads / SCORES if sharing else 1
        for lanes in _pieces(group, int(budget / (len(batch) * batch.width * taken))):
            n, together = len(lanes), [Lanes([settings[place] for place in lanes])]
            if shared is None:
                prefix = model.prefill(batch.repeated(n), together, hold_last=True)
            else:
                prefix = model.copies(shared, n) if layer is None else model.rerun(shared, together, copies=n)
            seen = None if parts is None else ResponseMasses(model.shape, prefix.batch, parts)
            observers = () if seen is None else seen.hooks()
            made = model.decode(
                prefix,
                together,
                max_new_tokens=max_new_tokens,
                observers=observers,
                repetition_penalty=repetition_penalty,
                stop_tokens=stop_tokens,
            )
            masses = None if seen is None else seen.means([len(one.tokens) for one in made])
            for lane, place in enumerate(lanes):
                yield Answered(place, made[lane::n], None if masses is None else masses[lane::n])


def _shared_run(model: FocusModel, batch: PromptBatch, groups: dict[int | None, list[int]]) -> Prefix | None:
    """One run of the prompts that settings go on from, where that spares anything."""
    # Layers that would be run again for each setting, were they not run once for all.
    spared = sum(max(layer, 0) * len(group) for layer, group in groups.items() if layer is not None)
    if None not in groups and spared <= model.shape.n_layers:
        return None
    # What changes the embedding shares no layer, and what acts on no heads changes none.
    keep = [layer for layer in groups if layer is not None and 0 <= layer < model.shape.n_layers]
    return model.prefill(batch, hold_last=True, keep=keep)


def _pieces(settings: Sequence[int], size: int) -> list[Sequence[int]]:
    size = max(1, size)
    return [settings[start : start + size] for start in range(0, len(settings), size)]
