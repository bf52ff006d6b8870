"""One pass over the last rows of prompts whose patterns are read, with lean layers over cached keys and values.

TransformerLens looks up each hook by the names of all hook points, and calls each module of a layer. For the few rows
of a question, both take longer than the arithmetic. See :mod:`focuslens.model.lean`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from focuslens.hooks import Hook, RowHook, layer_of
from focuslens.model.attention import attend_explicitly, row_blocks, trim
from focuslens.model.backends import Backend
from focuslens.model.engine import KeyValueCache, Pass
from focuslens.model.lean import lean_plan
from focuslens.model.lean_layer import LeanLayer, run_layer

__all__ = ["lean_rows_plan", "read_lean_rows"]

Read = Callable[[Tensor], "Tensor | None"]


def lean_rows_plan(backend: Backend, observers: Sequence[Hook], last: int) -> list[LeanLayer] | None:
    """The lean form of the layers 0 to ``last``; ``None`` if one of them has none or an observer is of another kind.

    Args:
        backend: The model.
        observers: Hooks, all of which must read blocks of rows of patterns.
        last: Last layer to run.
    """
    for name, hook in observers:
        reads = isinstance(hook, RowHook) and hook.reads and hook.row_wise
        if not reads or not name.endswith(".hook_pattern"):
            return None
    layers = [layer for layer in lean_plan(backend, observers)[: last + 1] if layer is not None]
    return layers if len(layers) == last + 1 else None


def read_lean_rows(
    backend: Backend,
    layers: Sequence[LeanLayer],
    observers: Sequence[Hook],
    tokens: Int[Tensor, "batch row"],
    mask: Int[Tensor, "batch column"],
    cache: KeyValueCache,
) -> None:
    """Run rows over a cache, which grows, so that observers read their patterns.

    Args:
        backend: The model.
        layers: The layers to run, from the first one on.
        observers: Hooks that read patterns.
        tokens: Tokens of the rows, on the model's device.
        mask: Attention mask of all columns, the new ones included.
        cache: Keys and values of the earlier columns.
    """
    reads: dict[int | None, list[Read]] = {}
    for name, hook in observers:
        assert isinstance(hook, RowHook)
        reads.setdefault(layer_of(name), []).append(hook.on_rows)
    rows, n_rows = Pass(tokens.shape[1], mask.cpu()), tokens.shape[1]
    cache.append_attention_mask(mask[:, -n_rows:].long())
    residual = backend.embed(tokens)
    plan = [*layers, *[None] * (backend.shape.n_layers - len(layers))]
    turns, x = backend.turns(plan, mask, n_rows, residual), residual.flatten(0, 1)
    for i, layer in enumerate(layers):
        attend = partial(_attend, cache, i, layer, rows, reads.get(i, ()))
        x = run_layer(layer, x, n_rows, turns[layer.rotary], attend, {})


def _attend(
    cache: KeyValueCache,
    place: int,
    layer: LeanLayer,
    rows: Pass,
    reads: Sequence[Read],
    q: Float[Tensor, "all_rows head d_head"],
    keys: Float[Tensor, "all_rows kv_head d_head"],
    values: Float[Tensor, "all_rows kv_head d_head"],
) -> Float[Tensor, "all_rows head d_head"]:
    """Attention outputs of the rows over all columns, a block of rows at a time."""
    q, keys, values = (x.unflatten(0, (-1, rows.n_rows)) for x in (q, keys, values))
    cache.layers[place].append(keys, values)
    segments, window = cache.layers[place].segments, cache.window(place, layer.window, rows)

    def read(pattern: Float[Tensor, "batch head row key"]) -> Float[Tensor, "batch head row key"]:
        for one in reads:
            one(pattern)
        return pattern

    blocks = row_blocks(rows.n_rows, q.shape[0] * q.shape[2] * rows.mask.shape[1])
    parts: list[Tensor] = []
    for start, end in blocks:
        block = rows if len(blocks) == 1 else rows.block(start, end)
        seen, visible = trim(segments, block.mask.shape[1]), block.visible(window, q.device)
        parts.append(attend_explicitly(q[:, start:end], seen, visible, layer.scale, None, read if reads else None))
    return torch.cat(parts, dim=1).flatten(0, 1)
