"""Many settings in one batch, with one copy of each prompt per setting.

A setting is a sequence of interventions. The copies of a prompt are adjacent rows of the batch. The rows of one
setting form a lane. Settings that do not change the prompt differ only in their response rows. Their copies therefore
share one prefill. Settings that change the prompt share the layers below the first changed layer. Split-softmax and
focus steering edit the rows of all settings in one operation.
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
    checked_interventions,
    hook_name,
    is_row_wise,
    on_prompt,
    row_wise,
)
from focuslens.interventions.base import Positions, exactly, first_query_row, first_row, require_prompt
from focuslens.interventions.split_softmax import SplitSoftmax, split_factors
from focuslens.interventions.steering import FocusSteering, require_layout
from focuslens.prompts.batch import PromptBatch, SpanLike, disjoint

__all__ = ["Lanes"]


@dataclass(frozen=True, eq=False)
class Lanes:
    """Intervention for batches with ``len(settings)`` adjacent copies of each prompt, one copy per setting.

    Args:
        settings: Interventions of each setting, in the order of the copies.

    Raises:
        ValueError: If there are no settings.
    """

    settings: tuple[tuple[Intervention, ...], ...]

    def __init__(self, settings: Sequence[Sequence[Intervention]]) -> None:
        if not settings:
            raise ValueError("there are no settings; give one or more, each of any number of interventions")
        object.__setattr__(
            self, "settings", tuple(checked_interventions(s, f"settings[{i}]") for i, s in enumerate(settings))
        )

    @property
    def heads(self) -> tuple[Head, ...]:
        """Heads that at least one setting acts on."""
        interventions = [intervention for setting in self.settings for intervention in setting]
        return tuple(dict.fromkeys(head for intervention in interventions for head in intervention.heads))

    @property
    def changes_prompt(self) -> bool:
        """Whether any setting changes rows before the last prompt token."""
        return any(intervention.changes_prompt for setting in self.settings for intervention in setting)

    def prompt_part(self) -> Lanes:
        """The settings, each reduced to the interventions that change the prompt."""
        return Lanes([on_prompt(setting) for setting in self.settings])

    def describe(self) -> dict[str, Any]:
        """Descriptions of all settings as JSON values."""
        settings = [[intervention.describe() for intervention in setting] for setting in self.settings]
        return {"kind": "lanes", "settings": settings}

    def hooks(self, model: HookTarget, prompt: PromptLike | None = None, *, cursor: Cursor | None = None) -> list[Hook]:
        """TransformerLens hooks for the whole batch, including all copies.

        Raises:
            ValueError: If the prompt is missing, if the number of rows in the batch is not a multiple of the number of
                settings, or if an intervention does not fit the model.
        """
        batch = require_prompt(model, prompt, "a batch of settings")
        copies = len(self.settings)
        if len(batch) % copies:
            raise ValueError(f"there are {copies} settings, and the batch has {len(batch)} rows, not a multiple")
        hooks: list[Hook] = []
        for place in range(max(len(setting) for setting in self.settings)):
            acting = {lane: setting[place] for lane, setting in enumerate(self.settings) if place < len(setting)}
            hooks += self._hooks_of(model, batch, acting, cursor)
        model.require_acting(name for name, _ in hooks)
        return hooks

    def _hooks_of(
        self, model: HookTarget, batch: PromptBatch, acting: dict[int, Intervention], cursor: Cursor | None
    ) -> list[Hook]:
        """Hooks of one intervention per lane. The hooks may run in any order, because lanes do not share rows."""
        copies = len(self.settings)
        splits: defaultdict[SpanLike, dict[int, SplitSoftmax]] = defaultdict(dict)
        steered: dict[int, FocusSteering] = {}
        hooks: list[Hook] = []
        for lane, intervention in acting.items():
            if type(intervention) is SplitSoftmax:
                splits[intervention.span][lane] = intervention
            elif type(intervention) is FocusSteering:
                steered[lane] = intervention
            else:
                prompts = PromptBatch(batch.prompts[lane::copies], slice(lane, None, copies))
                own_hooks = intervention.hooks(model, prompts, cursor=cursor)
                hooks += [(name, _on_lane(hook, lane, copies)) for name, hook in own_hooks]
        for span, lanes in splits.items():
            hooks += _split_hooks(model, batch, span, lanes, copies, cursor)
        return hooks + _steering_hooks(model, batch, steered, copies, cursor)


def _on_lane(lane_hook: Any, lane: int, copies: int) -> Any:
    """Hook of one setting, limited to the rows of this setting in the batch."""

    def act(tensor: Tensor, hook: Any) -> Tensor | None:
        changed = lane_hook(tensor[lane::copies], hook)
        if changed is None:
            return None
        result = tensor.clone()
        result[lane::copies] = changed
        return result

    return row_wise(act) if is_row_wise(lane_hook) else act


def _split_hooks(
    model: HookTarget,
    batch: PromptBatch,
    span: SpanLike,
    lanes: dict[int, SplitSoftmax],
    copies: int,
    cursor: Cursor | None,
) -> list[Hook]:
    """Split-softmax hooks for all lanes, one hook per layer.

    Each lane and head can have a different ``tau``. The default is 1, which changes nothing.
    """
    batch.columns(span, batch.width)  # raises KeyError for an unknown span before any forward pass
    taus = torch.ones(copies, model.shape.n_layers, model.shape.n_heads, dtype=torch.float64)
    for lane, split in lanes.items():
        for layer, head in check_heads(split.heads, model.shape.n_layers, model.shape.n_heads):
            taus[lane, layer, head] = split.tau
    layers = [layer for layer in range(model.shape.n_layers) if (taus[:, layer] != 1).any()]
    return [
        (hook_name(layer, "hook_pattern"), _split_rows(model, batch, span, taus[:, layer], layer, copies, cursor))
        for layer in layers
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
    def rescale(pattern: Float[Tensor, "batch head row key"], hook: Any) -> Tensor | None:
        first, n_keys = first_row(model, layer, batch, "response", cursor, pattern), pattern.shape[-1]
        if first >= pattern.shape[-2]:
            return None
        rows = rearrange(pattern[:, :, first:], "(prompt copy) head row key -> prompt copy head row key", copy=copies)
        outside = (~prompts.columns(span, n_keys)).to(rows)
        elsewhere = einsum(rows, outside, "prompt copy head row key, prompt key -> prompt copy head row")
        elsewhere = exactly(elsewhere)
        # Weights on the span need double precision, because the factor for a tiny mass would overflow single precision.
        # The cost is low because the span is short.
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

    return rescale


def _steering_hooks(
    model: HookTarget, batch: PromptBatch, lanes: dict[int, FocusSteering], copies: int, cursor: Cursor | None
) -> list[Hook]:
    """Steering hooks for all lanes, one hook per hook point and value of ``positions``."""
    additions: dict[tuple[str, Positions], Tensor] = {}
    for lane, steering in lanes.items():
        for name, heads, vectors in steering.additions(model.shape):
            n_heads = model.shape.n_key_value_heads if name.endswith("hook_k") else model.shape.n_heads
            zeros = torch.zeros(copies, n_heads, model.shape.d_head)
            additions.setdefault((name, steering.positions), zeros)[lane, heads] = vectors
    return [
        (name, _add_rows(name, model, batch, vectors, copies, positions, cursor))
        for (name, positions), vectors in additions.items()
    ]


def _add_rows(
    name: str,
    model: HookTarget,
    batch: PromptBatch,
    vectors: Float[Tensor, "copy head d_head"],
    copies: int,
    positions: Positions,
    cursor: Cursor | None,
) -> Any:
    def add(activation: Float[Tensor, "batch row head d_head"], hook: Any) -> Tensor | None:
        require_layout(activation, name, model.shape)
        first = first_query_row(model, batch, positions, cursor, activation)
        if first >= activation.shape[1]:
            return None
        result = activation.clone()
        rows = rearrange(result[:, first:], "(prompt copy) row head d -> prompt copy row head d", copy=copies)
        rows += rearrange(vectors.to(result), "copy head d -> copy 1 head d")
        return result

    return add
