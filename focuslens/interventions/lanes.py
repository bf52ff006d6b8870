"""Many settings in one batch, with one copy of each prompt per setting.

A setting is a sequence of interventions. The copies of a prompt are adjacent rows of the batch. The rows of one
setting form a lane. Settings that do not change the prompt differ only in their response rows. Their copies therefore
share one prefill. Settings that change the prompt share the layers below the first changed layer. Split-softmax and
focus steering edit the rows of all settings in one operation.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from einops import repeat
from torch import Tensor

from focuslens.heads import Head, check_heads
from focuslens.hooks import (
    Cursor,
    Hook,
    HookTarget,
    Intervention,
    PromptLike,
    RowHook,
    checked_interventions,
    is_row_wise,
    on_prompt,
    row_wise,
)
from focuslens.interventions.base import Positions, require_prompt
from focuslens.interventions.low_rank import LowRank
from focuslens.interventions.split_softmax import SplitSoftmax, split_hooks
from focuslens.interventions.steering import FocusSteering, adding
from focuslens.prompts.batch import PromptBatch, SpanLike

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
    def heads(self) -> tuple[Head, ...] | None:
        """Heads that at least one setting acts on; ``None`` if a setting acts on all heads."""
        chosen = [intervention.heads for setting in self.settings for intervention in setting]
        given = [heads for heads in chosen if heads is not None]
        return None if len(given) < len(chosen) else tuple(dict.fromkeys(head for heads in given for head in heads))

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

    def on_lane(change: Callable[[Tensor], Tensor | None], tensor: Tensor) -> Tensor | None:
        changed = change(tensor[lane::copies])
        if changed is None:
            return None
        result = tensor.clone()
        result[lane::copies] = changed
        return result

    def act(tensor: Tensor, hook: Any) -> Tensor | None:
        return on_lane(lambda rows: lane_hook(rows, hook), tensor)

    hook = row_wise(act) if is_row_wise(lane_hook) else act
    if not isinstance(lane_hook, RowHook):
        return hook
    on_rows = lane_hook.on_rows
    return RowHook(hook, lambda tensor: on_lane(on_rows, tensor), every_row=lane_hook.every_row)


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
    taus = torch.ones(copies, model.shape.n_layers, model.shape.n_heads, dtype=torch.float64)
    for lane, split in lanes.items():
        heads = check_heads(split.heads, model.shape.n_layers, model.shape.n_heads)
        # One assignment: one for each head took noticeable time in sweeps.
        taus[lane].view(-1)[[layer * model.shape.n_heads + head for layer, head in heads]] = split.tau
    layers = [layer for layer in range(model.shape.n_layers) if (taus[:, layer] != 1).any()]
    by_row = repeat(taus, "copy layer head -> (prompt copy) layer head", prompt=len(batch) // copies)
    return split_hooks(model, batch, span, by_row, layers, cursor)


def _steering_hooks(
    model: HookTarget, batch: PromptBatch, lanes: dict[int, FocusSteering], copies: int, cursor: Cursor | None
) -> list[Hook]:
    """Steering hooks for all lanes, one hook per hook point and value of ``positions``."""
    additions: dict[tuple[str, Positions], Tensor] = {}
    products: defaultdict[tuple[str, Positions], dict[int, LowRank]] = defaultdict(dict)
    for lane, steering in lanes.items():
        for name, vectors in steering.additions(model.shape).items():
            zeros = torch.zeros(copies, *vectors.shape)
            additions.setdefault((name, steering.positions), zeros)[lane] = vectors
        for name, product in steering.products(model.shape).items():
            products[name, steering.positions][lane] = product
    prompts = len(batch) // copies
    return [
        (
            name,
            adding(
                name,
                model,
                repeat(vectors, "copy head d -> (prompt copy) head d", prompt=prompts),
                batch,
                positions,
                cursor,
                LowRank.of_lanes(by_lane, copies, prompts) if (by_lane := products.get((name, positions))) else None,
            ),
        )
        for (name, positions), vectors in additions.items()
    ]
