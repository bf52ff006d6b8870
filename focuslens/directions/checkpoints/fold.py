"""Folding of focus directions into a checkpoint. At the projection site, directions are biases of queries and keys."""

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


@dataclass(frozen=True)
class FoldedCheckpoint:
    """Result of :func:`fold`.

    Attributes:
        directory: Directory of the checkpoint.
        shared: Key-value heads whose key vectors also affect query heads that are not steered.
        left_out: Skipped files and directories of the base checkpoint, which contain other copies of the weights.
        training: Skipped files for resuming the training of the base checkpoint, such as ``optimizer.pt``.
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
    """Write a Hugging Face checkpoint that is steered by its biases, without hooks or custom code.

    At the projection site, steering turns the projection ``W x`` into ``W x + alpha d``. Therefore, ``alpha d`` can be
    stored as a bias. Qwen2, Qwen3 and Llama checkpoints keep their class. A Mistral checkpoint without a sliding window
    becomes a Llama checkpoint, because the Llama class computes the same function. In all checkpoints except Qwen2,
    ``attention_bias`` is set to ``True``. Where no vector is added, new biases are zero. Weights are copied unchanged,
    file by file, without loading them. The steering biases are in float32, independently of the dtype of the weights.

    Args:
        source: Directory or hub name of a Llama, Mistral, Qwen2 or Qwen3 checkpoint with safetensors files.
        steering: Steering to fold. The directions must be for the projection site, and ``positions`` must be ``"all"``.
        out: Directory for the new checkpoint. If the directory exists, it must be empty.
        revision: Branch, tag or commit on the hub.
        progress: Whether to show a progress bar; :mod:`focuslens.util.progress` describes the default.

    Raises:
        FileNotFoundError: If the checkpoint does not exist, or if it has no safetensors files.
        FileExistsError: If ``out`` exists and is not an empty directory.
        ValueError: If the steering or the architecture cannot be folded, if the directions belong to a model of a
            different shape, or if ``out`` is a symbolic link, contains the working directory, or is inside ``source``.

    Warns:
        UserWarning: If the provenance of the directions names a different model.
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
    """Configuration of the folded checkpoint.

    Raises:
        ValueError: If the base is a Mistral model with a sliding window. The Mistral class has no attention biases, and
            the Llama class has no sliding window.
    """
    config = base.config
    new = base.config_with_dtype()
    if config["model_type"] == "mistral":
        if (window := base.resolved.sliding_window) is not None:
            raise ValueError(
                f"{base.name} is a mistral with a sliding window of {window} tokens; Mistral has no "
                "biases, and Llama, which could replace it, has no window"
            )
        # All entries are written explicitly, because Mistral and Llama have different defaults.
        new = {**base.resolved.to_dict(), "dtype": new.get("dtype") or new["torch_dtype"]}
        new.pop("sliding_window", None)
        new |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "mlp_bias": False}
    if config["model_type"] != "qwen2":  # Qwen2's queries, keys and values always have biases
        new["attention_bias"] = True
    return new


def _biases(steering: FocusSteering, shape: ModelShape) -> dict[str, Float[Tensor, "out"]]:
    """Vector to add to each bias, keyed by the name of the bias, in float32."""
    added: dict[str, Tensor] = {}
    for point, vectors in steering.additions(shape).items():
        projection = "q_proj" if point.endswith("hook_q") else "k_proj"
        added[_bias_name(int(point.split(".")[1]), projection)] = vectors.flatten()
    return added


def _bias_name(layer: int, projection: str) -> str:
    return f"model.layers.{layer}.self_attn.{projection}.bias"


def _every_bias(config: Mapping[str, Any], shape: ModelShape) -> dict[str, int]:
    """Size of every attention bias in the folded model, keyed by the name of the bias."""
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
    """New values of biases for each weight file.

    A bias that the base lacks is added to the file that contains the weight of its projection.
    """
    homes = base.homes
    changes: dict[Path, dict[str, Tensor]] = {shard.path: {} for shard in base.shards}
    for name, size in _every_bias(base.config, base.shape).items():
        weight = name.replace(".bias", ".weight")
        if name in homes and name not in added:
            continue
        home = homes.get(name, homes[weight])
        bias = read(home, name).float() if name in homes else torch.zeros(size)
        # Sums are stored in float32. If the model is loaded in half precision, each sum is then rounded only once.
        changes[home.path][name] = bias + added[name] if name in added else bias.to(dtype_of(home, weight))
    return changes


def _chapter(base: Checkpoint, steering: FocusSteering, shared: tuple[SharedKeys, ...]) -> list[str]:
    """Lines of the model card that describe the steering."""
    return [
        "# With focus directions folded in",
        "",
        f"This is `{base.label}` with focus directions of strength {steering.alpha:g} added to the queries"
        f"{'' if steering.directions.key is None else ' and keys'} of {len(steering.heads)} attention heads, as "
        "biases of `q_proj` and `k_proj`. All other weights are those of the base. Written by focuslens; "
        "`focuslens.json` has the heads, the digest of the directions, and the versions.",
        "",
        f"Heads: {', '.join(map(str, steering.heads))}.",
        *(["", *(f"- Layer {keys.layer}: {keys}." for keys in shared)] if shared else []),
    ]
