"""Split-softmax on a random part of a prompt: the control of self-focus."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from focuslens.heads import Head, as_heads
from focuslens.hooks import Cursor, Hook, HookTarget, Intervention, PromptLike
from focuslens.interventions.base import require_prompt
from focuslens.interventions.self_focus import PartKind, parts_of, with_span
from focuslens.interventions.split_softmax import SplitSoftmax
from focuslens.prompts.batch import EncodedPrompt, PromptBatch
from focuslens.util.checks import checked_integer

if TYPE_CHECKING:
    from focuslens.model.focus_model import FocusModel
    from focuslens.model.generation import Prefix

__all__ = ["RandomFocus"]


@dataclass(frozen=True)
class RandomFocus:
    """Split-softmax on one random part of a prompt, in the rows that produce the response.

    The part of a prompt depends on its tokens and the seed alone.

    Args:
        heads: ``(layer, head)`` pairs.
        tau: Exponent of split-softmax; less than 1 raises the attention.
        seed: Seed of the draw.
        parts: ``document``, ``sentence``, or a number of tokens.
    """

    heads: tuple[Head, ...]
    tau: float
    seed: int = 0
    parts: PartKind = "document"

    def __init__(
        self, heads: Iterable[tuple[int, int]], tau: float, *, seed: int = 0, parts: PartKind = "document"
    ) -> None:
        object.__setattr__(self, "heads", as_heads(heads))
        object.__setattr__(self, "tau", SplitSoftmax([], tau).tau)
        object.__setattr__(self, "seed", checked_integer(seed, "seed"))
        object.__setattr__(self, "parts", parts)

    @property
    def changes_prompt(self) -> bool:
        """Always ``False``, because only the rows that produce the response change."""
        return False

    def describe(self) -> dict[str, Any]:
        """Kind and settings of the intervention as JSON values."""
        heads = [list(head) for head in self.heads]
        return {"kind": "random_focus", "tau": self.tau, "seed": self.seed, "parts": self.parts, "heads": heads}

    def hooks(self, model: HookTarget, prompt: PromptLike | None = None, *, cursor: Cursor | None = None) -> list[Hook]:
        """TransformerLens hooks for one prompt, or for a batch padded on the left.

        Raises:
            ValueError, TypeError: As for :meth:`SelfFocus.hooks`.
        """
        if not hasattr(model, "encoder"):
            raise TypeError(f"random focus splits the prompt, so it needs a FocusModel, not a {type(model).__name__}")
        batch, split = self._drawn(cast("FocusModel", model), require_prompt(model, prompt, "random focus"))
        return split.hooks(model, batch, cursor=cursor)

    def resolve(self, model: FocusModel, prefix: Prefix, max_new_tokens: int = 100) -> tuple[PromptBatch, Intervention]:
        """The prompts of a prefix with the drawn parts as a further span, and split-softmax on this span."""
        del max_new_tokens
        return self._drawn(model, prefix.batch)

    def _drawn(self, model: FocusModel, batch: PromptBatch) -> tuple[PromptBatch, SplitSoftmax]:
        drawn, name = with_span(batch, self.describe(), [[self._part(model, prompt)] for prompt in batch.prompts])
        return drawn, SplitSoftmax(self.heads, self.tau, name)

    def _part(self, model: FocusModel, prompt: EncodedPrompt) -> tuple[int, int]:
        parts = parts_of(model, prompt, self.parts)
        digest = hashlib.sha256(f"{self.seed} {prompt.tokens.tolist()}".encode()).digest()
        return parts[int.from_bytes(digest[:8], "big") % len(parts)]
