"""Plain Hugging Face models: their weights must be exactly those of the checkpoint, and their logits are the reference.

A TransformerLens model is made from a plain model. What the plain model computes is measured first, because a bridge
changes the model that it wraps.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import GenerationConfig

from focuslens.util.memory import is_out_of_memory

__all__ = [
    "LENGTHS",
    "MEASURED_TOKENS",
    "OWN_CODE_LENGTHS",
    "PlainLoader",
    "Reference",
    "UnfitError",
    "require_all_weights",
]

LENGTHS = (9, 14)
"""Lengths of the reference prompts, in tokens."""

OWN_CODE_LENGTHS = (*LENGTHS, 600)
"""Lengths of the reference prompts for a checkpoint with code of its own."""

_STEPS = 3
"""Number of tokens that follow each reference prompt."""


MEASURED_TOKENS = max(LENGTHS) + _STEPS
"""Context length, in tokens, that a whole reference needs."""


_BUFFER = re.compile(r"(^|\.)(masked_bias|causal_mask|attn\.bias|attention\.bias|inv_freq|position_ids)$")
"""Buffers that old checkpoints contain and that models compute themselves: masks, frequencies and positions."""


class UnfitError(ValueError):
    """Error for a checkpoint that a kind of TransformerLens model cannot hold, or that it computes in another way."""


@dataclass(frozen=True, eq=False)
class Reference:
    """Logits of a plain Hugging Face model on a few short sequences.

    Attributes:
        sequences: Tokens of each sequence: a prompt and its greedy continuation.
        prompt_logits: Logits of every row of each prompt, from a pass without a cache.
        step_logits: Logits of the last row of each prompt and of the rows after it, from Hugging Face's ``generate``
            with a cache. The last token of a sequence has no row.
    """

    sequences: tuple[Int[Tensor, "_"], ...]
    prompt_logits: tuple[Float[Tensor, "_ d_vocab"], ...]
    step_logits: tuple[Float[Tensor, "_ d_vocab"], ...]

    @classmethod
    def of(cls, model: Any, n_ctx: int | None = None, lengths: Sequence[int] = LENGTHS) -> Reference:
        """Run a plain model on prompts of fixed pseudo-random tokens, which fit a context of ``n_ctx`` tokens.

        The shorter prompt is run first, because dynamic NTK remembers the longest sequence.
        """
        n_steps = _STEPS if n_ctx is None else max(1, min(_STEPS, n_ctx - 1))
        lengths = [length if n_ctx is None else max(1, min(length, n_ctx - n_steps)) for length in lengths]
        # A generation config of the checkpoint would be merged with ours, and can need a tokenizer (stop strings).
        declared, model.generation_config = model.generation_config, GenerationConfig()
        try:
            return cls._measured(model, lengths, n_steps)
        finally:
            model.generation_config = declared

    @classmethod
    def _measured(cls, model: Any, lengths: Sequence[int], n_steps: int) -> Reference:
        sequences: list[Tensor] = []
        prompts: list[Tensor] = []
        steps: list[Tensor] = []
        # Token 0 is often a padding token, which some architectures treat differently, so it is left out.
        d_vocab = model.get_input_embeddings().weight.shape[0]
        for length in lengths:
            ids = (1 + (torch.arange(length) * 7919 + length) % (d_vocab - 1))[None].to(model.device)
            prompts.append(_rows(model(ids, use_cache=False).logits[0]))
            generated = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=_greedy(n_steps))
            sequences.append(generated.sequences[0].cpu())
            steps.append(_rows(torch.cat(generated.logits)))
        return cls(tuple(sequences), tuple(prompts), tuple(steps))


def _rows(logits: Tensor) -> Tensor:
    return logits.detach().float().cpu()


def _greedy(n_steps: int) -> GenerationConfig:
    """Greedy generation of a fixed number of tokens. The logits are those before any processing."""
    settings: dict[str, Any] = {"do_sample": False, "num_beams": 1, "pad_token_id": 0}
    settings |= {"max_new_tokens": n_steps, "min_new_tokens": n_steps}
    settings |= {"output_logits": True, "return_dict_in_generate": True}
    return GenerationConfig(**settings)


class PlainLoader:
    """A Hugging Face model class whose ``from_pretrained`` checks the weights and measures a :class:`Reference`.

    Args:
        model_class: The model class, such as ``AutoModelForCausalLM``.
        device: Device to which a model without a device map is moved before it is measured.
        measure: Whether to measure a reference.
        n_ctx: Context length within which the reference is measured.
        lengths: Lengths of the reference prompts, in tokens.
    """

    __name__ = "PlainLoader"

    def __init__(
        self,
        model_class: Any,
        device: str | None,
        *,
        measure: bool,
        n_ctx: int | None = None,
        lengths: Sequence[int] = LENGTHS,
    ) -> None:
        self._class = model_class
        self._device = device
        self._measure = measure
        self._n_ctx = n_ctx
        self._lengths = lengths
        self.reference: Reference | None = None
        self.config: Any = None

    @torch.no_grad()
    def from_pretrained(self, name: str, **settings: Any) -> Any:
        """The model, as ``model_class.from_pretrained`` loads it.

        Raises:
            ValueError: If the checkpoint lacks a weight, has a weight that the architecture does not have, has a weight
                of another shape, or cannot be run.
        """
        model, info = self._class.from_pretrained(name, output_loading_info=True, **settings)
        require_all_weights(name, info)
        if "device_map" not in settings and self._device is not None:
            model = model.to(self._device)
        if self._measure:
            declared = getattr(model.config, "max_position_embeddings", None) if self._n_ctx is None else self._n_ctx
            n_ctx = declared if self._n_ctx is not None or max(self._lengths) > max(LENGTHS) else None
            self.reference = _measured(model.eval(), name, n_ctx, self._lengths)
        self.config = model.config
        return model


def _measured(model: Any, name: str, n_ctx: int | None, lengths: Sequence[int]) -> Reference:
    try:
        return Reference.of(model, n_ctx, lengths)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        reason = (str(error).splitlines() or [""])[0]
        raise ValueError(f"transformers cannot run {name!r} ({type(error).__name__}: {reason})") from error


def require_all_weights(name: str, info: dict[str, Any]) -> None:
    """Check Hugging Face's loading report: every weight of the model must come from the checkpoint, and all of them.

    Raises:
        ValueError: If the report names missing, unexpected or mismatched weights, or errors.
    """
    kinds = (
        ("missing_keys", "lacks the weight", "weights that a checkpoint lacks would be drawn at random"),
        ("unexpected_keys", "has the weight", "its architecture has no such weight, so the weight would be ignored"),
        ("mismatched_keys", "has another shape than config.json says for", "correct config.json, or download it again"),
    )
    for kind, problem, consequence in kinds:
        keys = sorted(str(key[0] if isinstance(key, tuple) else key) for key in info.get(kind) or ())
        if kind == "unexpected_keys":
            keys = [key for key in keys if not _BUFFER.search(key)]
        if keys:
            more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            raise ValueError(f"the checkpoint {name!r} {problem} {keys[0]!r}{more}; {consequence}")
    if errors := cast("Sequence[Any]", info.get("error_msgs") or ()):
        raise ValueError(f"the weights of the checkpoint {name!r} cannot be loaded: {errors[0]}")
