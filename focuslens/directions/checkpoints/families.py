"""Model families that ``fold`` and ``export`` can write: classes, tensor names, and the setting that adds biases."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["FAMILIES", "Family", "can_fold", "exported", "foldable"]


@dataclass(frozen=True)
class Family:
    """A model family of transformers.

    Attributes:
        prefix: Prefix of the name of its causal language model, such as ``Llama`` of ``LlamaForCausalLM``.
        config: Prefix of the name of its configuration, if it is another one.
        has_biases: Whether queries and keys can have biases in the format of the family's checkpoints.
        switch: Entry of the configuration that adds these biases. Families without this entry always have them.
        output_bias: Whether the same entry also adds a bias to the output projection.
        other_biases: Modules of a layer outside its attention to which the same entry also adds a bias.
        fused: Whether queries, keys and values have one projection, ``qkv_proj``.
        converted: Whether transformers converts the weights of experts when it loads them, by model type. It would not
            convert those of an exported checkpoint, which has another type.
    """

    prefix: str
    config: str = ""
    has_biases: bool = True
    switch: str | None = "attention_bias"
    output_bias: bool = True
    other_biases: tuple[str, ...] = ()
    fused: bool = False
    converted: bool = False

    @property
    def model_class(self) -> str:
        """Name of the causal language model in transformers."""
        return f"{self.prefix}ForCausalLM"

    @property
    def config_class(self) -> str:
        """Name of the configuration in transformers."""
        return f"{self.config or self.prefix}Config"

    @property
    def projections(self) -> tuple[str, ...]:
        """Names of the projections of an attention layer."""
        return ("qkv_proj", "o_proj") if self.fused else ("q_proj", "k_proj", "v_proj", "o_proj")

    @property
    def biased(self) -> tuple[str, ...]:
        """Modules of a layer that have biases in a folded checkpoint, such as ``self_attn.q_proj``."""
        attention = self.projections if self.output_bias else self.projections[:-1]
        return (*(f"self_attn.{name}" for name in attention), *self.other_biases)


FAMILIES: Mapping[str, Family] = {
    "llama": Family("Llama"),
    "mistral": Family("Mistral", has_biases=False, switch=None),
    "qwen2": Family("Qwen2", switch=None, output_bias=False),
    "qwen3": Family("Qwen3"),
    "qwen3_moe": Family("Qwen3Moe", converted=True),
    "gemma": Family("Gemma"),
    "gemma2": Family("Gemma2"),
    "gemma3_text": Family("Gemma3", config="Gemma3Text"),
    "olmo": Family("Olmo"),
    "olmo2": Family("Olmo2"),
    "olmo3": Family("Olmo3"),
    "olmoe": Family("Olmoe", converted=True),
    "granite": Family("Granite"),
    "granitemoe": Family("GraniteMoe", converted=True),
    "smollm3": Family("SmolLM3"),
    "glm": Family("Glm", output_bias=False),
    "glm4": Family("Glm4", output_bias=False),
    "seed_oss": Family("SeedOss", output_bias=False),
    "arcee": Family("Arcee"),
    "apertus": Family("Apertus"),
    "ministral3": Family("Ministral3", has_biases=False, switch=None),
    "exaone4": Family("Exaone4", has_biases=False, switch=None),
    "gpt_oss": Family("GptOss"),
    "llama4_text": Family("Llama4", config="Llama4Text"),
    "nemotron": Family("Nemotron"),
    "starcoder2": Family("Starcoder2", switch="use_bias", other_biases=("mlp.c_fc", "mlp.c_proj")),
    "ernie4_5": Family("Ernie4_5", switch="use_bias", other_biases=("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")),
    "stablelm": Family("StableLm", switch="use_qkv_bias", output_bias=False),
    "qwen2_moe": Family("Qwen2Moe", switch="qkv_bias", output_bias=False, converted=True),
    "glm4_moe": Family("Glm4Moe", output_bias=False, converted=True),
    "phi3": Family("Phi3", has_biases=False, switch=None, fused=True),
}
"""Families by ``model_type``."""


def foldable() -> dict[str, Family]:
    """Families that ``fold`` can write. A Mistral without a sliding window becomes a Llama, which has biases."""
    return {name: family for name, family in FAMILIES.items() if family.has_biases or name == "mistral"}


def can_fold(config: Any) -> bool:
    """Whether ``fold`` can write a checkpoint with this configuration. ``config`` has the defaults of its class."""
    if config.model_type == "mistral":
        return config.sliding_window is None
    return config.model_type in foldable()


def exported() -> dict[str, Family]:
    """Families that ``export`` can write."""
    return {name: family for name, family in FAMILIES.items() if not family.converted}
