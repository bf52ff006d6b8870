"""Contestants of ``bench.py`` on random models of other families: Gemma 3 (windows) and gpt-oss (windows and sinks).

Hugging Face generates with its fastest attention. For sinks it is eager, because the fused kernel knows none. Its own
way to see attention is eager generation with ``output_attentions``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from bench_model import SEED, Bench, Contestant, in_memory, plain_generation
from torch import Tensor
from transformers import AutoModelForCausalLM, Gemma3TextConfig, GptOssConfig

import focuslens as fl
from focuslens.data.synthetic import build_tokenizer

__all__ = ["FAMILIES", "FAMILY_TITLES", "FamilyBench", "family_bench"]

_LAYERS, _WINDOW = 8, 512


def _config(family: str) -> Any:
    """Configuration with eight layers of d_model 256. Every other layer has a window of 512 tokens."""
    sizes: dict[str, Any] = {
        "vocab_size": len(build_tokenizer()),
        "hidden_size": 256,
        "num_hidden_layers": _LAYERS,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 32,
        "max_position_embeddings": 65536,
        "sliding_window": _WINDOW,
        "layer_types": ["sliding_attention", "full_attention"] * (_LAYERS // 2),
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "initializer_range": 0.1,
    }
    if family == "gemma3":
        return Gemma3TextConfig(**sizes, intermediate_size=704, query_pre_attn_scalar=32)
    return GptOssConfig(**sizes, intermediate_size=256, num_local_experts=4, num_experts_per_tok=2)


@dataclass(frozen=True)
class FamilyBench(Bench):
    """A random model of a family, and the sample of the other tasks.

    Args:
        family: ``gemma3`` or ``gpt_oss``.
    """

    family: str = "gemma3"

    def make_checkpoint(self) -> None:
        """Write the random model. Every call writes the same weights."""
        torch.manual_seed(SEED)
        model: Any = cast("Any", AutoModelForCausalLM).from_config(_config(self.family))
        model.save_pretrained(self.directory)
        build_tokenizer().save_pretrained(self.directory)

    def hugging_face(self, attention: str) -> Any:
        """Load the Hugging Face model with an attention implementation; ``sdpa`` is the fastest that it has."""
        fastest = "eager" if self.family == "gpt_oss" else "sdpa"
        model: Any = cast("Any", AutoModelForCausalLM).from_pretrained(
            self.directory,
            attn_implementation=fastest if attention == "sdpa" else attention,
            dtype=getattr(torch, self.dtype),
        )
        return in_memory(model.eval().to(self.device))


def family_bench(family: str, directory: Path, length: int, device: str, dtype: str) -> FamilyBench:
    """Model, prompt and number of tokens of one task, with a checkpoint in a new folder."""
    bench = FamilyBench(directory / family, length, device, dtype, family=family)
    bench.make_checkpoint()
    return bench


def _scoring(bench: Bench) -> Callable[[], Any]:
    model = bench.focus("bridge")
    if model.slow_attention is not None:
        raise RuntimeError(f"{model!r} does not run on the attention engine")
    return lambda: fl.contextual_scores(model, [bench.sample], max_new_tokens=bench.new_tokens)


def _with_attentions(bench: Bench) -> Callable[[], Tensor]:
    """Mean attention from the response to the relevant document, ``[layer head]``, out of all patterns."""
    model, prompt = bench.hugging_face("eager"), bench.encoded()
    ((start, end),), tokens = prompt.spans["relevant"], prompt.tokens[None].to(bench.device)

    def run() -> Tensor:
        with torch.no_grad():
            made = model.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                max_new_tokens=bench.new_tokens + 1,  # the row of the last token needs one more pass
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
                output_attentions=True,
                return_dict_in_generate=True,
            )
        masses: list[Tensor] = []
        for step in made.attentions[1:]:
            columns = len(prompt.tokens) + len(masses) + 1
            of_step = [_within(pattern[0, :, -1], columns, start, end) for pattern in step]
            masses.append(torch.stack(of_step))
        return torch.stack(masses).mean(dim=0)

    return run


def _within(row: Tensor, columns: int, start: int, end: int) -> Tensor:
    """Attention ``[head]`` to a span. A row of a layer with a window has the last keys alone."""
    first = columns - row.shape[-1]
    return row[:, max(0, start - first) : max(0, end - first)].sum(dim=-1)


FLOOR = "Hugging Face, fused"
FAMILIES: dict[str, dict[str, Contestant]] = {
    family: {
        floor: Contestant(plain_generation, part="a plain generation"),
        "FocusLens, TransformerBridge": Contestant(_scoring),
        "Hugging Face, output_attentions": Contestant(_with_attentions),
    }
    for family, floor in (("gemma3", FLOOR), ("gpt_oss", "Hugging Face, eager"))
}
"""Contestants by family, and by name."""
FAMILY_TITLES = {
    "gemma3": "Generate 16 tokens with a random Gemma 3 and score all heads",
    "gpt_oss": "Generate 16 tokens with a random gpt-oss and score all heads",
}
"""Tasks of this file, and the headings of their tables."""
