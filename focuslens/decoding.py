"""Greedy decoding after a prefix, one token of every response at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import torch
from jaxtyping import Int
from torch import Tensor

from focuslens.batch import Generation, Prefix
from focuslens.hooks import Cursor, Hook, Intervention

if TYPE_CHECKING:
    from focuslens.model import FocusModel

__all__ = ["decode", "response_of"]


@torch.no_grad()
def decode(
    model: FocusModel,
    prefix: Prefix,
    interventions: Sequence[Intervention],
    max_new_tokens: int,
    observers: Sequence[Hook] = (),
) -> list[Generation]:
    """Greedy responses; see :meth:`FocusModel.decode`."""
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
    _require_run_under(prefix, interventions)
    # Each prompt has the room it would have alone: padding takes none of the context. A token held back takes one.
    taken = prefix.mask.sum(dim=1) + (prefix.logits is None)
    limits = (model.shape.n_ctx - taken).clamp(min=0, max=max_new_tokens)
    cursor, cache, mask, logits = Cursor(), model.backend.fork(prefix.cache), prefix.mask, prefix.logits
    stops = torch.tensor(model.stop_tokens, dtype=torch.long)
    newest, chosen = prefix.batch.tokens(model.pad_token)[:, -1], list[Tensor]()
    # Whose response goes on, and whose newest token belongs to it: only that is run, all else is padding.
    pending = said = limits > 0
    with model.intervened(interventions, prefix.batch, cursor, observers):
        while pending.any() or (observers and said.any()):
            if logits is None:
                cursor.start = mask.shape[1]
                mask = torch.cat((mask, said.long()[:, None]), dim=1)
                logits = model.run(newest[:, None], mask, cache, last_only=True)[:, -1]
            newest, logits = logits.argmax(dim=-1).cpu(), None
            if pending.any():
                chosen.append(newest)
            said = pending & ~torch.isin(newest, stops)
            pending = said & (len(chosen) < limits)
    rows = torch.stack(chosen, dim=1).tolist() if chosen else [[] for _ in prefix.batch.prompts]
    return [response_of(model, row[:limit]) for row, limit in zip(rows, limits.tolist(), strict=True)]


def _require_run_under(prefix: Prefix, interventions: Sequence[Intervention]) -> None:
    on_prompt = [one for one in interventions if one.changes_prompt]
    if prefix.logits is None and not all(any(one is under for under in prefix.under) for one in on_prompt):
        raise ValueError(
            "an intervention changes the prompt's own rows, and this prefix, which holds its last token back, was run "
            "without it; prefill under the interventions that change the prompt"
        )


def response_of(model: FocusModel, ids: list[int]) -> Generation:
    """A response's tokens up to the first that ends it, and their text."""
    end = next((i for i, token in enumerate(ids) if token in model.stop_tokens), None)
    text = cast("str", model.tokenizer.decode(ids[:end], skip_special_tokens=True))
    tokens: Int[Tensor, "response"] = torch.tensor(ids[:end], dtype=torch.long)
    return Generation(text.strip(), tokens, end is not None)
