"""Export of steering at the rotary site, as a checkpoint with custom model code that adds the vectors."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from einops import rearrange
from jaxtyping import Float
from safetensors.torch import save
from torch import Tensor

from focuslens.directions.checkpoints.origin import warn_of_another_model
from focuslens.directions.checkpoints.shards import copy
from focuslens.directions.checkpoints.source import SINGLE, Checkpoint, open_checkpoint
from focuslens.directions.checkpoints.writing import require_writable, write_index, write_steered
from focuslens.interventions import FocusSteering
from focuslens.util.files import write_atomically
from focuslens.util.progress import progress_bar

__all__ = ["ExportedCheckpoint", "export"]

_CLASSES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
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
    """

    directory: Path
    left_out: tuple[str, ...]
    training: tuple[str, ...] = ()


def export(
    source: str | Path,
    steering: FocusSteering,
    out: str | Path,
    *,
    revision: str | None = None,
    progress: bool | None = None,
) -> ExportedCheckpoint:
    """Write a Hugging Face checkpoint that is steered at the rotary site with any attention implementation.

    ``AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)`` loads a subclass of the original model class.
    In steered layers, this subclass adds ``alpha d_Q`` to the queries after the rotary embedding (equation 5). Key
    vectors are left out, because they have no effect at the rotary site. The query vectors are stored in
    ``focus_directions.safetensors``, and the weights are copied unchanged. The checkpoint has a new model type.
    Therefore, the Auto classes raise an error without ``trust_remote_code``, instead of loading an unsteered model.

    Args:
        source: Directory or hub name of a Llama, Mistral, Qwen2 or Qwen3 checkpoint with safetensors files.
        steering: Steering to export. The directions must be for the rotary site, and ``positions`` must be ``"all"``.
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
    base = open_checkpoint(source, revision, _CLASSES, "exported")
    warn_of_another_model(base, steering.directions)
    vectors = _vectors(steering, base)
    config = _config(base, sorted(int(name.split(".")[2]) for name in vectors))
    with write_steered(base, steering, Path(out), config, _chapter(base, steering)) as (partial, left_out):
        names = [_FIRST if shard.path.name == SINGLE else shard.path.name for shard in base.shards]
        with progress_bar("copying weights", base.size, unit="B", show=progress) as bar:
            for shard, name in zip(base.shards, names, strict=True):
                copy(shard, partial / name, bar.update)
        write_atomically(partial / _VECTORS, save(vectors, metadata={"format": "pt"}))
        write_index(partial, [*names, _VECTORS])
        shutil.copyfile(_CODE, partial / _CODE.name)
    return ExportedCheckpoint(Path(out), tuple(left_out.weights), tuple(left_out.training))


def _require_exportable(steering: FocusSteering) -> None:
    if steering.directions.site != "rotary":
        raise ValueError(
            "the directions act at the projection site, where they are biases: use fold, which needs no code"
        )
    if steering.positions != "all":
        raise ValueError(
            f"positions is {steering.positions!r}; a served model does not know where a response begins: "
            "use positions='all'"
        )


def _vectors(steering: FocusSteering, base: Checkpoint) -> dict[str, Float[Tensor, "head 1 d_head"]]:
    """Values of the ``focus_query`` buffers of the steered layers, keyed by tensor name, in float32."""
    return {
        f"model.layers.{int(point.split('.')[1])}.self_attn.focus_query": rearrange(added, "head d -> head 1 d")
        for point, added in steering.additions(base.shape).items()
    }


def _config(base: Checkpoint, layers: list[int]) -> dict[str, Any]:
    family = str(base.config["model_type"])
    steered = f"Steered{_CLASSES[family]}"
    return {
        **base.config_with_dtype(),
        "model_type": f"steered_{family}",
        "architectures": [f"{steered}ForCausalLM"],
        "auto_map": {
            "AutoConfig": f"{_CODE.stem}.{steered}Config",
            "AutoModelForCausalLM": f"{_CODE.stem}.{steered}ForCausalLM",
        },
        "focus_layers": layers,
    }


def _chapter(base: Checkpoint, steering: FocusSteering) -> list[str]:
    """Lines of the model card that describe the steering."""
    return [
        "# With focus directions",
        "",
        f"This is `{base.label}` with focus directions of strength {steering.alpha:g} added to the queries of "
        f"{len(steering.heads)} attention heads after the rotary embedding. Load it with `trust_remote_code=True`: "
        f"`{_CODE.name}` adds the vectors of `{_VECTORS}`, with any attention implementation. The weights are those of "
        "the base. Written by focuslens; `focuslens.json` has the heads, the digest of the directions, and the "
        "versions.",
        "",
        f"Heads: {', '.join(map(str, steering.heads))}.",
    ]
