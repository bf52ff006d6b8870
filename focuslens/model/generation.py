"""A batch that has been run, the responses that follow it, and the repetition penalty on their logits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import RepetitionPenaltyLogitsProcessor

from focuslens.hooks import Intervention
from focuslens.prompts.batch import PromptBatch

__all__ = ["Generation", "Prefix", "repetition_penalised"]

_Penalised: TypeAlias = Callable[[Tensor, Sequence[Tensor]], Tensor]
"""Logits ``[batch d_vocab]``, given logits and the tokens chosen so far, ``[batch]`` each."""


@dataclass(frozen=True, eq=False)
class Generation:
    """A response.

    Attributes:
        text: The response, special tokens and surrounding white space removed.
        tokens: Its token ids, without the stop token.
        finished: Whether a stop token ended it; ``False`` where the limit of new tokens or the context length did.
        stop: The stop token; ``None`` where there was none.
    """

    text: str
    tokens: Int[Tensor, "response"]
    finished: bool
    stop: int | None = None

    def __repr__(self) -> str:
        return f"Generation({self.text!r}, {len(self.tokens)} tokens, finished={self.finished})"


@dataclass(frozen=True, eq=False)
class Prefix:
    """A batch that has been run, ready to be extended any number of times.

    Attributes:
        batch: The prompts.
        cache: Keys and values of all columns so far.
        mask: 1 where a column holds a token, 0 where it is padding.
        logits: Of the last column; ``None`` where the prompts' last token has been held back.
        under: The interventions that the prompts' rows were run under.
        residuals: The input of some layers, ``[batch column d_model]`` each.
    """

    batch: PromptBatch
    cache: Any
    mask: Int[Tensor, "batch column"]
    logits: Float[Tensor, "batch d_vocab"] | None
    under: tuple[Any, ...] = ()
    residuals: Mapping[int, Tensor] = field(default_factory=dict[int, Tensor])

    @property
    def is_shared(self) -> bool:
        """Whether copies of the prompts read the same keys and values; else each copy takes memory of its own."""
        return hasattr(self.cache, "shared")

    def require_run_under(self, interventions: Sequence[Intervention]) -> None:
        """Refuse a prefix whose rows lack an intervention that acts on them.

        Raises:
            ValueError: If there is one.
        """
        # A token held back is still to be run; one that has been run made the first response token.
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


def repetition_penalised(batch: PromptBatch, penalty: float) -> _Penalised:
    """Function of logits and chosen tokens that makes tokens of prompt and response less likely (Keskar et al., 2019).

    Raises:
        ValueError: If the penalty is not above 0.
    """
    if penalty <= 0:
        raise ValueError(f"repetition_penalty is {penalty}; it must be above 0, and 1 is none")
    if penalty == 1:
        return lambda logits, chosen: logits
    processor = RepetitionPenaltyLogitsProcessor(float(penalty))
    # Rows are filled up with a token that they hold already, so that padding is not penalised.
    lengths = zip(batch.prompts, batch.padding, strict=True)
    held = torch.stack([torch.cat((prompt.tokens[:1].expand(n), prompt.tokens)) for prompt, n in lengths])

    def penalised(
        logits: Float[Tensor, "batch d_vocab"], chosen: Sequence[Int[Tensor, "batch"]]
    ) -> Float[Tensor, "batch d_vocab"]:
        ids = torch.cat((held, *(tokens[:, None] for tokens in chosen)), dim=1)
        return processor(cast("Any", ids.to(logits.device)), cast("Any", logits.float()))

    return penalised
