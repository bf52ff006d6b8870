"""Prefixes, responses, and the repetition penalty on the logits of responses."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import RepetitionPenaltyLogitsProcessor

from focuslens.hooks import Intervention
from focuslens.prompts.batch import PromptBatch

__all__ = ["Generation", "Penalty", "Prefix", "Responses", "repetition_penalised"]

Penalty: TypeAlias = Callable[[Tensor, Sequence[Tensor]], Tensor]
"""Function of logits ``[batch d_vocab]`` and of the tokens of each step, ``[batch]``, that returns penalised logits."""


@dataclass(frozen=True, eq=False)
class Generation:
    """A generated response.

    Attributes:
        text: Text of the response, without special tokens and surrounding white space.
        tokens: Token ids of the response, without the stop token.
        finished: Whether a stop token ended the response, rather than the limit of new tokens or the context length.
        stop: The stop token that ended the response; ``None`` if the response did not end with a stop token.
    """

    text: str
    tokens: Int[Tensor, "response"]
    finished: bool
    stop: int | None = None

    def __repr__(self) -> str:
        return f"Generation({self.text!r}, {len(self.tokens)} tokens, finished={self.finished})"


@dataclass(frozen=True, eq=False)
class Prefix:
    """A batch of prompts with their keys and values. A prefix can be extended any number of times.

    Attributes:
        batch: The prompts.
        cache: Keys and values of all columns so far.
        mask: 1 where a column holds a token, 0 where it is padding.
        logits: Logits of the last column; ``None`` if the last token of each prompt was held back.
        under: Interventions under which the prompts' rows were run.
        residuals: Layer inputs ``[batch column d_model]``, for the layers in ``keep`` of :meth:`ModelRunner.prefill`.
    """

    batch: PromptBatch
    cache: Any
    mask: Int[Tensor, "batch column"]
    logits: Float[Tensor, "batch d_vocab"] | None
    under: tuple[Any, ...] = ()
    residuals: Mapping[int, Tensor] = field(default_factory=dict[int, Tensor])

    @property
    def is_shared(self) -> bool:
        """Whether copies of the prompts share keys and values; otherwise each copy needs its own memory."""
        return hasattr(self.cache, "shared")

    def require_run_under(self, interventions: Sequence[Intervention]) -> None:
        """Check that the prefix was run under every intervention that acts on its rows.

        Raises:
            ValueError: If the prefix was run without such an intervention.
        """
        # If there are logits, the row of the first response token has already been run. Every intervention acts on it.
        acting = [item for item in interventions if item.changes_prompt or self.logits is not None]
        if all(any(item is applied for applied in self.under) for item in acting):
            return
        if self.logits is None:
            raise ValueError(
                "an intervention changes the prompt's own rows, and this prefix was run without it; prefill under the "
                "interventions that change the prompt"
            )
        raise ValueError(
            "the prefix was run, its last token included, without an intervention that acts on it; prefill with "
            "hold_last=True, and under the interventions that change the prompt"
        )


@dataclass
class Responses:
    """Tokens of a batch's responses during greedy decoding, which adds one token per response and step.

    Attributes:
        limits: Maximum length of each response, in tokens.
        stops: Tokens that end a response.
        newest: The newest token of each row; at first the last token of each prompt.
        steps: Tokens of each step, ``[batch]`` per step. Tokens after the end of a response are arbitrary.
        pending: Whether each response needs another token.
        running: Whether the newest token of each row belongs to its response; other rows are run as padding.
    """

    limits: Int[Tensor, "batch"]
    stops: Int[Tensor, "stop"]
    newest: Int[Tensor, "batch"]
    steps: list[Int[Tensor, "batch"]] = field(default_factory=list[Tensor])
    pending: Bool[Tensor, "batch"] = field(init=False)
    running: Bool[Tensor, "batch"] = field(init=False)

    def __post_init__(self) -> None:
        self.pending = self.running = self.limits > 0

    def append(self, tokens: Int[Tensor, "batch"]) -> None:
        """Append the next token of every row."""
        self.newest = tokens
        if self.pending.any():
            self.steps.append(tokens)
        self.running = self.pending & ~torch.isin(tokens, self.stops)
        self.pending = self.running & (len(self.steps) < self.limits)

    def rows(self) -> list[list[int]]:
        """Token ids of each row up to its limit. The response itself ends before the row's first stop token."""
        if not self.steps:
            return [[] for _ in self.limits]
        rows = torch.stack(self.steps, dim=1).tolist()
        return [row[:limit] for row, limit in zip(rows, self.limits.tolist(), strict=True)]


def repetition_penalised(batch: PromptBatch, penalty: float) -> Penalty:
    """Function that makes the tokens of a prompt and its response less likely (Keskar et al., 2019).

    Raises:
        ValueError: If the penalty is not above 0.
    """
    if penalty <= 0:
        raise ValueError(f"repetition_penalty is {penalty}; it must be above 0, and 1 means no penalty")
    if penalty == 1:
        return lambda logits, steps: logits
    processor = RepetitionPenaltyLogitsProcessor(float(penalty))
    # Each row is padded with a token of its own prompt, because tokens of the padding are penalised too.
    padded = zip(batch.prompts, batch.padding, strict=True)
    prompts = torch.stack([torch.cat((prompt.tokens[:1].expand(n), prompt.tokens)) for prompt, n in padded])

    def penalised(
        logits: Float[Tensor, "batch d_vocab"], steps: Sequence[Int[Tensor, "batch"]]
    ) -> Float[Tensor, "batch d_vocab"]:
        ids = torch.cat((prompts, *(tokens[:, None] for tokens in steps)), dim=1)
        return processor(cast("Any", ids.to(logits.device)), cast("Any", logits.float()))

    return penalised
