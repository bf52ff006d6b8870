"""Prefixes in place of prompts, so that several functions share one run of a long prompt."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from focuslens.hooks import Intervention, PromptLike
from focuslens.model.engine import KeyValueCache
from focuslens.model.generation import Prefix
from focuslens.prompts.batch import EncodedPrompt, PromptInput

__all__ = ["prefilled", "prompt_of"]


@runtime_checkable
class Prefiller(Protocol):
    """Model that encodes and runs prompts; the part of :class:`ModelRunner` that is needed here."""

    def encode(self, prompt: PromptInput) -> EncodedPrompt:
        """Tokens and spans of a prompt; see :meth:`FocusModel.encode`."""
        ...

    def prefill(
        self, prompts: PromptLike, interventions: Sequence[Intervention] = (), *, hold_last: bool = False
    ) -> Prefix:
        """Run prompts once; see :meth:`ModelRunner.prefill`."""
        ...


def prompt_of(model: Prefiller, prompt: PromptInput | Prefix) -> EncodedPrompt:
    """The prompt of a prefix, or a prompt itself, as tokens and spans.

    Raises:
        ValueError: If the prefix has several prompts, or goes on after its prompt.
    """
    if not isinstance(prompt, Prefix):
        return model.encode(prompt)
    if len(prompt.batch) != 1:
        raise ValueError(f"the prefix has {len(prompt.batch)} prompts; give one of one prompt: model.prefill(prompt)")
    if _is_extended(prompt):
        raise ValueError(
            f"the prefix goes on for {prompt.mask.shape[1] - prompt.batch.width} tokens after its prompt; give the "
            "prefix that model.prefill returned, and the further tokens as response"
        )
    return prompt.batch.prompts[0]


def prefilled(model: Prefiller, prompts: PromptLike | Prefix, interventions: Sequence[Intervention]) -> Prefix:
    """Prefix of prompts without the row of their last tokens: the given one, or that of a new run.

    The row of a prompt's last token produces the first response token, so every intervention acts on it. If the given
    prefix has run this row, its keys and values are left out, and the row is run again under ``interventions``. All
    other rows are taken from the prefix.

    Args:
        model: The model.
        prompts: The prompts, or a prefix of them. A prefix that goes on after its prompts is returned as it is.
        interventions: Interventions under which the caller goes on.

    Raises:
        ValueError: If an intervention changes the prompt's rows and the prefix was run without it, or if the prefix was
            run under one that is not in ``interventions``.
    """
    if not isinstance(prompts, Prefix):
        return model.prefill(prompts, interventions, hold_last=True)
    changing = tuple(item for item in prompts.under if item.changes_prompt)
    others = [item for item in changing if not any(item is given for given in interventions)]
    if others:
        raise ValueError(
            f"the prefix was run under {type(others[0]).__name__}, which changed the prompt's rows; pass the same "
            "intervention again, or prefill without it"
        )
    if _is_extended(prompts):
        prompts.require_run_under(interventions)
        return prompts
    columns = prompts.batch.width - 1
    if prompts.mask.shape[1] > columns:
        tokens, mask = prompts.tokens[:, :columns], prompts.mask[:, :columns]
        cache = _truncated(prompts.cache, columns)
        prompts = Prefix(prompts.batch, tokens, cache, mask, None, changing, of=prompts.of)
    prompts.require_run_under(interventions)
    return prompts


def _is_extended(prefix: Prefix) -> bool:
    return prefix.mask.shape[1] > prefix.batch.width


def _truncated(cache: Any, columns: int) -> Any:
    """A cache with the first columns of another one, which stays as it is."""
    if isinstance(cache, KeyValueCache):
        return cache.truncated(columns)
    if hasattr(cache, "crop"):  # of transformers
        cache = copy.copy(cache)
        cache.layers = [copy.copy(layer) for layer in cache.layers]
        cache.crop(columns - cache.get_seq_length())  # the number of columns to remove, as a negative number
        return cache
    entries = [
        dataclasses.replace(entry, past_keys=entry.past_keys[:, :columns], past_values=entry.past_values[:, :columns])
        for entry in cache.entries
    ]
    return dataclasses.replace(
        cache, entries=entries, previous_attention_mask=cache.previous_attention_mask[:, :columns]
    )
