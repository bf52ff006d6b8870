"""Running prompts: once for everything that follows, and again from the first layer that interventions touch."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from focuslens.batch import Prefix, PromptBatch
from focuslens.engine import KeyValueCache
from focuslens.hooks import Cursor, Hook, Intervention, layer_of, on_prompt

if TYPE_CHECKING:
    from focuslens.model import FocusModel

__all__ = ["copies", "first_layer", "prefill", "rerun"]


@torch.no_grad()
def prefill(
    model: FocusModel,
    batch: PromptBatch,
    interventions: Sequence[Intervention],
    *,
    hold_last: bool,
    keep: Collection[int] = (),
) -> Prefix:
    """See :meth:`FocusModel.prefill`."""
    cache, mask, tokens = model.backend.new_cache(len(batch)), batch.mask(), batch.tokens(model.pad_token)
    if hold_last:
        mask, tokens = mask[:, :-1], tokens[:, :-1]
    residuals: dict[int, Tensor] = {}
    keepers: list[Hook] = []
    if isinstance(cache, KeyValueCache):
        keepers = [(f"blocks.{layer}.hook_resid_pre", _keeper(residuals, layer)) for layer in keep]
    # What acts on the response alone begins with the last prompt token and need not see the others run.
    acting = on_prompt(interventions) if hold_last else interventions
    logits = None
    if tokens.shape[1]:
        with model.intervened(acting, batch, Cursor(0), keepers):
            if hold_last:
                model.backend.fill(tokens.to(model.backend.device), mask, cache)
            else:
                logits = model.run(tokens, mask, cache, last_only=True)[:, -1]
    return Prefix(batch, cache, mask, logits, tuple(interventions), residuals)


def _keeper(residuals: dict[int, Tensor], layer: int) -> Any:
    def keep(residual: Tensor, hook: Any) -> None:
        residuals[layer] = residual

    return keep


def copies(model: FocusModel, prefix: Prefix, n: int) -> Prefix:
    """See :meth:`FocusModel.copies`."""
    logits = None if prefix.logits is None else prefix.logits.repeat_interleave(n, dim=0)
    cache = model.backend.fork(prefix.cache, n)
    return Prefix(prefix.batch.repeated(n), cache, prefix.mask.repeat_interleave(n, dim=0), logits, prefix.under)


def first_layer(model: FocusModel, interventions: Sequence[Intervention], batch: PromptBatch) -> int:
    """The first layer whose prompt rows interventions change; 0 where one acts outside the layers."""
    hooks = [hook for one in on_prompt(interventions) for hook in one.hooks(model, batch, cursor=Cursor(0))]
    return min((layer_of(name) or 0 for name, _ in hooks), default=model.shape.n_layers)


@torch.no_grad()
def rerun(model: FocusModel, prefix: Prefix, interventions: Sequence[Intervention], n: int) -> Prefix:
    """See :meth:`FocusModel.rerun`."""
    if prefix.logits is not None or prefix.under:
        raise ValueError(
            "only a prefix that was run without interventions and holds its last token back can be run again"
        )
    batch = prefix.batch.repeated(n)
    first = first_layer(model, interventions, batch)
    cache, residual = prefix.cache, prefix.residuals.get(first)
    if residual is None or not isinstance(cache, KeyValueCache):
        return prefill(model, batch, interventions, hold_last=True)
    own, mask = cache.below(first, n), prefix.mask.repeat_interleave(n, dim=0)
    with model.intervened(on_prompt(interventions), batch, Cursor(0)):
        model.backend.run_from(first, residual.repeat_interleave(n, dim=0), mask, own)
    return Prefix(batch, own, mask, None, tuple(interventions))
