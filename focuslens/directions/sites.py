"""Sites at which focus directions can be trained on a model: before or after the rotary embedding, or nowhere."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, get_args

import torch
from torch import Tensor

from focuslens.heads import Head, check_heads
from focuslens.hooks import hook_name
from focuslens.interventions.directions import Site
from focuslens.model.execution import Executor
from focuslens.model.focus_model import FocusModel

__all__ = ["trainable_heads"]

_PROBED = 2
"""Length, in tokens, of the rotary tables that are computed to see whether they can be."""


def trainable_heads(executor: Executor, heads: Iterable[tuple[int, int]] | None, site: Site) -> list[Head]:
    """Heads to train, by default all heads of the model.

    Raises:
        ValueError: If there are none, or if directions cannot be trained on this architecture at this site. The message
            names the other site if they can be trained there.
    """
    n_layers, n_heads = executor.shape.n_layers, executor.shape.n_heads
    all_heads = [(layer, head) for layer in range(n_layers) for head in range(n_heads)]
    chosen = list(check_heads(all_heads if heads is None else heads, n_layers, n_heads))
    if not chosen:
        raise ValueError("there are no heads to train")
    fault = next(executor.map(_fault, [(sorted({layer for layer, _ in chosen}), site)]))
    if fault is not None:
        raise ValueError(fault)
    return chosen


def _fault(model: FocusModel, layers: Sequence[int], site: Site) -> str | None:
    """Why directions cannot be trained on some layers at a site; ``None`` if they can be."""
    positions = getattr(model.hooked.cfg, "positional_embedding_type", "rotary")
    if positions != "rotary" and hook_name(layers[0], "hook_rot_q") not in model.hooked.hook_dict:
        return (
            f"{model.name!r} has no rotary embeddings (its positional embedding is {positions!r}), and both sites of "
            "focus directions are defined by them: directions cannot be trained on this architecture"
        )
    fault = _fault_at(model, layers, site)
    (other,) = {*get_args(Site)} - {site}
    if fault is None:
        return None
    if _fault_at(model, layers, other) is None:
        return f"{fault}; train with site={other!r} (--site {other})"
    return f"{fault}; site={other!r} is impossible too, so directions cannot be trained on this architecture"


def _fault_at(model: FocusModel, layers: Sequence[int], site: Site) -> str | None:
    infix = "rot_" if site == "rotary" else ""
    try:
        model.points.require_firing(hook_name(layer, f"hook_{infix}{x}") for layer in layers for x in "qk")
        if (width := _width(model, hook_name(layers[0], f"hook_{infix}q"))) != model.shape.d_head:
            return (
                f"{model.name!r} has queries of {width} dimensions at the {site} site and heads of "
                f"{model.shape.d_head}, as in multi-head latent attention; directions cannot be trained there"
            )
        for layer in layers:
            model.backend.scale(layer)
            if site == "projection":
                model.backend.rotary(layer, _PROBED)
    except ValueError as error:
        return str(error)
    return None


def _width(model: FocusModel, name: str) -> int:
    """Number of dimensions of a query at a hook point."""
    widths: list[int] = []

    def record(query: Tensor, hook: Any) -> None:
        widths.append(query.shape[-1])

    model.observe(torch.arange(1, 1 + _PROBED), [(name, record)])
    return widths[0]
