"""Prompt prefixes and generated responses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from focuslens.hooks import Intervention
from focuslens.model.stop_strings import ResponseText
from focuslens.prompts.batch import PromptBatch

__all__ = ["Generation", "Prefix", "Responses"]


@dataclass(frozen=True, eq=False)
class Generation:
    """A generated response.

    Attributes:
        text: Text of the response before a stop string, without special tokens or surrounding white space.
        tokens: Token ids of the response, without the stop token. If a stop string ended the response, they are the
            tokens whose text begins before it.
        finished: Whether a stop token or a stop string ended the response. It is ``False`` if the response reached the
            maximum length or the end of the context.
        stop: Stop token that ended the response; ``None`` if a stop string ended it, or if ``finished`` is ``False``.
    """

    text: str
    tokens: Int[Tensor, "response"]
    finished: bool
    stop: int | None = None

    def __repr__(self) -> str:
        return f"Generation({self.text!r}, {len(self.tokens)} tokens, finished={self.finished})"


_identities: WeakKeyDictionary[Any, str] = WeakKeyDictionary()


def identity_of(hooked: Any) -> str:
    """A name of a TransformerLens model that no other model has, in this process or another one."""
    return _identities.setdefault(hooked, uuid4().hex)


@dataclass(frozen=True, eq=False, repr=False)
class Prefix:
    """A batch of prompts that have been run, with a key-value cache. A prefix can be extended any number of times.

    Attributes:
        batch: The prompts.
        tokens: Tokens of all columns so far.
        cache: Keys and values of all columns that have been run.
        mask: Attention mask of these columns: 1 for a token, 0 for padding.
        logits: Logits of the last token of each row; ``None`` if the last token of each prompt was held back.
        under: Interventions under which the prompts were run.
        residuals: Layer inputs ``[batch column d_model]`` by layer index, for the layers in ``keep`` of
            :meth:`ModelRunner.prefill`.
        measured: What interventions have measured in the prompts, so that the settings of a sweep measure it once;
            ``None`` for a prefix whose next use may run under other hooks on the model.
        of: Identity of the TransformerLens model that ran the prompts, from :func:`identity_of`; ``None`` if it is not
            known. A prefix does not keep the model in memory.
    """

    batch: PromptBatch
    tokens: Int[Tensor, "batch column"]
    cache: Any
    mask: Int[Tensor, "batch column"]
    logits: Float[Tensor, "batch d_vocab"] | None
    under: tuple[Any, ...] = ()
    residuals: Mapping[int, Tensor] = field(default_factory=dict[int, Tensor])
    measured: dict[str, Any] | None = None
    of: str | None = None

    def __repr__(self) -> str:
        held = "" if self.logits is not None else ", without the rows of their last tokens"
        return f"Prefix({len(self.batch)} prompts, {self.mask.shape[1]} columns{held})"

    @property
    def is_shared(self) -> bool:
        """Whether copies of a prompt share keys and values. If ``False``, each copy needs separate memory."""
        return hasattr(self.cache, "shared")

    def require_run_by(self, hooked: Any) -> None:
        """Check that the TransformerLens model ``hooked`` ran the prompts.

        Raises:
            ValueError: If another model ran them. Its keys and values mean nothing to this one, even if they fit.
        """
        if self.of is not None and self.of != identity_of(hooked):
            raise ValueError("the prefix was run by another model; prefill the prompts with the model that goes on")

    def require_run_under(self, interventions: Sequence[Intervention]) -> None:
        """Check that the prefix was run under every intervention that acts on its rows.

        Raises:
            ValueError: If the prefix was run without one of these interventions.
        """
        # If there are logits, the row of the last prompt token has been run. All interventions act on that row.
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
    """Response tokens of a batch during greedy decoding. Each step adds one token per response.

    Attributes:
        limits: Maximum length of each response, in tokens.
        stops: Tokens that end a response.
        newest: Newest token of each row; before the first step, the last token of the prompt.
        texts: Text of each response, which is searched for stop strings; empty if there are no stop strings.
        steps: One tensor ``[batch]`` of tokens per step. Tokens after the end of a response are arbitrary.
        pending: Whether each response needs another token.
        running: Whether the newest token of each row is part of the prompt or the response. If ``False``, the row is
            run as padding.
    """

    limits: Int[Tensor, "batch"]
    stops: Int[Tensor, "stop"]
    newest: Int[Tensor, "batch"]
    texts: Sequence[ResponseText] = ()
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
        for row, text in enumerate(self.texts):
            if self.running[row] and text.append(int(tokens[row])):
                self.pending[row] = False
                # A token that begins before the stop string is part of the response.
                self.running[row] = text.length == len(self.steps)

    def rows(self) -> list[list[int]]:
        """Token ids of each row, up to the row's limit. A row may include a stop token and tokens after it."""
        if not self.steps:
            return [[] for _ in self.limits]
        rows = torch.stack(self.steps, dim=1).tolist()
        return [row[:limit] for row, limit in zip(rows, self.limits.tolist(), strict=True)]
