"""Responses to a batch of prompts under several settings. The settings share as much computation as possible."""

from __future__ import annotations

from collections.abc import Collection, Generator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from jaxtyping import Float
from torch import Tensor

from focuslens.hooks import Intervention
from focuslens.interventions.lanes import Lanes
from focuslens.model.decoding_settings import DecodingSettings
from focuslens.model.generation import Generation, Prefix
from focuslens.model.resolving import first_layer, needs_prefix, resolved, resolved_before
from focuslens.prompts.batch import PromptBatch
from focuslens.scores.base import Parts, ResponseMasses

if TYPE_CHECKING:
    from focuslens.model.focus_model import FocusModel

__all__ = ["SettingResponses", "respond"]

_SCORES_PER_TOKEN = 1024
"""Maximum number of attention scores in memory, per layer and per token of the batch budget."""


@dataclass(frozen=True, eq=False)
class SettingResponses:
    """Responses to a batch of prompts under one setting.

    Attributes:
        setting: Index of the setting in the list of settings.
        responses: One response per prompt.
        masses: Attention from each response to the parts of its prompt, averaged over the response tokens. ``None`` if
            no parts were passed.
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
    decoding: DecodingSettings | None = None,
    skip: Collection[int] = (),
    most: int | None = None,
) -> Generator[SettingResponses]:
    """Generate greedy responses to a batch of prompts under every setting.

    Settings that leave the prompts' keys and values unchanged share a single forward pass over the prompts, and are
    decoded together. All other settings reuse this pass, if possible, up to the first layer that they change. Results
    are yielded in an order that saves computation, which can differ from the order of ``settings``.

    Args:
        model: The model.
        batch: The prompts.
        settings: Interventions of each setting. A baseline has no interventions.
        max_new_tokens: Maximum length of a response, in tokens.
        budget: Maximum number of prompt tokens per forward pass. Each setting in a pass has its own copy of the
            prompts, and all copies count. Copies that share keys and values count less.
        parts: Function that returns the parts of the prompts. Attention to these parts is measured during generation.
        decoding: Stop tokens, stop strings and penalties; by default those of the model, :attr:`FocusModel.decoding`.
        skip: Indices of settings whose results are not needed. They do not change how the others are computed.
        most: Maximum number of settings per pass; by default as many as the budget allows.
    """
    if len(frozenset(skip)) == len(settings):
        return
    settings = resolved_before(model, batch, settings)
    # Indices of settings, keyed by the first layer that a setting changes. ``None`` means an unchanged prompt.
    groups: dict[int | None, list[int]] = {}
    for index, interventions in enumerate(settings):
        changes_prompt = any(intervention.changes_prompt for intervention in interventions)
        layer = first_layer(model, interventions, batch) if changes_prompt else None
        groups.setdefault(layer, []).append(index)
    shared = _shared_run(model, batch, groups)
    if shared is not None:
        shared = replace(shared, measured={})  # nobody else uses this run
        for index in groups.get(None, ()):
            shared, settings[index] = resolved(model, shared, settings[index], max_new_tokens)
    for layer, group in groups.items():
        # Settings that share the prompt's keys and values need additional memory only for the scores of response rows.
        shares_cache = layer is None and shared is not None and shared.is_shared
        cost = model.shape.n_heads / _SCORES_PER_TOKEN if shares_cache else 1
        # A setting that changes the prompt and then chooses from it needs a run of its own.
        alone = [index for index in group if any(needs_prefix(item) for item in settings[index])]
        together = [index for index in group if index not in alone]
        size = min(most or len(group), int(budget / (len(batch) * batch.width * cost)))
        for indices in (*_pieces(together, size), *([index] for index in alone)):
            if all(index in skip for index in indices):
                continue
            n, first = len(indices), settings[indices[0]]
            lanes = first if indices[0] in alone else [Lanes([settings[index] for index in indices])]
            if shared is None:
                prefix = model.prefill(batch.repeated(n), lanes, hold_last=True)
            else:
                prefix = model.copies(shared, n) if layer is None else model.rerun(shared, lanes, copies=n)
            reader = None if parts is None else ResponseMasses(model.shape, prefix.batch, parts, model.sink_layers)
            observers = () if reader is None else reader.hooks()
            responses = model.decode(
                prefix, lanes, max_new_tokens=max_new_tokens, observers=observers, decoding=decoding
            )
            masses = None if reader is None else reader.means([len(response.tokens) for response in responses])
            for lane, index in enumerate(indices):
                if index in skip:
                    continue
                yield SettingResponses(index, responses[lane::n], None if masses is None else masses[lane::n])


def _shared_run(model: FocusModel, batch: PromptBatch, groups: dict[int | None, list[int]]) -> Prefix | None:
    """Run the prompts once, for use by all settings. Return ``None`` if this shared run would not save computation."""
    # Number of layer runs that sharing saves: each setting skips the layers below the first layer that it changes.
    n_saved = sum(max(layer, 0) * len(group) for layer, group in groups.items() if layer is not None)
    if None not in groups and n_saved <= model.shape.n_layers:
        return None
    # Inputs are stored only for real layers. Layer -1 means a changed embedding, and n_layers means no change at all.
    keep = [layer for layer in groups if layer is not None and 0 <= layer < model.shape.n_layers]
    return model.prefill(batch, hold_last=True, keep=keep)


def _pieces(settings: Sequence[int], size: int) -> list[Sequence[int]]:
    size = max(1, size)
    return [settings[start : start + size] for start in range(0, len(settings), size)]
