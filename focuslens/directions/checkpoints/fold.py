"""Folding of focus directions into a checkpoint. At the projection site, directions are biases of queries and keys.

A direction with a rank also changes the weight of the query projection, because its vector is a linear function of the
query: ``W x + c + alpha (b + U V^T (W x + c)) = M W x + M c + alpha b`` with ``M = I + alpha U V^T``.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from focuslens.directions.checkpoints.biases import SharedKeys, bias_name, projection_biases, shared_keys
from focuslens.directions.checkpoints.families import FAMILIES, can_fold, foldable
from focuslens.directions.checkpoints.origin import warn_of_another_model
from focuslens.directions.checkpoints.shards import dtype_of, read, rewrite
from focuslens.directions.checkpoints.source import Checkpoint, open_checkpoint
from focuslens.directions.checkpoints.writing import require_writable, write_index, write_steered
from focuslens.heads import ModelShape
from focuslens.interventions import FocusSteering
from focuslens.interventions.low_rank import LowRank
from focuslens.util.progress import progress_bar

__all__ = ["FoldedCheckpoint", "fold"]


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
    stored as a bias. A checkpoint keeps its class, and the entry of its configuration that adds biases to queries and
    keys, ``attention_bias``, is set to ``True``. Qwen2 always has such biases. A Mistral checkpoint without a sliding
    window becomes a Llama checkpoint, because the Llama class computes the same function. Where no vector is added, new
    biases are zero; in StarCoder 2 and ERNIE 4.5, the entry adds biases to the MLPs too. Weights are copied unchanged,
    file by file, without loading them. The steering biases are in float32, independently of the dtype of the weights.
    :func:`export` writes families without biases.

    If the directions have a rank, ``W`` becomes ``(I + alpha U V^T) W`` in the rows of each steered head. Weights and
    biases of the query projections of steered layers are then in float32, and the weights of one file are in memory at
    a time.

    Args:
        source: Directory or hub name of a checkpoint with safetensors files. The page on serving lists the families.
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
    base = open_checkpoint(source, revision, foldable(), "folded")
    config, shared = _folded_config(base), shared_keys(steering, base.shape)
    warn_of_another_model(base, steering.directions)
    changes, products = _changes(base, steering), _products(steering, base.shape)
    with write_steered(base, steering, Path(out), config, _chapter(base, steering, shared)) as (partial, left_out):
        with progress_bar("copying weights", base.size, unit="B", show=progress) as bar:
            for shard in base.shards:
                weights = {
                    name: _mapped(product, read(shard, name))
                    for name, product in products.items()
                    if name in shard.tensors
                }
                rewrite(shard, partial / shard.path.name, {**changes[shard.path], **weights}, bar.update)
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
    family = FAMILIES[base.family]
    new = base.config_with_dtype()
    if not can_fold(base.resolved):
        raise ValueError(
            f"{base.name} is a mistral with a sliding window of {base.resolved.sliding_window} tokens; Mistral has no "
            "biases, and Llama, which could replace it, has no window; use export, whose code adds the biases "
            "(focuslens export --site projection)"
        )
    if base.family == "mistral":
        # All entries are written explicitly, because Mistral and Llama have different defaults.
        new = {**base.resolved.to_dict(), "dtype": new.get("dtype") or new["torch_dtype"]}
        new.pop("sliding_window", None)
        family = FAMILIES["llama"]
        new |= {"model_type": "llama", "architectures": [family.model_class], "mlp_bias": False}
    if family.switch is not None:
        new[family.switch] = True
    return new


def _products(steering: FocusSteering, shape: ModelShape) -> dict[str, LowRank]:
    """Matrices ``alpha U`` and ``V`` of each query projection, keyed by the name of its weight."""
    products = steering.products(shape)
    return {
        bias_name(int(point.split(".")[1]), "q_proj").replace(".bias", ".weight"): product
        for point, product in products.items()
    }


def _mapped(product: LowRank, tensor: Float[Tensor, "out ..."]) -> Float[Tensor, "out ..."]:
    """``(I + alpha U V^T) W`` of a weight, or of a bias, in float32 unless it is in double precision.

    The columns of a weight are mapped like queries.
    """
    exact, n_heads = tensor.to(torch.promote_types(tensor.dtype, torch.float32)), len(product.u)
    columns = rearrange(exact.double(), "(head d_head) ... -> ... head d_head", head=n_heads)
    added = product.to(columns.device, columns.dtype)(columns)
    return rearrange(columns + added, "... head d_head -> (head d_head) ...").to(exact.dtype).contiguous()


def _every_bias(base: Checkpoint) -> dict[str, int]:
    """Size of every bias that the folded model has for the vectors, keyed by the name of the bias."""
    sizes: dict[str, int] = {}
    for layer in range(base.shape.n_layers):
        for module in FAMILIES[base.family].biased:
            name = f"model.layers.{layer}.{module}"
            sizes[f"{name}.bias"] = int(base.homes[f"{name}.weight"].tensors[f"{name}.weight"]["shape"][0])
    return sizes


def _changes(base: Checkpoint, steering: FocusSteering) -> dict[Path, dict[str, Tensor]]:
    """New values of biases for each weight file.

    A bias that the base lacks is added to the file that contains the weight of its projection.
    """
    homes, added, products = base.homes, projection_biases(steering, base.shape), _products(steering, base.shape)
    changes: dict[Path, dict[str, Tensor]] = {shard.path: {} for shard in base.shards}
    for name, size in _every_bias(base).items():
        weight = name.replace(".bias", ".weight")
        if name in homes and name not in added:
            continue
        home = homes.get(name, homes[weight])
        bias = read(home, name).float() if name in homes else torch.zeros(size)
        if weight in products:
            bias = _mapped(products[weight], bias)
        # Sums are stored in float32. If the model is loaded in half precision, each sum is then rounded only once.
        changes[home.path][name] = bias + added[name] if name in added else bias.to(dtype_of(home, weight))
    return changes


def _chapter(base: Checkpoint, steering: FocusSteering, shared: tuple[SharedKeys, ...]) -> list[str]:
    """Lines of the model card that describe the steering."""
    directions = steering.directions
    parts = "queries" if directions.key is None else "queries and keys"
    where = "as biases of `q_proj` and `k_proj`"
    if directions.rank:
        where += f" and, at rank {directions.rank}, in the weights of `q_proj`"
    return [
        "# With focus directions folded in",
        "",
        f"This is `{base.label}` with focus directions of strength {steering.alpha:g} added to the {parts} of "
        f"{len(steering.heads)} attention heads, {where}. All other weights are those of the base. Written by "
        "focuslens; `focuslens.json` has the heads, the digest of the directions, and the versions.",
        "",
        f"Heads: {', '.join(map(str, steering.heads))}.",
        *(["", *(f"- Layer {keys.layer}: {keys}." for keys in shared)] if shared else []),
    ]
