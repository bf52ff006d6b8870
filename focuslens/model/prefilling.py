"""Running prompts: once for everything that follows, and again from the first layer that interventions touch."""

from __future__ import annotations

from collections.abc import Collection, Generator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from focuslens.hooks import Cursor, Intervention, layer_of, on_prompt
from focuslens.model.engine import KeyValueCache
from focuslens.prompts.batch import Prefix, PromptBatch

if TYPE_CHECKING:
    from focuslens.model.focus_model import FocusModel

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
    beyond = [layer for layer in keep if not 0 <= layer < model.shape.n_layers]
    if beyond:
        raise ValueError(f"keep names layer {beyond[0]}; the model has layers 0 to {model.shape.n_layers - 1}")
    residuals: dict[int, Tensor] = {}
    # What acts on the response alone begins with the last prompt token and need not see the others run.
    acting = on_prompt(interventions) if hold_last else interventions
    logits = None
    if tokens.shape[1]:
        kept = keep if isinstance(cache, KeyValueCache) else ()
        with model.intervened(acting, batch, Cursor(0)), _kept(model, kept, residuals):
            if hold_last:
                model.backend.fill(tokens.to(model.backend.device), mask, cache)
            else:
                logits = model.run(tokens, mask, cache, last_only=True)[:, -1]
    return Prefix(batch, cache, mask, logits, tuple(interventions), residuals)


@contextmanager
def _kept(model: FocusModel, layers: Collection[int], residuals: dict[int, Tensor]) -> Generator[None]:
    """Keep the input of some layers as it is before anybody's hooks: they act when it is run from there again."""

    def keeper(layer: int) -> Any:
        def keep(point: Any, arguments: tuple[Tensor, ...]) -> None:
            residuals[layer] = arguments[0]

        return keep

    handles = [model.backend.residual_point(layer).register_forward_pre_hook(keeper(layer)) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def copies(model: FocusModel, prefix: Prefix, n: int) -> Prefix:
    """See :meth:`FocusModel.copies`."""
    logits = None if prefix.logits is None else prefix.logits.repeat_interleave(n, dim=0)
    cache = model.backend.fork(prefix.cache, n)
    return Prefix(prefix.batch.repeated(n), cache, prefix.mask.repeat_interleave(n, dim=0), logits, prefix.under)


def first_layer(model: FocusModel, interventions: Sequence[Intervention], batch: PromptBatch) -> int:
    """The first layer whose prompt rows interventions change.

    -1 where one acts outside the layers, on the embedding perhaps; the number of layers where none acts.
    """
    hooks = [hook for one in on_prompt(interventions) for hook in one.hooks(model, batch, cursor=Cursor(0))]
    layers = [layer_of(name) for name, _ in hooks]
    return min((-1 if layer is None else layer for layer in layers), default=model.shape.n_layers)


@torch.no_grad()
def rerun(model: FocusModel, prefix: Prefix, interventions: Sequence[Intervention], n: int) -> Prefix:
    """See :meth:`FocusModel.rerun`."""
    if prefix.logits is not None or prefix.under:
        raise ValueError(
            "only a prefix that was run without interventions and holds its last token back can be run again"
        )
    batch = prefix.batch.repeated(n)
    first = first_layer(model, interventions, batch)
    if first == model.shape.n_layers:
        return replace(copies(model, prefix, n), under=tuple(interventions))
    cache, residual = prefix.cache, prefix.residuals.get(first)
    if residual is None or not isinstance(cache, KeyValueCache):
        return prefill(model, batch, interventions, hold_last=True)
    own, mask = cache.below(first, n), prefix.mask.repeat_interleave(n, dim=0)
    with model.intervened(on_prompt(interventions), batch, Cursor(0)):
        model.backend.run_from(first, residual.repeat_interleave(n, dim=0), mask, own)
    return Prefix(batch, own, mask, None, tuple(interventions))
