"""Greedy decoding after a prefix, one token of every response at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from focuslens.hooks import Cursor, Hook, Intervention
from focuslens.prompts.batch import Generation, Prefix, PromptBatch

if TYPE_CHECKING:
    from focuslens.model.focus_model import FocusModel

__all__ = ["complete", "decode", "extend", "require_run_under", "response_of"]


@torch.no_grad()
def decode(
    model: FocusModel,
    prefix: Prefix,
    interventions: Sequence[Intervention],
    max_new_tokens: int,
    observers: Sequence[Hook] = (),
    repetition_penalty: float = 1.0,
) -> list[Generation]:
    """Greedy responses; see :meth:`FocusModel.decode`."""
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
    if repetition_penalty <= 0:
        raise ValueError(f"repetition_penalty is {repetition_penalty}; it must be above 0, and 1 is none")
    require_run_under(prefix, interventions)
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
            if repetition_penalty != 1:
                logits = _penalised(logits, prefix.batch, chosen, repetition_penalty)
            newest, logits = logits.argmax(dim=-1).cpu(), None
            if pending.any():
                chosen.append(newest)
            said = pending & ~torch.isin(newest, stops)
            pending = said & (len(chosen) < limits)
    rows = torch.stack(chosen, dim=1).tolist() if chosen else [[] for _ in prefix.batch.prompts]
    return [response_of(model, row[:limit]) for row, limit in zip(rows, limits.tolist(), strict=True)]


def _penalised(
    logits: Float[Tensor, "batch d_vocab"], batch: PromptBatch, chosen: Sequence[Int[Tensor, "batch"]], penalty: float
) -> Float[Tensor, "batch d_vocab"]:
    """Logits of tokens that prompt or response hold already, made less likely (Keskar et al., 2019)."""
    scores = logits.float().clone()
    for place, (row, prompt) in enumerate(zip(scores, batch.prompts, strict=True)):
        held = torch.cat((prompt.tokens, *(tokens[place, None] for tokens in chosen))).to(row.device)
        row[held] = torch.where(row[held] < 0, row[held] * penalty, row[held] / penalty)
    return scores


@torch.no_grad()
def complete(model: FocusModel, prefix: Prefix, interventions: Sequence[Intervention]) -> Prefix:
    """A prefix whose last token, if it was held back, has been run under the interventions."""
    require_run_under(prefix, [one for one in interventions if one.changes_prompt])
    if prefix.logits is not None:
        return prefix
    last, cache = prefix.batch.tokens(model.pad_token)[:, -1:], model.backend.fork(prefix.cache)
    cursor, mask = Cursor(prefix.mask.shape[1]), torch.cat((prefix.mask, torch.ones_like(last)), dim=1)
    with model.intervened(interventions, prefix.batch, cursor):
        logits = model.run(last, mask, cache, last_only=True)[:, -1]
    return Prefix(prefix.batch, cache, mask, logits, tuple(interventions))


def require_run_under(prefix: Prefix, interventions: Sequence[Intervention]) -> None:
    """Refuse a prefix to whose rows an intervention should have been applied and was not.

    Raises:
        ValueError: If there is one.
    """
    # A token held back is still to be run; one that has been run made the first response token.
    acted = [one for one in interventions if one.changes_prompt or prefix.logits is not None]
    if all(any(one is under for under in prefix.under) for one in acted):
        return
    if prefix.logits is None:
        raise ValueError(
            "an intervention changes the prompt's own rows, and this prefix was run without it; prefill under the "
            "interventions that change the prompt"
        )
    raise ValueError(
        "the prefix was run, its last token included, without an intervention that acts on it; prefill with "
        "hold_last=True, and under the interventions that change the prompt"
    )


@torch.no_grad()
def extend(
    model: FocusModel,
    prefix: Prefix,
    tokens: Int[Tensor, "batch new"],
    interventions: Sequence[Intervention],
    observers: Sequence[Hook],
    mask: Int[Tensor, "batch new"] | None,
) -> tuple[Float[Tensor, "batch new d_vocab"], Prefix]:
    """See :meth:`FocusModel.extend`."""
    new = torch.ones_like(tokens.cpu()) if mask is None else mask.cpu().long()
    if len(tokens) != len(prefix.batch) or new.shape != tokens.shape or not tokens.shape[1]:
        raise ValueError(
            f"tokens have the shape {tuple(tokens.shape)} and their mask {tuple(new.shape)}; for a prefix of "
            f"{len(prefix.batch)} prompt(s) both must be ({len(prefix.batch)}, new), with at least one new token"
        )
    model.points.require_firing(name for name, _ in observers)
    prefix = complete(model, prefix, interventions)
    start, mask = prefix.mask.shape[1], torch.cat((prefix.mask, new), dim=1)
    model.require_room(int(mask.sum(dim=1).max()))
    cache = model.backend.fork(prefix.cache)
    with model.intervened(interventions, prefix.batch, Cursor(start), observers):
        logits = model.run(tokens, mask, cache, last_only=False)
    # What goes on from here goes on from each row's last token, not from the padding behind it.
    last = (new * torch.arange(1, new.shape[1] + 1)).argmax(dim=1).to(logits.device)
    newest = logits[torch.arange(len(logits), device=logits.device), last]
    if prefix.logits is not None:
        newest = torch.where(new.any(dim=1, keepdim=True).to(logits.device), newest, prefix.logits)
    return logits, Prefix(prefix.batch, cache, mask, newest, prefix.under)


def response_of(model: FocusModel, ids: list[int]) -> Generation:
    """A response's tokens up to the first that ends it, and their text."""
    end = next((i for i, token in enumerate(ids) if token in model.stop_tokens), None)
    text = cast("str", model.tokenizer.decode(ids[:end], skip_special_tokens=True))
    tokens: Int[Tensor, "response"] = torch.tensor(ids[:end], dtype=torch.long)
    return Generation(text.strip(), tokens, end is not None, None if end is None else ids[end])
