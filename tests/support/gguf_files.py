"""GGUF files of the tiny random checkpoints, written as llama.cpp's converter writes them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize
from safetensors.torch import load_file

__all__ = ["ARCHITECTURES", "write_gguf"]

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""llama.cpp's name of an architecture, by ``model_type``."""

_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
_OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def write_gguf(
    checkpoint: Path,
    path: Path,
    kind: str = "F32",
    *,
    rule: str = "gpt-2",
    entries: Mapping[str, Any] | None = None,
    tensors: Mapping[str, np.ndarray | None] | None = None,
) -> Path:
    """Write a checkpoint as a GGUF file.

    Args:
        checkpoint: Directory of the checkpoint.
        path: The file.
        kind: Type of matrices: ``F32``, ``F16``, ``BF16``, ``Q8_0``, ``Q4_0``, ...; vectors are always ``F32``.
        rule: Rule by which text is split (``tokenizer.ggml.pre``).
        entries: Entries to add or to replace. The value ``None`` leaves an entry out.
        tensors: Tensors to add or to replace. The value ``None`` leaves a tensor out.
    """
    config = json.loads((checkpoint / "config.json").read_text())
    architecture = (entries or {}).get("general.architecture", ARCHITECTURES[config["model_type"]])
    writer = GGUFWriter(path, architecture)
    wanted = {**_entries(config, architecture), **_vocabulary(checkpoint, rule), **(entries or {})}
    wanted["general.file_type"] = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "BF16": 32}[kind]
    for key, value in wanted.items():
        if value is not None and key != "general.architecture":
            _add(writer, key, value)
    for name, values in {**_tensors(checkpoint, config), **(tensors or {})}.items():
        if values is None:
            continue
        matrix = values.ndim > 1 and name != "rope_freqs.weight"
        wide = GGMLQuantizationType[kind if matrix else "F32"]
        writer.add_tensor(name, quantize(values, wide), raw_dtype=wide)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def _entries(config: Mapping[str, Any], architecture: str) -> dict[str, Any]:
    rope = config["rope_parameters"]
    width = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    entries = {
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "block_count": config["num_hidden_layers"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        "attention.key_length": width,
        "attention.value_length": width,
        "rope.freq_base": float(rope["rope_theta"]),
        "rope.dimension_count": width,
        "vocab_size": config["vocab_size"],
    }
    if rope["rope_type"] == "linear":
        entries |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}
    return {"general.name": "tiny", **{f"{architecture}.{key}": value for key, value in entries.items()}}


def _vocabulary(checkpoint: Path, rule: str) -> dict[str, Any]:
    tokenizer = json.loads((checkpoint / "tokenizer.json").read_text())
    settings = json.loads((checkpoint / "tokenizer_config.json").read_text())
    vocabulary: dict[str, int] = dict(tokenizer["model"]["vocab"])
    added = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    vocabulary |= added
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    template = checkpoint / "chat_template.jinja"
    ids = {name: settings.get(f"{name}_token") for name in ("bos", "eos", "pad")}
    entries: dict[str, Any] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": rule,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if token in added else 1 for token in tokens],
        "tokenizer.ggml.merges": [
            merge if isinstance(merge, str) else " ".join(merge) for merge in tokenizer["model"]["merges"]
        ],
        "tokenizer.ggml.add_bos_token": ids["bos"] is not None,
        "tokenizer.chat_template": template.read_text() if template.exists() else None,
    }
    for name, key in (("bos", "bos_token_id"), ("eos", "eos_token_id"), ("pad", "padding_token_id")):
        if ids[name] is not None:
            entries[f"tokenizer.ggml.{key}"] = vocabulary[ids[name]]
    return entries


def _tensors(checkpoint: Path, config: Mapping[str, Any]) -> dict[str, np.ndarray]:
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    tensors: dict[str, np.ndarray] = {}
    for name, values in load_file(checkpoint / "model.safetensors").items():
        module, _, end = name.rpartition(".")
        if module in _OUTER:
            new = _OUTER[module]
        else:
            _, _, layer, part = module.split(".", 3)
            new = f"blk.{layer}.{_NAMES[part]}"
            if config["model_type"] in ("llama", "mistral") and _NAMES[part] in heads:
                values = _interleaved(values, heads[_NAMES[part]])
        tensors[f"{new}.{end}"] = values.float().numpy()
    rope = config["rope_parameters"]
    if rope["rope_type"] == "llama3":
        tensors["rope_freqs.weight"] = _factors(config)
    return tensors


def _interleaved(values: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of a projection in llama.cpp's order, in which rotated pairs of dimensions are neighbours."""
    return values.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def _factors(config: Mapping[str, Any]) -> np.ndarray:
    """Factors by which transformers divides the rotary frequencies of Llama 3."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](LlamaConfig(**config), torch.device("cpu"))
    width = config["head_dim"]
    plain = config["rope_parameters"]["rope_theta"] ** (-torch.arange(0, width, 2).float() / width)
    return (plain / scaled).numpy()
