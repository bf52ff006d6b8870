"""Directions of the projection site as biases of projections, by the names of tensors in a checkpoint."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from focuslens.heads import Head, ModelShape
from focuslens.interventions import FocusSteering

__all__ = ["SharedKeys", "bias_name", "fused_biases", "projection_biases", "shared_keys"]


@dataclass(frozen=True)
class SharedKeys:
    """Key-value head whose key vector also affects query heads that are not steered.

    Attributes:
        layer: Index of the layer.
        key_value_head: Index of the key-value head.
        chosen: Steered query heads that read the key-value head.
        others: Query heads that read the key-value head but are not steered.
    """

    layer: int
    key_value_head: int
    chosen: tuple[Head, ...]
    others: tuple[Head, ...]

    def __str__(self) -> str:
        chosen, others = (", ".join(map(str, heads)) for heads in (self.chosen, self.others))
        return f"the key vector of {chosen} is also read by {others}"


def bias_name(layer: int, projection: str) -> str:
    """Name of the bias of a projection, such as ``model.layers.3.self_attn.q_proj.bias``."""
    return f"model.layers.{layer}.self_attn.{projection}.bias"


def projection_biases(steering: FocusSteering, shape: ModelShape) -> dict[str, Float[Tensor, "out"]]:
    """Vector to add to each bias, keyed by the name of the bias, in float32."""
    added: dict[str, Tensor] = {}
    for point, vectors in steering.additions(shape).items():
        projection = "q_proj" if point.endswith("hook_q") else "k_proj"
        added[bias_name(int(point.split(".")[1]), projection)] = vectors.flatten()
    return added


def fused_biases(steering: FocusSteering, shape: ModelShape) -> dict[str, Float[Tensor, "out"]]:
    """Vector to add to the bias of each ``qkv_proj``, whose rows are those of queries, keys and values, in float32."""
    separate = projection_biases(steering, shape)
    n_queries, n_keys = shape.n_heads * shape.d_head, shape.n_key_value_heads * shape.d_head
    fused: dict[str, Tensor] = {}
    for layer in sorted({int(name.split(".")[2]) for name in separate}):
        queries = separate.get(bias_name(layer, "q_proj"), torch.zeros(n_queries))
        keys = separate.get(bias_name(layer, "k_proj"), torch.zeros(n_keys))
        fused[bias_name(layer, "qkv_proj")] = torch.cat((queries, keys, torch.zeros(n_keys)))
    return fused


def shared_keys(steering: FocusSteering, shape: ModelShape) -> tuple[SharedKeys, ...]:
    """Key-value heads whose key vectors also affect query heads that are not steered."""
    if steering.directions.key is None:
        return ()
    chosen: defaultdict[tuple[int, int], set[int]] = defaultdict(set)
    for layer, head in steering.heads:
        chosen[layer, shape.key_value_head(head)].add(head)
    shared: list[SharedKeys] = []
    for (layer, key_value_head), heads in sorted(chosen.items()):
        readers = [head for head in range(shape.n_heads) if shape.key_value_head(head) == key_value_head]
        others = [head for head in readers if head not in heads]
        if others:
            pairs = [tuple(Head(layer, head) for head in group) for group in (sorted(heads), others)]
            shared.append(SharedKeys(layer, key_value_head, pairs[0], pairs[1]))
    return tuple(shared)
