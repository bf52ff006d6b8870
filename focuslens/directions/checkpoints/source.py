"""Reading of Hugging Face checkpoints from a directory or the hub, without loading the weights."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from focuslens.directions.checkpoints.families import FAMILIES, Family
from focuslens.directions.checkpoints.shards import Shard, dtype_of, open_shard
from focuslens.heads import ModelShape
from focuslens.model.sources.names import checkpoint_path, shown_name
from focuslens.util.library_bars import library_bars

__all__ = ["CONFIG", "INDEX", "SINGLE", "TENSOR_SUFFIXES", "Checkpoint", "open_checkpoint"]

INDEX, SINGLE, CONFIG = "model.safetensors.index.json", "model.safetensors", "config.json"
TENSOR_SUFFIXES = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".npz", ".gguf", ".onnx", ".onnx_data", ".h5"),
    *(".msgpack", ".ot", ".tflite"),
)
"""Suffixes of weight files, in any format."""
_FETCHED_LATER = (
    *(f"*{suffix}" for suffix in TENSOR_SUFFIXES),
    *("original/*", "onnx/*", "openvino/*", "coreml/*", "checkpoint-*/*", "runs/*"),
)
"""Patterns that the first download from the hub skips: weights in any format, and folders with copies of weights."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in Hugging Face format: its configuration and the headers of its weight files.

    Attributes:
        name: Directory or hub name, as passed by the user.
        revision: Requested branch, tag or commit on the hub, or ``None``.
        commit: Commit on the hub to which the revision was resolved, or ``None`` if unknown.
        directory: Local directory of the checkpoint.
        config: Content of ``config.json``.
        shards: Headers of the weight files.
    """

    name: str
    revision: str | None
    commit: str | None
    directory: Path
    config: Mapping[str, Any]
    shards: tuple[Shard, ...]

    @property
    def label(self) -> str:
        """Name for files that can be published: the last component of a directory, or the name on the hub."""
        return shown_name(self.name)

    @property
    def family(self) -> str:
        """Model type, a key of :data:`focuslens.directions.checkpoints.families.FAMILIES`."""
        return str(self.config["model_type"])

    @cached_property
    def resolved(self) -> Any:
        """Configuration with the defaults of its class for missing entries, such as Mistral's sliding window."""
        from transformers import AutoConfig

        return AutoConfig.for_model(**self.config)

    @property
    def shape(self) -> ModelShape:
        """Sizes of the model, such as its numbers of layers and heads."""
        config, n_heads = self.resolved, int(self.resolved.num_attention_heads)
        return ModelShape(
            n_layers=int(config.num_hidden_layers),
            n_heads=n_heads,
            n_key_value_heads=int(config.num_key_value_heads or n_heads),
            d_head=int(getattr(config, "head_dim", None) or config.hidden_size // n_heads),
            d_model=int(config.hidden_size),
            d_vocab=int(config.vocab_size),
            n_ctx=int(config.max_position_embeddings),
        )

    @cached_property
    def homes(self) -> Mapping[str, Shard]:
        """Weight file of each tensor, keyed by tensor name."""
        return {name: shard for shard in self.shards for name in shard.tensors}

    def config_with_dtype(self) -> dict[str, Any]:
        """Copy of the configuration with an entry for the dtype of the weights.

        Without this entry, loaders infer the dtype from the tensors, which include the added float32 vectors.
        """
        config = dict(self.config)
        if not (config.get("dtype") or config.get("torch_dtype")):
            shard = next(shard for shard in self.shards if shard.tensors)
            config["dtype"] = str(dtype_of(shard, min(shard.tensors))).removeprefix("torch.")
        return config

    @property
    def size(self) -> int:
        """Size of all weights, in bytes."""
        return sum(shard.data_size for shard in self.shards)

    @property
    def is_single(self) -> bool:
        """Whether all weights are in a single ``model.safetensors``, which does not need an index."""
        return [shard.path.name for shard in self.shards] == [SINGLE]


def open_checkpoint(source: str | Path, revision: str | None, families: Mapping[str, Family], verb: str) -> Checkpoint:
    """Open a checkpoint in a directory or on the hub.

    Of the weight files on the hub, only the safetensors files that the model uses are downloaded.

    Args:
        source: Directory, hub name, GGUF file or known model.
        revision: Branch, tag or commit on the hub.
        families: Accepted families, by ``model_type``.
        verb: Past participle for error messages, such as "folded".

    Raises:
        FileNotFoundError: If the checkpoint does not exist, or if it has no safetensors files.
        ValueError: If the checkpoint is not a causal language model of an accepted type, contains custom code, is
            quantized, or has tensor names that do not fit its type.
    """
    path = checkpoint_path(str(source))
    remote = not Path(path).is_dir()
    directory = _fetched(path, revision, ignore=_FETCHED_LATER) if remote else Path(path)
    if not (directory / CONFIG).is_file():
        raise FileNotFoundError(f"{directory} holds no {CONFIG}; is it a Hugging Face checkpoint?")
    config: dict[str, Any] = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
    _require_steerable(str(source), config, families, verb)
    commit = directory.name if remote and re.fullmatch(r"[0-9a-f]{40}", directory.name) else None
    if remote:
        directory = _fetch_weights(str(source), commit or revision)
    base = Checkpoint(str(source), revision, commit, directory, config, tuple(_shards(directory)))
    _require_projections(base)
    return base


def _fetched(
    name: str, revision: str | None, *, allow: Sequence[str] | None = None, ignore: Sequence[str] | None = None
) -> Path:
    """Download a selection of files from the hub, and return the local directory of the snapshot."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    allowed, ignored = (None if patterns is None else list(patterns) for patterns in (allow, ignore))
    try:
        with library_bars():
            return Path(snapshot_download(name, revision=revision, allow_patterns=allowed, ignore_patterns=ignored))
    except (HFValidationError, OSError) as error:
        raise FileNotFoundError(f"{name} is neither a directory nor a model on the hub: {error}") from error


def _fetch_weights(name: str, revision: str | None) -> Path:
    """Download ``model.safetensors`` or, if it does not exist, all files listed in the index. Return the directory."""
    directory = _fetched(name, revision, allow=[SINGLE])
    if not (directory / SINGLE).is_file() and (directory / INDEX).is_file():
        directory = _fetched(name, revision, allow=_indexed(directory))
    return directory


def _require_steerable(name: str, config: Mapping[str, Any], families: Mapping[str, Family], verb: str) -> None:
    family = str(config.get("model_type"))
    if family not in families:
        raise ValueError(
            f"{name} is of the type {family!r}; {', '.join(families)} can be {verb}{_remedy(family, verb)}"
        )
    required, architectures = families[family].model_class, config.get("architectures") or []
    if architectures and required not in architectures:
        raise ValueError(
            f"{name} is a {', '.join(architectures)}; of the type {family!r} only a {required} can be {verb}"
        )
    if config.get("auto_map"):
        raise ValueError(f"{name} has its own code (auto_map), which may compute attention differently")
    if config.get("quantization_config"):
        raise ValueError(f"the weights of {name} are quantized; name the checkpoint that they were made from")


def _remedy(family: str, verb: str) -> str:
    """Other way to write a family that cannot be written in this way; empty if there is none."""
    if family in FAMILIES and FAMILIES[family].converted:
        return "; its experts' weights cannot be loaded under another type: train with site='projection' and use fold"
    if verb == "folded" and family in FAMILIES:
        return "; use export, whose code adds biases (focuslens export --site projection)"
    return ""


def _require_projections(base: Checkpoint) -> None:
    """Check that each module that can get a bias has a weight with the standard name and a supported dtype.

    For example, a Llama checkpoint with a single matrix for queries, keys and values is rejected.
    """
    family = FAMILIES[base.family]
    modules = (*(f"self_attn.{name}" for name in family.projections), *family.other_biases)
    for layer in range(base.shape.n_layers):
        for module in modules:
            name = f"model.layers.{layer}.{module}.weight"
            if name not in base.homes:
                raise ValueError(f"{base.name} has no {name}; the names of its tensors do not match its model type")
            dtype_of(base.homes[name], name)  # raises ValueError for an unsupported dtype


def _indexed(directory: Path) -> list[str]:
    index = json.loads((directory / INDEX).read_text(encoding="utf-8"))
    return sorted(set(index["weight_map"].values()))


def _shards(directory: Path) -> list[Shard]:
    if (directory / SINGLE).is_file():  # as in Hugging Face, a single file takes precedence over an index
        names = [SINGLE]
    elif (directory / INDEX).is_file():
        names = _indexed(directory)
    else:
        raise FileNotFoundError(
            f"{directory} holds neither {SINGLE} nor {INDEX}; save the model with save_pretrained to get safetensors"
        )
    missing = [name for name in names if not (directory / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{directory} holds no {missing[0]}, which its {INDEX} names")
    return [open_shard(directory / name) for name in names]
