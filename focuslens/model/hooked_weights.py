"""Configuration and weights of Hugging Face checkpoints, converted for a ``HookedTransformer``.

The conversion covers the families in :data:`FAMILIES`. It changes the names and the layout of the weights. Their values
stay the same.
"""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from focuslens.model.plain import UnfitError

__all__ = ["FAMILIES", "hooked_config", "hooked_state_dict"]

FAMILIES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
"""Architectures that can be opened as a ``HookedTransformer``."""


def _rope(config: Any) -> dict[str, Any]:
    """Rotary-embedding settings of a Hugging Face configuration, under TransformerLens's names."""
    parameters: dict[str, Any] = dict(getattr(config, "rope_parameters", None) or {})
    kind = parameters.get("rope_type", "default")
    base = {"rotary_base": parameters.get("rope_theta", 10000.0)}
    if kind == "default":
        return base
    if kind == "linear":
        return base | {"rotary_scaling_factor": parameters["factor"]}
    if kind == "llama3":
        return base | {
            "use_NTK_by_parts_rope": True,
            "NTK_by_parts_factor": parameters["factor"],
            "NTK_by_parts_low_freq_factor": parameters["low_freq_factor"],
            "NTK_by_parts_high_freq_factor": parameters["high_freq_factor"],
            "NTK_original_ctx_len": parameters["original_max_position_embeddings"],
        }
    raise ValueError(
        f"rotary scaling {kind!r} is not supported by HookedTransformer loading (default, linear and llama3 are); "
        "open the checkpoint with backend='bridge'"
    )


def _windows(config: Any) -> dict[str, Any]:
    """Sliding-window settings, from the keys that the architecture's own attention reads in Hugging Face."""
    architecture = config.architectures[0]
    if architecture == "LlamaForCausalLM":
        return {}  # has no window, even if its configuration has the key
    kinds = ["sliding_attention"] * config.num_hidden_layers
    if architecture != "MistralForCausalLM":
        kinds = config.layer_types
    window = config.sliding_window
    if window is None or "sliding_attention" not in kinds:
        return {}
    names = {"sliding_attention": "local", "full_attention": "global"}
    return {"use_local_attn": True, "window_size": window, "attn_types": [names[kind] for kind in kinds]}


def hooked_config(config: Any, *, dtype: torch.dtype, device: str, n_ctx: int | None = None) -> Any:
    """``HookedTransformerConfig`` that corresponds to a Hugging Face configuration.

    Raises:
        ValueError: If the architecture or its rotary scaling is not supported.
    """
    from transformer_lens import HookedTransformerConfig

    architecture = (config.architectures or ["unknown"])[0]
    if architecture not in FAMILIES:
        raise ValueError(
            f"{architecture} cannot be opened as a HookedTransformer here (supported: {', '.join(FAMILIES)}); "
            "open it with backend='bridge'"
        )
    d_head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads, key_value_heads = config.num_attention_heads, config.num_key_value_heads
    return HookedTransformerConfig(
        n_layers=config.num_hidden_layers,
        d_model=config.hidden_size,
        n_ctx=n_ctx or config.max_position_embeddings,
        d_head=d_head,
        n_heads=heads,
        n_key_value_heads=key_value_heads if key_value_heads != heads else None,
        d_mlp=config.intermediate_size,
        d_vocab=config.vocab_size,
        act_fn=config.hidden_act,
        eps=config.rms_norm_eps,
        normalization_type="RMS",
        final_rms=True,
        gated_mlp=True,
        positional_embedding_type="rotary",
        rotary_dim=d_head,
        rotary_adjacent_pairs=False,
        use_qk_norm=architecture == "Qwen3ForCausalLM",
        original_architecture=architecture,
        model_name=Path(str(config.name_or_path)).name or architecture,
        init_weights=False,
        dtype=dtype,
        device=device,
        **_rope(config),
        **_windows(config),
    )


_NAMES = (
    (r"^model\.embed_tokens\.weight$", "embed.W_E"),
    (r"^model\.norm\.weight$", "ln_final.w"),
    (r"^lm_head\.weight$", "unembed.W_U"),
    (r"^model\.layers\.(\d+)\.input_layernorm\.weight$", r"blocks.\1.ln1.w"),
    (r"^model\.layers\.(\d+)\.post_attention_layernorm\.weight$", r"blocks.\1.ln2.w"),
    (r"^model\.layers\.(\d+)\.self_attn\.([qk])_norm\.weight$", r"blocks.\1.attn.\2_norm.w"),
    (r"^model\.layers\.(\d+)\.self_attn\.([qkvo])_proj\.(weight|bias)$", r"blocks.\1.attn.\2 \3"),
    (r"^model\.layers\.(\d+)\.mlp\.(gate|up|down)_proj\.(weight|bias)$", r"blocks.\1.mlp.\2 \3"),
)
"""Patterns of Hugging Face's parameter names, and the replacements that :func:`_target` inserts."""

_MLP = {"gate": "gate", "up": "in", "down": "out"}
"""Map from Hugging Face's names of the MLP projections to TransformerLens's names."""


def _hooked_entry(name: str, weight: Tensor, heads: dict[str, int], grouped: bool) -> tuple[str, Tensor]:
    """Convert a Hugging Face parameter to the name and layout of TransformerLens.

    ``heads`` maps the projections ``q``, ``k``, ``v`` and ``o`` to their numbers of heads. ``grouped`` is true if query
    heads share key-value heads.
    """
    target = _target(name)
    if " " not in target:
        return target, weight.T if target == "unembed.W_U" else weight
    module, kind = target.split(" ")
    prefix, part = module.rsplit(".", 1)
    letter = "W" if kind == "weight" else "b"
    if part in _MLP:
        if kind == "bias" and part == "gate":
            raise UnfitError(
                f"{name!r}: a bias on the MLP's gate has no place in a HookedTransformer; use backend='bridge'"
            )
        return f"{prefix}.{letter}_{_MLP[part]}", weight.T if kind == "weight" else weight
    underscore = "_" if grouped and part in "kv" else ""
    target = f"{prefix}.{underscore}{letter}_{part.upper()}"
    if part == "o":
        return target, rearrange(weight, "m (n h) -> n h m", n=heads["o"]) if kind == "weight" else weight
    if kind == "bias":
        return target, rearrange(weight, "(n h) -> n h", n=heads[part])
    return target, rearrange(weight, "(n h) m -> n m h", n=heads[part])


def _target(name: str) -> str:
    """TransformerLens name of a Hugging Face parameter; for a projection, ``"MODULE weight"`` or ``"MODULE bias"``.

    Raises:
        ValueError: If a HookedTransformer has no such parameter.
    """
    for pattern, replacement in _NAMES:
        if re.match(pattern, name):
            return re.sub(pattern, replacement, name)
    raise UnfitError(
        f"parameter {name!r} has no place in a HookedTransformer; open the checkpoint with backend='bridge'"
    )


def hooked_state_dict(state: dict[str, Tensor], cfg: Any) -> dict[str, Tensor]:
    """Convert the state dict of a supported family to TransformerLens's names and layout. Missing biases become zero.

    Raises:
        ValueError: If a HookedTransformer does not have one of the parameters.
    """
    from transformer_lens import HookedTransformer

    key_value_heads = cfg.n_key_value_heads or cfg.n_heads
    heads = {"q": cfg.n_heads, "o": cfg.n_heads, "k": key_value_heads, "v": key_value_heads}
    weights = dict(
        _hooked_entry(name, weight, heads, cfg.n_key_value_heads is not None)
        for name, weight in state.items()
        if not name.endswith("rotary_emb.inv_freq")
    )
    if "unembed.W_U" not in weights:
        weights["unembed.W_U"] = weights["embed.W_E"].T
    meta_cfg = copy.deepcopy(cfg)
    meta_cfg.device = "meta"
    with torch.device("meta"):
        parameters = HookedTransformer(meta_cfg, move_to_device=False).state_dict()
    biases = {name: bias for name, bias in parameters.items() if re.search(r"\.b_|\._b_|\.b_U$", name)}
    zeros = {name: torch.zeros(bias.shape, dtype=cfg.dtype) for name, bias in biases.items() if name not in weights}
    return weights | zeros
