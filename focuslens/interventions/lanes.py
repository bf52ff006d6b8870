"""Many settings in one batch: every row of a prompt's ``copies`` runs under interventions of its own.

Settings that leave the prompt as it is differ only in their response rows: as consecutive rows of a batch they share
one prefill. Settings that change it share what lies below the first layer they touch. What interventions do to the rows
of a batch is done to all of them at once.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor

from focuslens.heads import Head, check_heads
from focuslens.hooks import (
    Cursor,
    Hook,
    HookTarget,
    Intervention,
    PromptLike,
    hook_name,
    is_row_wise,
    on_prompt,
    row_wise,
)
from focuslens.interventions.common import Positions, exactly, first_query_row, first_row, require_prompt
from focuslens.interventions.focus import FocusSteering
from focuslens.interventions.split_softmax import SplitSoftmax, split_factors
from focuslens.prompts.batch import PromptBatch, SpanLike, disjoint

__all__ = ["Lanes"]


@dataclass(frozen=True, eq=False)
class Lanes:
    """An intervention for batches in which each prompt stands ``len(settings)`` times, once a setting, in a row.

    Args:
        settings: What each copy of a prompt runs under, in order.

    Raises:
        ValueError: If there are none.
    """

    settings: tuple[tuple[Intervention, ...], ...]

    def __init__(self, settings: Sequence[Sequence[Intervention]]) -> None:
        if not settings:
            raise ValueError("there are no settings; give one or more, each of any number of interventions")
        object.__setattr__(self, "settings", tuple(tuple(setting) for setting in settings))

    @property
    def heads(self) -> tuple[Head, ...]:
        """All heads that any setting acts on."""
        return tuple(dict.fromkeys(head for setting in self.settings for one in setting for head in one.heads))

    @property
    def changes_prompt(self) -> bool:
        """Whether any setting changes rows before the last prompt token."""
        return any(one.changes_prompt for setting in self.settings for one in setting)

    def prompt_part(self) -> Lanes:
        """What changes the prompt's own rows, without what acts on responses alone."""
        return Lanes([on_prompt(setting) for setting in self.settings])

    def describe(self) -> dict[str, Any]:
        """Every setting, as JSON."""
        return {"kind": "lanes", "settings": [[one.describe() for one in setting] for setting in self.settings]}

    def hooks(self, model: HookTarget, prompt: PromptLike | None = None, *, cursor: Cursor | None = None) -> list[Hook]:
        """Hooks for the whole batch, copies included.

        Raises:
            ValueError: If the batch does not hold each prompt once a setting, or an intervention does not fit.
        """
        batch = require_prompt(model, prompt, "a batch of settings")
        copies = len(self.settings)
        if len(batch) % copies:
            raise ValueError(f"there are {copies} settings, and the batch has {len(batch)} rows: no whole copies")
        hooks: list[Hook] = []
        for place in range(max(len(setting) for setting in self.settings)):
            acting = {lane: setting[place] for lane, setting in enumerate(self.settings) if place < len(setting)}
            hooks += self._hooks_of(model, batch, acting, cursor)
        model.require_acting(name for name, _ in hooks)
        return hooks

    def _hooks_of(
        self, model: HookTarget, batch: PromptBatch, acting: dict[int, Intervention], cursor: Cursor | None
    ) -> list[Hook]:
        """Hooks of one intervention a lane; lanes do not meet, so the order of kinds is free."""
        copies = len(self.settings)
        splits: defaultdict[SpanLike, dict[int, SplitSoftmax]] = defaultdict(dict)
        steered: dict[int, FocusSteering] = {}
        hooks: list[Hook] = []
        for lane, one in acting.items():
            if type(one) is SplitSoftmax:
                splits[one.span][lane] = one
            elif type(one) is FocusSteering:
                steered[lane] = one
            else:
                prompts = PromptBatch(batch.prompts[lane::copies])
                hooks += [
                    (name, _on_lane(hook, lane, copies)) for name, hook in one.hooks(model, prompts, cursor=cursor)
                ]
        for span, lanes in splits.items():
            hooks += _split_hooks(model, batch, span, lanes, copies, cursor)
        return hooks + _steering_hooks(model, batch, steered, copies, cursor)


def _on_lane(own: Any, lane: int, copies: int) -> Any:
    """A hook of one setting on its rows of the batch."""

    def act(tensor: Tensor, hook: Any) -> Tensor | None:
        changed = own(tensor[lane::copies], hook)
        if changed is None:
            return None
        result = tensor.clone()
        result[lane::copies] = changed
        return result

    return row_wise(act) if is_row_wise(own) else act


def _split_hooks(
    model: HookTarget,
    batch: PromptBatch,
    span: SpanLike,
    lanes: dict[int, SplitSoftmax],
    copies: int,
    cursor: Cursor | None,
) -> list[Hook]:
    """Split-softmax of all lanes in one edit a layer: each row and head has its own ``tau``, 1 where it has none."""
    batch.columns(span, batch.width)  # an unknown span is an error now, not in the middle of a forward pass
    taus = torch.ones(copies, model.shape.n_layers, model.shape.n_heads, dtype=torch.float64)
    for lane, one in lanes.items():
        for layer, head in check_heads(one.heads, model.shape.n_layers, model.shape.n_heads):
            taus[lane, layer, head] = one.tau
    touched = [layer for layer in range(model.shape.n_layers) if (taus[:, layer] != 1).any()]
    return [
        (hook_name(layer, "hook_pattern"), _split_rows(model, batch, span, taus[:, layer], layer, copies, cursor))
        for layer in touched
    ]


def _split_rows(
    model: HookTarget,
    batch: PromptBatch,
    span: SpanLike,
    taus: Float[Tensor, "copy head"],
    layer: int,
    copies: int,
    cursor: Cursor | None,
) -> Any:
    prompts = PromptBatch(batch.prompts[::copies])
    tau = rearrange(taus, "copy head -> 1 copy head 1")
    places = [
        (i, slice(padding + start, padding + end))
        for i, (prompt, padding) in enumerate(zip(prompts.prompts, prompts.padding, strict=True))
        for start, end in disjoint(prompt.resolve(span))
    ]

    @row_wise
    def turn(pattern: Float[Tensor, "batch head row key"], hook: Any) -> Tensor | None:
        first, n_keys = first_row(model, layer, batch, "response", cursor, pattern), pattern.shape[-1]
        if first >= pattern.shape[-2]:
            return None
        rows = rearrange(pattern[:, :, first:], "(prompt copy) head row key -> prompt copy head row key", copy=copies)
        outside = (~prompts.columns(span, n_keys)).to(rows)
        elsewhere = einsum(rows, outside, "prompt copy head row key, prompt key -> prompt copy head row")
        elsewhere = exactly(elsewhere)
        # The span itself, which is short, in double precision: a factor that single precision has no room for belongs
        # to a mass that is as small.
        parts = [(i, part, exactly(rows[i, ..., part])) for i, part in places]
        on_span = torch.zeros_like(elsewhere)
        for i, _, weights in parts:
            on_span[i] += weights.sum(dim=-1)
        raised, lowered = split_factors(on_span, elsewhere, tau.to(elsewhere))
        result = pattern.clone()
        edited = rearrange(result[:, :, first:], "(prompt copy) head row key -> prompt copy head row key", copy=copies)
        edited *= lowered[..., None].to(rows.dtype)
        for i, part, weights in parts:
            edited[i, ..., part] = (weights * raised[i, ..., None]).to(rows.dtype)
        return result

    return turn


def _steering_hooks(
    model: HookTarget, batch: PromptBatch, lanes: dict[int, FocusSteering], copies: int, cursor: Cursor | None
) -> list[Hook]:
    """Steering of all lanes in one addition a layer, hook point and kind of positions."""
    added: dict[tuple[str, Positions], Tensor] = {}
    for lane, one in lanes.items():
        for name, heads, vectors in one.additions(model.shape):
            n_heads = model.shape.n_key_value_heads if name.endswith("hook_k") else model.shape.n_heads
            nothing = torch.zeros(copies, n_heads, model.shape.d_head)
            added.setdefault((name, one.positions), nothing)[lane, heads] = vectors
    return [
        (name, _add_rows(batch, vectors, copies, positions, cursor)) for (name, positions), vectors in added.items()
    ]


def _add_rows(
    batch: PromptBatch,
    vectors: Float[Tensor, "copy head d_head"],
    copies: int,
    positions: Positions,
    cursor: Cursor | None,
) -> Any:
    def add(activation: Float[Tensor, "batch row head d_head"], hook: Any) -> Tensor | None:
        first = first_query_row(batch, positions, cursor, activation)
        if first >= activation.shape[1]:
            return None
        result = activation.clone()
        rows = rearrange(result[:, first:], "(prompt copy) row head d -> prompt copy row head d", copy=copies)
        rows += rearrange(vectors.to(result), "copy head d -> copy 1 head d")
        return result

    return add
