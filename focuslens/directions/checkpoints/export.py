"""Export of a steered checkpoint with model code: vectors after the rotary embedding, or biases that a family lacks."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from einops import rearrange
from jaxtyping import Float
from safetensors.torch import save
from torch import Tensor

from focuslens.directions.checkpoints.biases import SharedKeys, fused_biases, projection_biases, shared_keys
from focuslens.directions.checkpoints.families import FAMILIES, can_fold, exported
from focuslens.directions.checkpoints.origin import warn_of_another_model
from focuslens.directions.checkpoints.shards import copy
from focuslens.directions.checkpoints.source import SINGLE, Checkpoint, open_checkpoint
from focuslens.directions.checkpoints.writing import require_writable, write_index, write_steered
from focuslens.interventions import FocusSteering
from focuslens.util.files import write_atomically
from focuslens.util.progress import progress_bar

__all__ = ["ExportedCheckpoint", "export", "is_foldable"]

_CODE = Path(__file__).with_name("modeling_focus_directions.py")
_VECTORS = "focus_directions.safetensors"
_FIRST = "model-00001-of-00001.safetensors"
"""New name of ``model.safetensors``. If a file with the old name exists, Hugging Face ignores the index."""


@dataclass(frozen=True)
class ExportedCheckpoint:
    """Result of :func:`export`.

    Attributes:
        directory: Directory of the checkpoint. Loading the checkpoint requires ``trust_remote_code=True``.
        left_out: Skipped files and directories of the base checkpoint, which contain other copies of the weights.
        training: Skipped files for resuming the training of the base checkpoint, such as ``optimizer.pt``.
        shared: Key-value heads whose key vectors also affect query heads that are not steered. There are none at the
            rotary site, where key vectors have no effect.
    """

    directory: Path
    left_out: tuple[str, ...]
    training: tuple[str, ...] = ()
    shared: tuple[SharedKeys, ...] = ()


def export(
    source: str | Path,
    steering: FocusSteering,
    out: str | Path,
    *,
    revision: str | None = None,
    progress: bool | None = None,
) -> ExportedCheckpoint:
    """Write a Hugging Face checkpoint with model code that steers it, with any attention implementation.

    ``AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)`` loads a subclass of the original model class.
    The weights are copied unchanged, and the vectors are stored in ``focus_directions.safetensors``. The checkpoint has
    a new model type. Therefore, the Auto classes raise an error without ``trust_remote_code``, instead of loading an
    unsteered model.

    * **Rotary site**: In steered layers, the subclass adds ``alpha d_Q`` to the queries after the rotary embedding
      (equation 5). Key vectors are left out, because they have no effect at the rotary site.
    * **Projection site**: The subclass adds biases to projections that have none in their family, such as those of
      Mistral with a sliding window and of Phi-3. The biases contain ``alpha d_Q`` and ``alpha d_K``. :func:`fold`
      writes all other families without code.

    Args:
        source: Directory or hub name of a checkpoint with safetensors files. The page on serving lists the families.
        steering: Steering to export. ``positions`` must be ``"all"``.
        out: Directory for the new checkpoint. If the directory exists, it must be empty.
        revision: Branch, tag or commit on the hub.
        progress: Whether to show a progress bar; :mod:`focuslens.util.progress` describes the default.

    Raises:
        FileNotFoundError: If the checkpoint does not exist, or if it has no safetensors files.
        FileExistsError: If ``out`` exists and is not an empty directory.
        ValueError: If the steering or the architecture cannot be exported, if the directions belong to a model of a
            different shape, or if ``out`` is a symbolic link, contains the working directory, or is inside ``source``.

    Warns:
        UserWarning: If the provenance of the directions names a different model.
    """
    _require_exportable(steering)
    require_writable(Path(out), source)
    site = steering.directions.site
    base = open_checkpoint(source, revision, exported(), "exported")
    if site == "projection" and can_fold(base.resolved):
        raise ValueError(
            "the directions act at the projection site, where they are biases: use fold, which needs no code"
        )
    warn_of_another_model(base, steering.directions)
    vectors = _vectors(steering, base)
    shared = shared_keys(steering, base.shape) if site == "projection" else ()
    config = _config(base, sorted(vectors), site)
    with write_steered(base, steering, Path(out), config, _chapter(base, steering, shared)) as (partial, left_out):
        names = [_FIRST if shard.path.name == SINGLE else shard.path.name for shard in base.shards]
        with progress_bar("copying weights", base.size, unit="B", show=progress) as bar:
            for shard, name in zip(base.shards, names, strict=True):
                copy(shard, partial / name, bar.update)
        write_atomically(partial / _VECTORS, save(vectors, metadata={"format": "pt"}))
        write_index(partial, [*names, _VECTORS])
        shutil.copyfile(_CODE, partial / _CODE.name)
    return ExportedCheckpoint(Path(out), tuple(left_out.weights), tuple(left_out.training), shared)


def is_foldable(source: str | Path, revision: str | None = None) -> bool:
    """Whether :func:`fold` can write a checkpoint, so that it needs no code.

    Raises:
        FileNotFoundError: If the checkpoint does not exist, or if it has no safetensors files.
        ValueError: If neither :func:`fold` nor :func:`export` can write the checkpoint.
    """
    return can_fold(open_checkpoint(source, revision, FAMILIES, "folded or exported").resolved)


def _require_exportable(steering: FocusSteering) -> None:
    if steering.directions.rank:
        remedy = (
            "train with site='projection' and use fold"
            if steering.directions.site == "rotary"
            else "use fold, if it supports the family"
        )
        raise ValueError(
            f"the directions have rank {steering.directions.rank}, and the code of an exported checkpoint adds one "
            f"vector per head; steer with FocusSteering, or {remedy}"
        )
    if steering.positions != "all":
        raise ValueError(
            f"positions is {steering.positions!r}; a served model does not know where a response begins: "
            "use positions='all'"
        )


def _vectors(steering: FocusSteering, base: Checkpoint) -> dict[str, Float[Tensor, "..."]]:
    """Tensors to add to the checkpoint, by name, in float32.

    At the rotary site, they are the ``focus_query`` buffers ``[head 1 d_head]`` of the steered layers. At the
    projection site, they are biases.
    """
    if steering.directions.site == "projection":
        biases = fused_biases if FAMILIES[base.family].fused else projection_biases
        return biases(steering, base.shape)
    return {
        f"model.layers.{int(point.split('.')[1])}.self_attn.focus_query": rearrange(added, "head d -> head 1 d")
        for point, added in steering.additions(base.shape).items()
    }


def _config(base: Checkpoint, names: list[str], site: str) -> dict[str, Any]:
    """Configuration of the exported checkpoint, whose code adds the tensors ``names``."""
    family = FAMILIES[base.family]
    model_class, config_class = f"Steered{family.model_class}", f"Steered{family.config_class}"
    entries: dict[str, Any] = {"focus_layers": sorted(int(name.split(".")[2]) for name in names)}
    if site == "projection":
        entries = {"focus_layers": [], "focus_biases": [name.removesuffix(".bias") for name in names]}
    return {
        **base.config_with_dtype(),
        "model_type": f"steered_{base.family}",
        "architectures": [model_class],
        "auto_map": {
            "AutoConfig": f"{_CODE.stem}.{config_class}",
            "AutoModelForCausalLM": f"{_CODE.stem}.{model_class}",
        },
        **entries,
    }


def _chapter(base: Checkpoint, steering: FocusSteering, shared: tuple[SharedKeys, ...]) -> list[str]:
    """Lines of the model card that describe the steering."""
    directions = steering.directions
    parts = "queries" if directions.site == "rotary" or directions.key is None else "queries and keys"
    where = "after the rotary embedding" if directions.site == "rotary" else "as biases of their projections"
    return [
        "# With focus directions",
        "",
        f"This is `{base.label}` with focus directions of strength {steering.alpha:g} added to the {parts} of "
        f"{len(steering.heads)} attention heads {where}. Load it with `trust_remote_code=True`: "
        f"`{_CODE.name}` adds the vectors of `{_VECTORS}`, with any attention implementation. The weights are those of "
        "the base. Written by focuslens; `focuslens.json` has the heads, the digest of the directions, and the "
        "versions.",
        "",
        f"Heads: {', '.join(map(str, steering.heads))}.",
        *(["", *(f"- Layer {keys.layer}: {keys}." for keys in shared)] if shared else []),
    ]
