"""Reading a checkpoint's directory, and writing a steered one beside it, whole or not at all."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from focuslens.backends import ModelShape
from focuslens.files import versions, write_json
from focuslens.interventions import FocusSteering
from focuslens.serving.shards import Shard, dtype_of, open_shard

__all__ = ["SINGLE", "Checkpoint", "open_checkpoint", "write_index", "write_steered"]

INDEX, SINGLE, CONFIG = "model.safetensors.index.json", "model.safetensors", "config.json"
_CARD, _RECORD = "README.md", "focuslens.json"
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5", ".msgpack")
"""Other copies of the weights, which would not be steered, stay behind."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in Hugging Face format, by its files' headers.

    Attributes:
        name: What the user called it.
        revision: Of the hub, if one was asked for.
        directory: Where it lies.
        config: Its ``config.json``.
        shards: Its files of weights.
    """

    name: str
    revision: str | None
    directory: Path
    config: Mapping[str, Any]
    shards: tuple[Shard, ...]

    @cached_property
    def resolved(self) -> Any:
        """The configuration with what its class takes where ``config.json`` is silent, such as Mistral's window."""
        from transformers import AutoConfig

        return AutoConfig.for_model(**self.config)

    @property
    def shape(self) -> ModelShape:
        """The sizes that directions have to fit."""
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

    def config_with_dtype(self) -> dict[str, Any]:
        """A copy of the configuration that names the weights' dtype, which float32 vectors among them would hide."""
        config = dict(self.config)
        if not (config.get("dtype") or config.get("torch_dtype")):
            shard = next(shard for shard in self.shards if shard.tensors)
            config["dtype"] = str(dtype_of(shard, min(shard.tensors))).removeprefix("torch.")
        return config

    @property
    def size(self) -> int:
        """Bytes of all weights."""
        return sum(shard.data_size for shard in self.shards)

    @property
    def is_single(self) -> bool:
        """Whether all weights are in the one file that needs no index."""
        return [shard.path.name for shard in self.shards] == [SINGLE]


def open_checkpoint(source: str | Path, revision: str | None, families: Sequence[str], verb: str) -> Checkpoint:
    """Open a directory, or a model on the hub.

    Args:
        source: Directory or hub name.
        revision: Branch, tag or commit on the hub.
        families: The ``model_type`` of checkpoints that are accepted.
        verb: What they can be, for the error.

    Raises:
        FileNotFoundError: If the checkpoint is not there, or has no safetensors.
        ValueError: If it is of no accepted type, or brings code of its own.
    """
    directory = _local(source, revision)
    config: dict[str, Any] = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
    family = config.get("model_type")
    if family not in families:
        raise ValueError(f"{source} is of the type {family!r}; {', '.join(families)} can be {verb}")
    if config.get("auto_map"):
        raise ValueError(f"{source} brings code of its own (auto_map), which may compute attention otherwise")
    return Checkpoint(str(source), revision, directory, config, tuple(_shards(directory)))


def _local(source: str | Path, revision: str | None) -> Path:
    if Path(source).is_dir():
        directory = Path(source)
    else:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError

        try:
            directory = Path(snapshot_download(str(source), revision=revision))
        except (HFValidationError, OSError) as error:
            raise FileNotFoundError(f"{source} is neither a directory nor a model on the hub: {error}") from error
    if not (directory / CONFIG).is_file():
        raise FileNotFoundError(f"{directory} holds no {CONFIG}; is it a Hugging Face checkpoint?")
    return directory


def _shards(directory: Path) -> list[Shard]:
    if (directory / SINGLE).is_file():  # which Hugging Face takes before an index too
        names = [SINGLE]
    elif (directory / INDEX).is_file():
        index = json.loads((directory / INDEX).read_text(encoding="utf-8"))
        names = sorted(set(index["weight_map"].values()))
    else:
        raise FileNotFoundError(
            f"{directory} holds neither {SINGLE} nor {INDEX}; save the model with save_pretrained to get safetensors"
        )
    missing = [name for name in names if not (directory / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{directory} holds no {missing[0]}, which its {INDEX} names")
    return [open_shard(directory / name) for name in names]


@contextmanager
def write_steered(
    base: Checkpoint, steering: FocusSteering, out: Path, config: Mapping[str, Any], chapter: Sequence[str]
) -> Generator[tuple[Path, list[str]]]:
    """A new directory to write weights into; when the block ends, all else is added and it becomes ``out``.

    Args:
        base: The checkpoint that is steered.
        steering: How, for the record.
        out: The directory to become, new or empty.
        config: The new ``config.json``.
        chapter: Lines of the model card, in front of the base's own text.

    Yields:
        The directory, and a list that will hold the names of the files that were left out.

    Raises:
        FileExistsError: If ``out`` holds anything.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} is no empty directory; name a new one")
    out.parent.mkdir(parents=True, exist_ok=True)
    partial, left_out = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}.")), list[str]()
    try:
        yield partial, left_out
        write_json(partial / CONFIG, dict(config))
        left_out += _copy_rest(base, partial)
        record = {"base": base.name, "revision": base.revision, "steering": steering.describe(), "versions": versions()}
        write_json(partial / _RECORD, record)
        (partial / _CARD).write_text(_card(base.directory, chapter), encoding="utf-8")
        partial.chmod(0o755)
        if out.exists():
            out.rmdir()  # an empty one, as was checked
        partial.replace(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def write_index(directory: Path, names: Sequence[str]) -> None:
    """Write the index of a checkpoint in several files."""
    shards = [open_shard(directory / name) for name in names]
    places = {tensor: shard.path.name for shard in shards for tensor in shard.tensors}
    total = sum(shard.data_size for shard in shards)
    write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))})


def _copy_rest(base: Checkpoint, out: Path) -> list[str]:
    """Copy everything beside the weights; gives the names of what was left out."""
    left_out, weights = list[str](), {shard.path for shard in base.shards}
    for path in sorted(base.directory.iterdir()):
        if path.name in (INDEX, CONFIG, _CARD, _RECORD) or path.name.startswith(".") or path in weights:
            continue
        if path.is_dir() or path.suffix in _WEIGHTS or path.name.endswith(".index.json"):
            left_out.append(path.name)
        else:
            shutil.copyfile(path, out / path.name)
    return left_out


def _card(directory: Path, chapter: Sequence[str]) -> str:
    """The model card of the base, with a chapter in front of its text."""
    card = directory / _CARD
    text = card.read_text(encoding="utf-8") if card.is_file() else ""
    front, _, body = text[4:].partition("\n---\n") if text.startswith("---\n") else ("", "", text)
    lines = [*(["---", front, "---", ""] if front else []), *chapter, "", body.strip()]
    return "\n".join(lines).rstrip() + "\n"
