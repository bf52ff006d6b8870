"""Folding focus directions into a checkpoint: at the projection site they are biases of ``q_proj`` and ``k_proj``."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from focuslens.backends import ModelShape
from focuslens.files import versions, write_json
from focuslens.heads import Head
from focuslens.interventions import FocusSteering
from focuslens.serving.shards import Shard, dtype_of, open_shard, read, rewrite

__all__ = ["FoldedCheckpoint", "SharedKeys", "fold"]

_INDEX, _SINGLE, _CONFIG, _CARD = "model.safetensors.index.json", "model.safetensors", "config.json", "README.md"
_RECORD = "focuslens.json"
_FAMILIES = ("qwen2", "qwen3", "llama", "mistral")
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5", ".msgpack")
"""Other copies of the weights, which would not be steered, stay behind."""


@dataclass(frozen=True)
class SharedKeys:
    """A key-value head whose key vector acts on heads that were not chosen.

    Attributes:
        layer: The layer.
        key_value_head: Its key-value head.
        chosen: Query heads that read it and were chosen.
        others: Those that were not.
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
    """What :func:`fold` wrote.

    Attributes:
        directory: The checkpoint.
        shared: Key-value heads whose key vector acts on heads that were not chosen too.
        left_out: Files that were not copied: other copies of the weights.
    """

    directory: Path
    shared: tuple[SharedKeys, ...]
    left_out: tuple[str, ...]


def fold(
    source: str | Path, steering: FocusSteering, out: str | Path, *, revision: str | None = None
) -> FoldedCheckpoint:
    """Write a Hugging Face checkpoint that is steered without any hook.

    At the projection site ``(W x + alpha d)`` is the projection ``W x`` with a bias. Qwen2 and Qwen3 keep their class;
    Llama gets ``attention_bias``, with zeros where nothing is added; Mistral without a sliding window is the same
    computation as Llama, and becomes one. Weights are copied file by file, never loaded; dtypes stay as they are.

    Args:
        source: Directory or hub name of the checkpoint, in safetensors.
        steering: Directions of the projection site, their strength and heads, at all positions.
        out: Directory to write, new or empty.
        revision: Branch, tag or commit on the hub.

    Raises:
        FileNotFoundError: If the checkpoint is not there, or has no safetensors.
        FileExistsError: If ``out`` holds anything.
        ValueError: If the steering or the architecture cannot be folded, or the directions are of another model.
    """
    _require_foldable(steering)
    directory, out = _local(source, revision), Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} is no empty directory; name a new one")
    config: dict[str, Any] = json.loads((directory / _CONFIG).read_text())
    new_config, shape = _folded_config(config, str(source)), _shape(config)
    added, shared = _biases(steering, shape), _shared_keys(steering, shape)
    shards = _shards(directory)
    with _whole(out) as partial:
        index = _write_shards(shards, added, _every_bias(config, shape), partial)
        if index is not None:
            write_json(partial / _INDEX, index)
        write_json(partial / _CONFIG, new_config)
        left_out = _copy_rest(directory, partial)
        record = {"base": str(source), "revision": revision, "steering": steering.describe(), "versions": versions()}
        write_json(partial / _RECORD, record)
        (partial / _CARD).write_text(_card(directory, str(source), steering, shared))
    return FoldedCheckpoint(out, shared, left_out)


def _require_foldable(steering: FocusSteering) -> None:
    if steering.directions.site != "projection":
        raise ValueError(
            "the directions act at the rotary site, after the rotary embedding, where they are no bias of a weight; "
            "train with site='projection' to fold"
        )
    if steering.positions != "all":
        raise ValueError(f"positions is {steering.positions!r}; a bias acts at all positions: use positions='all'")


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
    if not (directory / _CONFIG).is_file():
        raise FileNotFoundError(f"{directory} holds no {_CONFIG}; is it a Hugging Face checkpoint?")
    return directory


def _folded_config(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The configuration of the folded checkpoint.

    Raises:
        ValueError: If the architecture is none of which a direction is a bias.
    """
    family = config.get("model_type")
    if family not in _FAMILIES:
        raise ValueError(f"{name} is of the type {family!r}; {', '.join(_FAMILIES)} can be folded")
    if config.get("quantization_config"):
        raise ValueError(f"the weights of {name} are quantized; fold the checkpoint they were made from")
    if config.get("auto_map"):
        raise ValueError(f"{name} brings code of its own (auto_map), which may compute attention otherwise")
    new = dict(config)
    if family == "mistral":
        if config.get("sliding_window") is not None:
            raise ValueError(
                f"{name} is a mistral with a sliding window of {config['sliding_window']} tokens; Mistral has no "
                "biases, and Llama, which could stand in, no window"
            )
        new = {key: value for key, value in config.items() if key != "sliding_window"}
        new |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "mlp_bias": False}
    if family != "qwen2":  # whose queries, keys and values have biases always
        new["attention_bias"] = True
    return new


def _shape(config: Mapping[str, Any]) -> ModelShape:
    n_heads = int(config["num_attention_heads"])
    return ModelShape(
        n_layers=int(config["num_hidden_layers"]),
        n_heads=n_heads,
        n_key_value_heads=int(config.get("num_key_value_heads") or n_heads),
        d_head=int(config.get("head_dim") or config["hidden_size"] // n_heads),
        d_model=int(config["hidden_size"]),
        d_vocab=int(config["vocab_size"]),
        n_ctx=int(config["max_position_embeddings"]),
    )


def _biases(steering: FocusSteering, shape: ModelShape) -> dict[str, Float[Tensor, "out"]]:
    """What is added to which bias, in float32."""
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
    """All biases that the folded class has, and their sizes."""
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
    found: list[SharedKeys] = []
    for (layer, key_value_head), heads in sorted(chosen.items()):
        readers = [head for head in range(shape.n_heads) if shape.key_value_head(head) == key_value_head]
        others = [head for head in readers if head not in heads]
        if others:
            pairs = [tuple(Head(layer, head) for head in some) for some in (sorted(heads), others)]
            found.append(SharedKeys(layer, key_value_head, pairs[0], pairs[1]))
    return tuple(found)


def _shards(directory: Path) -> list[Shard]:
    """The files of the checkpoint."""
    if (directory / _INDEX).is_file():
        index = json.loads((directory / _INDEX).read_text())
        names = sorted(set(index["weight_map"].values()))
    elif (directory / _SINGLE).is_file():
        names = [_SINGLE]
    else:
        raise FileNotFoundError(
            f"{directory} holds neither {_SINGLE} nor {_INDEX}; save the model with save_pretrained to get safetensors"
        )
    missing = [name for name in names if not (directory / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{directory} holds no {missing[0]}, which its {_INDEX} names")
    return [open_shard(directory / name) for name in names]


def _write_shards(
    shards: list[Shard], added: Mapping[str, Tensor], every: Mapping[str, int], out: Path
) -> dict[str, Any] | None:
    """Copy the shards, each with the biases of its projections; gives the index where there is more than one."""
    homes = {name: shard for shard in shards for name in shard.tensors}
    changes: dict[Path, dict[str, Tensor]] = {shard.path: {} for shard in shards}
    for name, size in every.items():
        weight = name.replace(".bias", ".weight")
        if weight not in homes:
            raise ValueError(f"the checkpoint has no {weight}; its tensors are not named as those of its type")
        if name in homes and name not in added:
            continue
        home = homes.get(name, homes[weight])
        bias = read(home, name).float() if name in homes else torch.zeros(size)
        if name in added:
            bias = bias + added[name]
        changes[home.path][name] = bias.to(dtype_of(home, name if name in homes else weight))
    weight_map, total = dict[str, str](), 0
    for shard in shards:
        rewrite(shard, out / shard.path.name, changes[shard.path])
        written = open_shard(out / shard.path.name)
        weight_map |= dict.fromkeys(written.tensors, shard.path.name)
        total += written.data_size
    single = len(shards) == 1 and shards[0].path.name == _SINGLE
    return None if single else {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}


def _copy_rest(directory: Path, out: Path) -> tuple[str, ...]:
    """Copy everything beside the weights; gives the names of what was left out."""
    left_out: list[str] = []
    for path in sorted(directory.iterdir()):
        if path.name in (_INDEX, _CONFIG, _CARD, _RECORD) or (out / path.name).exists() or path.name.startswith("."):
            continue
        if path.is_dir() or path.suffix in _WEIGHTS or path.name.endswith(".index.json"):
            left_out.append(path.name)
        else:
            shutil.copyfile(path, out / path.name)
    return tuple(left_out)


def _card(directory: Path, base: str, steering: FocusSteering, shared: tuple[SharedKeys, ...]) -> str:
    """The model card of the base, with a chapter on what was folded in front of its text."""
    card = directory / _CARD
    text = card.read_text() if card.is_file() else ""
    front, _, body = text[4:].partition("\n---\n") if text.startswith("---\n") else ("", "", text)
    lines = [
        *(["---", front, "---", ""] if front else []),
        "# With focus directions folded in",
        "",
        f"This is `{base}` with focus directions of strength {steering.alpha:g} added to the queries"
        f"{'' if steering.directions.key is None else ' and keys'} of {len(steering.heads)} attention heads, as "
        "biases of `q_proj` and `k_proj`. All other weights are those of the base. Written by focuslens; "
        "`focuslens.json` has the heads, the digest of the directions, and the versions.",
        "",
        f"Heads: {', '.join(map(str, steering.heads))}.",
        *(["", *(f"- Layer {one.layer}: {one}." for one in shared)] if shared else []),
        "",
        body.strip(),
    ]
    return "\n".join(lines).rstrip() + "\n"


@contextmanager
def _whole(out: Path) -> Generator[Path]:
    """A directory beside ``out`` that takes its place when the block ends, and is gone if it fails."""
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
    try:
        yield partial
        partial.chmod(0o755)
        if out.exists():
            out.rmdir()  # an empty one, as was checked
        partial.replace(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
