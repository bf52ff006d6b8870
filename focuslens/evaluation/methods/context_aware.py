"""Context-aware decoding: the next token from the logits with the documents against those without."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange, repeat
from jaxtyping import Float
from torch import Tensor

from focuslens.evaluation.methods.interventions import checked_beside, resolved_for
from focuslens.hooks import Intervention
from focuslens.interventions.lanes import Lanes
from focuslens.model.decoding_settings import DecodingSettings, LogitsRule
from focuslens.model.generation import Generation, Prefix
from focuslens.prompts.batch import EncodedPrompt, PromptBatch
from focuslens.prompts.rewriting import removed_documents
from focuslens.util.checks import checked_number

if TYPE_CHECKING:
    from focuslens.model.focus_model import FocusModel

__all__ = ["ContextAwareDecoding", "jensen_shannon"]


def jensen_shannon(
    first: Float[Tensor, "*batch d_vocab"], second: Float[Tensor, "*batch d_vocab"]
) -> Float[Tensor, "*batch"]:
    """Jensen-Shannon divergence of the distributions with two tensors of logits, in nats: from 0 to log 2."""
    p, q = (logits.double().log_softmax(dim=-1) for logits in (first, second))
    mean = torch.logaddexp(p, q) - math.log(2)
    # A token of probability zero in a distribution contributes nothing to the distribution's divergence.
    sums = [torch.where(x.isneginf(), 0.0, x.exp() * (x - mean)).sum(dim=-1) for x in (p, q)]
    return ((sums[0] + sums[1]) / 2).clamp(min=0)


@dataclass(frozen=True)
class ContextAwareDecoding:
    r"""Greedy decoding from the logits with the documents of a prompt, against the logits without them.

    The logits of a token are :math:`(1 + \alpha) \ell_\text{with} - \alpha \ell_\text{without}` (CAD, arXiv
    2305.14739). AdaCAD (arXiv 2409.07394) takes as :math:`\alpha`, at each step, the Jensen-Shannon divergence in nats
    of the two distributions of the next token. The method AdaCAD is ``alpha=None``.

    The prompt without its documents is the prompt's text without the ranges of the span ``document``, their headings
    (``Document [3]``) and the white space between them. Instruction, question and chat template stay. Penalties of the
    checkpoint apply to the combined logits, and take the tokens of the prompt with the documents. Interventions act on
    the runs with the documents only.

    Args:
        alpha: Weight of the difference. 0 is plain generation. The authors use 1 for questions whose documents
            contradict the model's knowledge, and 0.5 for summaries. ``None`` stands for the divergence.
        min_alpha: Smallest weight, if ``alpha`` is ``None``. AdaCAD's authors raise it for long responses.

    Raises:
        TypeError: If a weight is not a number.
        ValueError: If a weight is negative or not finite, or if both are given.
    """

    alpha: float | None = 1.0
    min_alpha: float = 0.0

    def __post_init__(self) -> None:
        for name in ("alpha", "min_alpha"):
            value = getattr(self, name)
            number = None if value is None and name == "alpha" else checked_number(value, name)
            if number is not None and not 0 <= number < math.inf:
                raise ValueError(f"{name} is {number}; it must be a finite number, 0 or more (0 is plain generation)")
            object.__setattr__(self, name, number)
        if self.alpha is not None and self.min_alpha:
            raise ValueError(f"min_alpha is {self.min_alpha}, which needs alpha=None; alpha is {self.alpha}")

    def describe(self) -> dict[str, Any]:
        """Kind and settings of the method as JSON values."""
        return {"kind": "context_aware_decoding", "alpha": self.alpha, "min_alpha": self.min_alpha}

    def respond(
        self,
        model: FocusModel,
        batch: PromptBatch,
        interventions: Sequence[Intervention] = (),
        *,
        max_new_tokens: int = 100,
    ) -> list[Generation]:
        """One response per prompt.

        Each prompt and its copy without documents are adjacent rows of one run. Both continue with the same tokens.

        Args:
            model: The model.
            batch: The prompts, with a text and the span ``document``.
            interventions: Interventions on the runs with the documents. Their spans are names.
            max_new_tokens: Maximum length of a response, in tokens.

        Raises:
            ValueError: If the documents of a prompt are unknown, or if an intervention acts on token positions.
            TypeError: If ``interventions`` is not a sequence of interventions.
        """
        batch, acting = resolved_for(model, batch, checked_beside(self, interventions), max_new_tokens)
        pairs = PromptBatch.of([row for prompt in batch.prompts for row in (prompt, _without(model, prompt))])
        lanes = [Lanes([acting, ()])]
        settings = {item.name: getattr(model.decoding, item.name) for item in fields(DecodingSettings)}
        decoding = _PairedDecoding(**settings, method=self)
        prefix = model.prefill(pairs, lanes, hold_last=True)
        return model.decode(prefix, lanes, max_new_tokens=max_new_tokens, decoding=decoding)[::2]

    def combined(
        self, with_context: Float[Tensor, "batch d_vocab"], without: Float[Tensor, "batch d_vocab"]
    ) -> Float[Tensor, "batch d_vocab"]:
        """Logits from those with the documents and those without."""
        if self.alpha is None:
            alpha = rearrange(jensen_shannon(with_context, without).clamp(min=self.min_alpha), "batch -> batch 1")
        else:
            alpha = self.alpha
        exact = with_context.double()
        # A token that the model never writes has minus infinity in both.
        difference = torch.where(exact.isneginf(), 0.0, exact - without.double())
        return (exact + alpha * difference).float()


def _without(model: FocusModel, prompt: EncodedPrompt) -> EncodedPrompt:
    """The prompt without its documents. It has the same span names, so that interventions find them."""
    rewritten = model.encoder.rewritten(prompt, removed_documents(prompt))
    return replace(rewritten, spans={**dict.fromkeys(prompt.spans, ()), **rewritten.spans})


@dataclass(frozen=True)
class _PairedDecoding(DecodingSettings):
    """Greedy decoding of pairs of adjacent rows, which get the same logits."""

    method: ContextAwareDecoding = field(default_factory=ContextAwareDecoding)

    def rule(self, prefix: Prefix) -> LogitsRule:
        """Function that combines the logits of each pair, and then applies the checkpoint's settings."""
        settings = {item.name: getattr(self, item.name) for item in fields(DecodingSettings)}
        firsts = replace(
            prefix, batch=PromptBatch(prefix.batch.prompts[::2]), tokens=prefix.tokens[::2], mask=prefix.mask[::2]
        )
        declared = DecodingSettings(**settings).rule(firsts)

        def change(logits: Float[Tensor, "batch d_vocab"], steps: Sequence[Tensor]) -> Float[Tensor, "batch d_vocab"]:
            changed = declared(self.method.combined(logits[::2], logits[1::2]), [step[::2] for step in steps])
            return repeat(changed, "prompt d_vocab -> (prompt copy) d_vocab", copy=2)

        return change
