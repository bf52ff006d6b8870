"""Tiny configurations of many architectures, for comparisons of TransformerLens with transformers."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from transformers import AutoModelForCausalLM

__all__ = ["ARCHITECTURES", "WINDOW", "Architecture", "build_architecture"]

WINDOW = 24
"""Sliding window, shorter than the prompts of the tests."""

SIZES: dict[str, Any] = {
    "vocab_size": 500, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 1024, "initializer_range": 0.2, "tie_word_embeddings": False,
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
}  # fmt: skip
KINDS = ["sliding_attention", "full_attention", "sliding_attention"]
EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2}
LOCAL_EXPERTS: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}
GPT2_SIZES: dict[str, Any] = {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 1024}
LATENT: dict[str, Any] = {
    "kv_lora_rank": 32, "q_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "first_k_dense_replace": 1,
    "num_key_value_heads": 4,
}  # fmt: skip


def rope(kind: str, **parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **parameters}}


LONGROPE = rope(
    "longrope",
    short_factor=[1.0] * 8,
    long_factor=[1.5 + 0.6 * i for i in range(8)],
    original_max_position_embeddings=64,
)
LLAMA3 = rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)
WINDOWED: dict[str, Any] = {"sliding_window": WINDOW, "layer_types": KINDS}


@dataclass(frozen=True)
class Architecture:
    """A tiny checkpoint of one architecture.

    Attributes:
        name: Name in the table of the documentation.
        feature: Property of the architecture that a loader could get wrong.
        config: Name of the configuration's class in transformers.
        changes: Settings of the configuration that differ from ``SIZES``.
        without: Settings of ``SIZES`` that the architecture does not have.
        n_ctx: Context length with which the checkpoint is opened; by default its own.
    """

    name: str
    feature: str
    config: str
    changes: dict[str, Any] = field(default_factory=dict[str, Any])
    without: tuple[str, ...] = ()
    n_ctx: int | None = None


_GROUPS = ("num_key_value_heads",)
ARCHITECTURES = (
    Architecture("Llama", "grouped queries", "LlamaConfig"),
    Architecture(
        "Llama, biases", "biases of attention and MLP", "LlamaConfig", {"attention_bias": True, "mlp_bias": True}
    ),
    Architecture("Llama, llama3", "rotary scaling by frequency", "LlamaConfig", LLAMA3),
    Architecture("Llama, linear", "linear rotary scaling", "LlamaConfig", rope("linear", factor=4.0)),
    Architecture("Llama, yarn", "YaRN", "LlamaConfig", rope("yarn", factor=4.0, original_max_position_embeddings=64)),
    Architecture(
        "Llama, dynamic",
        "dynamic NTK",
        "LlamaConfig",
        {"max_position_embeddings": 64, **rope("dynamic", factor=4.0)},
        n_ctx=256,
    ),
    Architecture("Llama, longrope", "longrope", "LlamaConfig", LONGROPE),
    Architecture("Llama, left-over window", "a window that is not read", "LlamaConfig", {"sliding_window": WINDOW}),
    Architecture("Mistral", "sliding window", "MistralConfig", {"sliding_window": WINDOW}),
    Architecture("Ministral 3", "scaled queries", "Ministral3Config", {"head_dim": 16}),
    Architecture("Mixtral", "mixture of experts", "MixtralConfig", LOCAL_EXPERTS),
    Architecture("Qwen2", "biases of queries, keys and values", "Qwen2Config"),
    Architecture(
        "Qwen2, windows",
        "windows in some layers",
        "Qwen2Config",
        {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    ),
    Architecture(
        "Qwen2-MoE",
        "shared experts",
        "Qwen2MoeConfig",
        {**EXPERTS, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32},
    ),
    Architecture("Qwen3", "norms of queries and keys", "Qwen3Config", {"head_dim": 16}),
    Architecture(
        "Qwen3-MoE", "mixture of experts", "Qwen3MoeConfig", {**EXPERTS, "moe_intermediate_size": 32, "head_dim": 16}
    ),
    Architecture(
        "Qwen3-Next",
        "hybrid: linear attention",
        "Qwen3NextConfig",
        {
            **EXPERTS,
            "head_dim": 16,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 32,
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
            "layer_types": ["full_attention", "linear_attention", "full_attention"],
        },
    ),
    Architecture("Gemma", "scaled embeddings", "GemmaConfig", {"head_dim": 16}),
    Architecture(
        "Gemma 2",
        "soft caps, windows",
        "Gemma2Config",
        {
            "head_dim": 16,
            "sliding_window": WINDOW,
            "query_pre_attn_scalar": 16,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 10.0,
        },
    ),
    Architecture("Gemma 3", "two rotary bases, windows", "Gemma3TextConfig", {"head_dim": 16, **WINDOWED}),
    Architecture("Phi", "partial rotary embedding", "PhiConfig", {"partial_rotary_factor": 0.5}),
    Architecture("Phi-3", "fused projections", "Phi3Config"),
    Architecture(
        "Phi-3, longrope",
        "longrope, recomputed keys",
        "Phi3Config",
        {"original_max_position_embeddings": 64, **LONGROPE},
    ),
    Architecture("Cohere", "rotation of neighbouring dimensions", "CohereConfig", {"logit_scale": 1.0}),
    Architecture(
        "Cohere 2", "rotation of neighbouring dimensions, windows", "Cohere2Config", {"logit_scale": 1.0, **WINDOWED}
    ),
    Architecture("GPT-2", "learned positions", "GPT2Config", GPT2_SIZES, _GROUPS),
    Architecture(
        "GPT-Neo",
        "local attention, unscaled queries",
        "GPTNeoConfig",
        {
            "hidden_size": 64,
            "num_layers": 3,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1], [["global"], 1]],
            "window_size": WINDOW,
        },
        _GROUPS,
    ),
    Architecture("GPT-NeoX", "partial rotary embedding", "GPTNeoXConfig", {"rotary_pct": 0.25}, _GROUPS),
    Architecture(
        "GPT-J", "rotation of neighbouring dimensions", "GPTJConfig", {**GPT2_SIZES, "rotary_dim": 8}, _GROUPS
    ),
    Architecture(
        "CodeGen", "rotation of neighbouring dimensions", "CodeGenConfig", {**GPT2_SIZES, "rotary_dim": 8}, _GROUPS
    ),
    Architecture("GPTBigCode", "one key-value head", "GPTBigCodeConfig", GPT2_SIZES, _GROUPS),
    Architecture(
        "OPT", "learned positions with an offset", "OPTConfig", {"ffn_dim": 96, "word_embed_proj_dim": 64}, _GROUPS
    ),
    Architecture(
        "XGLM",
        "sinusoidal positions",
        "XGLMConfig",
        {"d_model": 64, "ffn_dim": 96, "num_layers": 3, "attention_heads": 4},
        _GROUPS,
    ),
    Architecture("BLOOM", "ALiBi", "BloomConfig", {"n_layer": 3, "n_head": 4}, _GROUPS),
    Architecture(
        "MPT",
        "ALiBi, fused projections",
        "MptConfig",
        {"d_model": 64, "n_heads": 4, "n_layers": 3, "max_seq_len": 1024},
        _GROUPS,
    ),
    Architecture(
        "Falcon",
        "one key-value head, parallel MLP",
        "FalconConfig",
        {"multi_query": True, "parallel_attn": True, "new_decoder_architecture": False, "alibi": False},
        _GROUPS,
    ),
    Architecture(
        "Falcon, new",
        "grouped queries",
        "FalconConfig",
        {"new_decoder_architecture": True, "num_kv_heads": 2, "alibi": False},
        _GROUPS,
    ),
    Architecture(
        "Falcon, ALiBi",
        "ALiBi",
        "FalconConfig",
        {"multi_query": False, "parallel_attn": False, "new_decoder_architecture": False, "alibi": True, "bias": True},
        _GROUPS,
    ),
    Architecture("StableLM", "partial rotary embedding", "StableLmConfig", {"partial_rotary_factor": 0.25}),
    Architecture("StarCoder 2", "sliding window", "Starcoder2Config", {"sliding_window": WINDOW}),
    Architecture("OLMo", "norms without weights", "OlmoConfig"),
    Architecture("OLMo 2", "norms over all heads", "Olmo2Config"),
    Architecture("OLMo 3", "windows in some layers", "Olmo3Config", WINDOWED),
    Architecture("OLMoE", "mixture of experts", "OlmoeConfig", EXPERTS),
    Architecture("gpt-oss", "attention sinks, windows", "GptOssConfig", {"head_dim": 16, **LOCAL_EXPERTS, **WINDOWED}),
    Architecture(
        "Granite",
        "multipliers",
        "GraniteConfig",
        {"embedding_multiplier": 2.0, "residual_multiplier": 0.5, "attention_multiplier": 0.2, "logits_scaling": 2.0},
    ),
    Architecture("GraniteMoE", "mixture of experts", "GraniteMoeConfig", LOCAL_EXPERTS),
    Architecture("SmolLM3", "layers without rotary embedding", "SmolLM3Config", {"no_rope_layers": [1, 0, 1]}),
    Architecture(
        "GLM",
        "partial rotary embedding, neighbouring dimensions",
        "GlmConfig",
        {"head_dim": 16, "partial_rotary_factor": 0.5},
    ),
    Architecture("GLM-4", "norms after attention", "Glm4Config", {"head_dim": 16, "partial_rotary_factor": 0.5}),
    Architecture(
        "GLM-4-MoE",
        "mixture of experts",
        "Glm4MoeConfig",
        {
            "head_dim": 16,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "first_k_dense_replace": 1,
            "n_group": 1,
            "topk_group": 1,
        },
    ),
    Architecture("Nemotron", "partial rotary embedding", "NemotronConfig", {"partial_rotary_factor": 0.5}),
    Architecture("EXAONE 4", "windows, layers without rotary embedding", "Exaone4Config", WINDOWED),
    Architecture("ERNIE 4.5", "rotation of neighbouring dimensions", "Ernie4_5Config", {"head_dim": 16}),
    Architecture("Seed-OSS", "grouped queries", "SeedOssConfig", {"head_dim": 16}),
    Architecture("Arcee", "squared activations", "ArceeConfig"),
    Architecture("Apertus", "xIELU activations", "ApertusConfig"),
    Architecture("DeepSeek V2", "latent attention", "DeepseekV2Config", {**LATENT, "n_group": 1, "topk_group": 1}),
    Architecture("DeepSeek V3", "latent attention", "DeepseekV3Config", {**LATENT, "n_group": 2, "topk_group": 1}),
    Architecture(
        "Llama 4",
        "chunked attention, layers without rotary embedding",
        "Llama4TextConfig",
        {
            "head_dim": 16,
            "intermediate_size_mlp": 96,
            "num_local_experts": 2,
            "attention_chunk_size": 64,
            "no_rope_layers": [1, 0, 1],
        },
    ),
    Architecture("HunYuan", "norms after the rotary embedding", "HunYuanDenseV1Config", {"head_dim": 16}),
    Architecture("BitNet", "norms inside attention and MLP", "BitNetConfig"),
    Architecture("ModernBERT decoder", "windows, fused projections", "ModernBertDecoderConfig"),
    Architecture("JetMoE", "mixture of attention heads", "JetMoeConfig", {"kv_channels": 16, **LOCAL_EXPERTS}),
    Architecture("Mamba", "no attention", "MambaConfig", {"state_size": 8}),
    Architecture(
        "LFM 2", "hybrid: convolutions", "Lfm2Config", {"layer_types": ["full_attention", "conv", "full_attention"]}
    ),
    Architecture("Helium", "unknown to TransformerLens", "HeliumConfig", {"head_dim": 16}),
    Architecture("Persimmon", "unknown to TransformerLens", "PersimmonConfig", {}, _GROUPS),
)
"""Architectures of the table in the documentation."""


def build_architecture(architecture: Architecture, directory: Path, tokenizer: Any) -> Path:
    """Write a tiny random checkpoint to a folder, and return the folder."""
    sizes = {name: size for name, size in SIZES.items() if name not in architecture.without}
    config = getattr(transformers, architecture.config)(**{**sizes, **architecture.changes})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model: Any = cast("Any", AutoModelForCausalLM).from_config(config).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    parameter.normal_(0, 0.3)
                elif name.endswith("sinks"):
                    parameter.normal_(3, 2)
                elif "norm" in name and name.endswith("weight"):
                    parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory
