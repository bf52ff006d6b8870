"""Folding of focus directions into a checkpoint. At the projection site, they are biases of queries and keys."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from focuslens.directions.checkpoints.origin import warn_of_another_model
from focuslens.directions.checkpoints.shards import dtype_of, read, rewrite
from focuslens.directions.checkpoints.source import Checkpoint, open_checkpoint
from focuslens.directions.checkpoints.writing import require_writable, write_index, write_steered
from focuslens.heads import Head, ModelShape
from focuslens.interventions import FocusSteering
from focuslens.util.progress import progress_bar

__all__ = ["FoldedCheckpoint", "SharedKeys", "fold"]

_FAMILIES = {"qwen2": "Qwen2", "qwen3": "Qwen3", "llama": "Llama", "mistral": "Mistral"}


@dataclass(frozen=True)
class SharedKeys:
    """A key-value head whose key vector also acts on query heads that were not chosen.

    Attributes:
        layer: Index of the layer.
        key_value_head: Index of the key-value head.
        chosen: Chosen query heads that read the key-value head.
        others: Other query heads that read the key-value head.
    """

    layer: int
    key_value_head: int
    chosen: tuple[Head, ...]
    others: tuple[Head, ...]

    def __str__(self) -> str:
        chosen, others = (", ".join(map(str, heads)) for heads in (self.chosen, self.others))
        return f"the key vector of {chosen} is also read by {others}"


@dataclass(frozen=True)
class FoldedCheckpoint:
    """The result of :func:`fold`.

    Attributes:
        directory: Directory of the checkpoint.
        shared: Key-value heads whose key vector also acts on heads that were not chosen.
        left_out: Files and directories with other copies of the weights, which were left out.
        training: Files for resuming a training of the base, which were also left out.
    """

    directory: Path
    shared: tuple[SharedKeys, ...]
    left_out: tuple[str, ...]
    training: tuple[str, ...] = ()


def fold(
    source: str | Path,
    steering: FocusSteering,
    out: str | Path,
    *,
    revision: str | None = None,
    progress: bool | None = None,
) -> FoldedCheckpoint:
    """Write a Hugging Face checkpoint that is steered without any hook.

    At the projection site ``(W x + alpha d)`` is the projection ``W x`` with a bias. Qwen2 and Qwen3 keep their class.
    Llama gets ``attention_bias``, with zeros for all other biases. Mistral without a sliding window
    computes the same as Llama, and becomes a Llama checkpoint. Weights are copied unchanged, file by file, and never
    loaded. The steering biases are in float32, independently of the dtype of the weights.

    Args:
        source: Directory or hub name of the checkpoint, in safetensors.
        steering: Directions of the projection site, their strength and heads, at all positions.
        out: Directory for the new checkpoint; it must be new or empty.
        revision: Branch, tag or commit on the hub.
        progress: Whether to show a progress bar; :mod:`focuslens.util.progress` describes the default.

    Raises:
        FileNotFoundError: If the checkpoint does not exist, or has no safetensors.
        FileExistsError: If ``out`` exists and is not an empty directory.
        ValueError: If the steering or the architecture cannot be folded, the directions belong to a model of a
            different shape, or ``out`` is a link, contains the working directory, or lies inside the source.

    Warns:
        UserWarning: If the directions were trained on a different model, according to their provenance.
    """
    _require_foldable(steering)
    require_writable(Path(out), source)
    base = open_checkpoint(source, revision, _FAMILIES, "folded")
    config, shared = _folded_config(base), _shared_keys(steering, base.shape)
    warn_of_another_model(base, steering.directions)
    changes = _changes(base, _biases(steering, base.shape))
    with write_steered(base, steering, Path(out), config, _chapter(base, steering, shared)) as (partial, left_out):
        with progress_bar("copying weights", base.size, unit="B", show=progress) as bar:
            for shard in base.shards:
                rewrite(shard, partial / shard.path.name, changes[shard.path], bar.update)
        if not base.is_single:
            write_index(partial, [shard.path.name for shard in base.shards])
    return FoldedCheckpoint(Path(out), shared, tuple(left_out.weights), tuple(left_out.training))


def _require_foldable(steering: FocusSteering) -> None:
    if steering.directions.site != "projection":
        raise ValueError(
            "the directions act at the rotary site, after the rotary embedding, where they are not biases of a weight; "
            "train with site='projection' to fold"
        )
    if steering.positions != "all":
        raise ValueError(f"positions is {steering.positions!r}; a bias acts at all positions: use positions='all'")


def _folded_config(base: Checkpoint) -> dict[str, Any]:
    """The configuration of the folded checkpoint.

    Raises:
        ValueError: If the base is a Mistral model with a sliding window. The model classes with attention biases have
                no sliding window.
    """
    config = base.config
    new = base.config_with_dtype()
    if config["model_type"] == "mistral":
        if (window := base.resolved.sliding_window) is not None:
            raise ValueError(
                f"{base.name} is a mistral with a sliding window of {window} tokens; Mistral has no "
                "biases, and Llama, which could replace it, has no window"
            )
        # All entries are written out, because the two classes have different defaults.
        new = {**base.resolved.to_dict(), "dtype": new.get("dtype") or new["torch_dtype"]}
        new.pop("sliding_window", None)
        new |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "mlp_bias": False}
    if config["model_type"] != "qwen2":  # Qwen2's queries, keys and values always have biases
        new["attention_bias"] = True
    return new


def _biases(steering: FocusSteering, shape: ModelShape) -> dict[str, Float[Tensor, "out"]]:
    """Vector to add to each bias, by the name of the bias, in float32."""
    added: dict[str, Tensor] = {}
    for point, heads, vectors in steering.additions(shape):
        layer, of_queries = int(point.split(".")[1]), point.endswith("hook_q")
        bias = torch.zeros(shape.n_heads if of_queries else shape.n_key_value_heads, shape.d_head)
        bias[heads] = vectors
        added[_bias_name(layer, "q_proj" if of_queries else "k_proj")] = bias.flatten()
    return added


def _bias_name(layer: int, projection: str) -> str:
    return f"model.layers.{layer}.self_attn.{projection}.bias"


def _every_bias(config: Mapping[str, Any], shape: ModelShape) -> dict[str, int]:
    """Size of every bias in the folded model, by the name of the bias."""
    queries, keys = shape.n_heads * shape.d_head, shape.n_key_value_heads * shape.d_head
    sizes = {"q_proj": queries, "k_proj": keys, "v_proj": keys, "o_proj": shape.d_model}
    if config["model_type"] == "qwen2":
        del sizes["o_proj"]
    return {_bias_name(layer, name): size for layer in range(shape.n_layers) for name, size in sizes.items()}


def _shared_keys(steering: FocusSteering, shape: ModelShape) -> tuple[SharedKeys, ...]:
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


def _changes(base: Checkpoint, added: Mapping[str, Tensor]) -> dict[Path, dict[str, Tensor]]:
    """New biases for each file of weights. A bias goes into the file that holds the weight of its projection."""
    homes = base.homes
    changes: dict[Path, dict[str, Tensor]] = {shard.path: {} for shard in base.shards}
    for name, size in _every_bias(base.config, base.shape).items():
        weight = name.replace(".bias", ".weight")
        if name in homes and name not in added:
            continue
        home = homes.get(name, homes[weight])
        bias = read(home, name).float() if name in homes else torch.zeros(size)
        # Sums are in float32, so that loading the model in half precision rounds them only once.
        changes[home.path][name] = bias + added[name] if name in added else bias.to(dtype_of(home, weight))
    return changes


def _chapter(base: Checkpoint, steering: FocusSteering, shared: tuple[SharedKeys, ...]) -> list[str]:
    """Lines for the model card about the steering."""
    return [
        "# With focus directions folded in",
        "",
        f"This is `{base.name}` with focus directions of strength {steering.alpha:g} added to the queries"
        f"{'' if steering.directions.key is None else ' and keys'} of {len(steering.heads)} attention heads, as "
        "biases of `q_proj` and `k_proj`. All other weights are those of the base. Written by focuslens; "
        "`focuslens.json` has the heads, the digest of the directions, and the versions.",
        "",
        f"Heads: {', '.join(map(str, steering.heads))}.",
        *(["", *(f"- Layer {keys.layer}: {keys}." for keys in shared)] if shared else []),
    ]
