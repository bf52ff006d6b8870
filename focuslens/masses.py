"""Attention from a response's rows to parts of its prompt, reduced as the rows are made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from einops import einsum, reduce
from jaxtyping import Float
from torch import Tensor

from focuslens.batch import PromptBatch
from focuslens.hooks import Hook, hook_name

if TYPE_CHECKING:
    from focuslens.backends import ModelShape

__all__ = ["KINDS", "SINK", "ResponseMasses", "attention_to_parts"]

SINK = 2
"""Tokens counted as the attention sink: the first two, as the paper's authors do."""

KINDS = ("relevant", "irrelevant", "irrelevant_max", "sink")
"""What attention is summed over: the relevant document, all others, the one other that gets most, and the sink."""


def attention_to_parts(
    pattern: Float[Tensor, "batch head row key"], parts: Float[Tensor, "batch key part"]
) -> Float[Tensor, "batch head row part"]:
    """Attention summed over parts of the keys; ``parts`` is 1 where a key belongs to a part, else 0."""
    return einsum(pattern, parts, "batch head row key, batch key part -> batch head row part")


def _membership(batch: PromptBatch) -> Float[Tensor, "batch key part"]:
    """Membership of the prompts' columns in: the sink, the relevant document, and each irrelevant document."""
    most = max(len(prompt.spans.get("irrelevant", ())) for prompt in batch.prompts)
    parts = torch.zeros(len(batch), batch.width, 2 + most)
    for row, prompt, padding in zip(parts, batch.prompts, batch.padding, strict=True):
        row[padding : padding + SINK, 0] = 1
        for start, end in prompt.spans.get("relevant", ()):
            row[padding + start : padding + end, 1] = 1
        for part, (start, end) in enumerate(prompt.spans.get("irrelevant", ()), start=2):
            row[padding + start : padding + end, part] = 1
    return parts


class ResponseMasses:
    """Gathers, through hooks on ``hook_pattern``, what every head's response rows give to the parts of the prompt.

    Args:
        shape: Sizes of the model.
        batch: The prompts.
    """

    def __init__(self, shape: ModelShape, batch: PromptBatch) -> None:
        self._parts = _membership(batch)
        self._rows: list[list[Tensor]] = [[] for _ in range(shape.n_layers)]
        self._empty = torch.full((len(batch), shape.n_layers, shape.n_heads), torch.nan)

    def hooks(self) -> list[Hook]:
        """Observers for the passes that run the responses' tokens, in order, and nothing before them."""
        return [(hook_name(layer, "hook_pattern"), self._observer(rows)) for layer, rows in enumerate(self._rows)]

    def _observer(self, rows: list[Tensor]) -> Any:
        def observe(pattern: Float[Tensor, "batch head row key"], hook: Any) -> None:
            n_rows, n_keys = pattern.shape[-2:]
            # A prompt's last token, where it was held back, is none of the response.
            if n_keys - n_rows < self._parts.shape[1]:
                return
            self._parts = self._parts.to(pattern.device)
            on_prompt = pattern[..., : self._parts.shape[1]].float()
            rows.append(attention_to_parts(on_prompt, self._parts))

        return observe

    def scores(self, lengths: Sequence[int]) -> dict[str, Float[Tensor, "batch layer head"]]:
        """Scores of each kind, averaged over the first ``lengths`` rows of each response; NaN for an empty one."""
        if not self._rows[0]:
            return {kind: self._empty.clone() for kind in KINDS}
        by_layer = torch.stack([torch.cat(rows, dim=2) for rows in self._rows], dim=1).cpu()
        n = torch.tensor(lengths)
        # Rows behind a short response may have been run too, and weigh nothing.
        weight = (torch.arange(by_layer.shape[3]) < n[:, None]) / n[:, None].clamp(min=1)
        by_part = einsum(by_layer, weight, "batch layer head row part, batch row -> batch layer head part")
        others = by_part[..., 2:]
        irrelevant = reduce(others, "batch layer head part -> batch layer head", "sum")
        largest = reduce(others, "batch layer head part -> batch layer head", "max") if others.shape[-1] else irrelevant
        scores = {"relevant": by_part[..., 1], "irrelevant": irrelevant, "irrelevant_max": largest}
        scores["sink"] = by_part[..., 0]
        return {kind: torch.where((n > 0)[:, None, None], scores[kind], torch.nan) for kind in KINDS}
