"""Prompt prefixes and greedy decoding with a TransformerLens model under interventions."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from focuslens.hooks import Cursor, Hook, Intervention, PromptLike, checked_interventions, last_layer, on_prompt
from focuslens.model.decoding_settings import DecodingSettings, LogitsRule
from focuslens.model.engine import KeyValueCache
from focuslens.model.generation import Generation, Prefix, Responses, identity_of
from focuslens.model.hook_points import lock_of
from focuslens.model.lean_rows import lean_rows_plan, read_lean_rows
from focuslens.model.passes import PassRunner, Stepping
from focuslens.model.resolving import first_layer, resolved
from focuslens.model.stop_strings import ResponseText
from focuslens.util.progress import bars_inside

__all__ = ["ModelRunner"]


class ModelRunner(PassRunner):
    """Prompt prefixes and greedy decoding with a TransformerLens model under interventions."""

    @torch.no_grad()
    def prefill(
        self,
        prompts: PromptLike,
        interventions: Sequence[Intervention] = (),
        *,
        hold_last: bool = False,
        keep: Collection[int] = (),
        progress: bool | None = None,
    ) -> Prefix:
        """Run prompts once, and return a prefix for any number of calls of :meth:`extend` and :meth:`decode`.

        The prefix also stands for its prompts in :meth:`FocusModel.generate` and in functions that read attention.

        The row of a prompt's last token produces the first response token. Interventions on the response therefore
        begin at this row. If the last token is held back, each setting of a sweep can run this row under different
        interventions. All settings share the keys and values of the other rows.

        Args:
            prompts: One prompt, or several prompts that form a batch.
            interventions: Interventions, applied in order.
            hold_last: Whether to hold back the last token of each prompt, which later calls then run.
            keep: Layers whose inputs are stored in the prefix. :meth:`rerun` can start at any of these layers.
            progress: Whether to show a progress bar for a long prompt; :mod:`focuslens.util.progress` has the default.

        Raises:
            ValueError: If a prompt does not fit the context, or ``keep`` names a layer that does not exist.
            TypeError: If ``interventions`` is not a sequence of interventions.
        """
        interventions = checked_interventions(interventions)
        batch = self.batch(prompts)
        self.require_room(batch.width)
        cache, mask = self.backend.new_cache(len(batch), batch.width), batch.mask()
        tokens = batch.tokens(self.pad_token)
        if hold_last:
            mask, tokens = mask[:, :-1], tokens[:, :-1]
        missing = [layer for layer in keep if not 0 <= layer < self.shape.n_layers]
        if missing:
            raise ValueError(f"keep names layer {missing[0]}; the model has layers 0 to {self.shape.n_layers - 1}")
        logits, kept = None, dict[int, Tensor]()
        # Without the last prompt tokens, this pass has no rows that interventions on the response would change.
        acting = on_prompt(interventions) if hold_last else interventions
        if tokens.shape[1]:
            with bars_inside(progress):
                logits, kept = self.run_prompts(acting, batch, tokens, mask, cache, logits=not hold_last, keep=keep)
        return Prefix(batch, tokens, cache, mask, logits, interventions, kept, of=identity_of(self.hooked))

    @torch.no_grad()
    def rerun(self, prefix: Prefix, interventions: Sequence[Intervention], *, copies: int = 1) -> Prefix:
        """Run the prompts of a prefix again under interventions on the prompt, with ``copies`` rows per prompt.

        If the prefix stores the input of the first layer that the interventions change, the run starts at that layer.
        The keys and values of all lower layers are taken from the prefix.

        Raises:
            ValueError: If another model ran the prefix, or if it was run under interventions or without ``hold_last``.
            TypeError: If ``interventions`` is not a sequence of interventions.
        """
        interventions = checked_interventions(interventions)
        prefix.require_run_by(self.hooked)
        if prefix.logits is not None or prefix.under:
            raise ValueError(
                "only a prefix that was run without interventions and holds its last token back can be run again"
            )
        batch = prefix.batch.repeated(copies)
        first = first_layer(self, interventions, batch)
        if first == self.shape.n_layers:
            return replace(self.copies(prefix, copies), under=interventions)
        residual = prefix.residuals.get(first)
        if residual is None or not isinstance(prefix.cache, KeyValueCache):
            return self.prefill(batch, interventions, hold_last=True)
        cache = prefix.cache.below(first, copies)
        tokens, mask = (x.repeat_interleave(copies, dim=0) for x in (prefix.tokens, prefix.mask))
        copied = residual.repeat_interleave(copies, dim=0)
        self.run_prompts_from(first, copied, on_prompt(interventions), batch, mask, cache)
        return Prefix(batch, tokens, cache, mask, None, interventions, of=identity_of(self.hooked))

    def copies(self, prefix: Prefix, n: int) -> Prefix:
        """A new prefix with ``n`` consecutive rows per prompt.

        The new prefix shares the keys and values of ``prefix`` if :attr:`Prefix.is_shared` is true.
        """
        logits = None if prefix.logits is None else prefix.logits.repeat_interleave(n, dim=0)
        tokens, mask = (x.repeat_interleave(n, dim=0) for x in (prefix.tokens, prefix.mask))
        cache = self.backend.fork(prefix.cache, n)
        return Prefix(prefix.batch.repeated(n), tokens, cache, mask, logits, prefix.under, of=prefix.of)

    @torch.no_grad()
    def extend(
        self,
        prefix: Prefix,
        tokens: Int[Tensor, "batch new"],
        interventions: Sequence[Intervention] = (),
        observers: Sequence[Hook] = (),
        *,
        mask: Int[Tensor, "batch new"] | None = None,
    ) -> tuple[Float[Tensor, "batch new d_vocab"], Prefix]:
        """Run further tokens after a prefix. The prefix itself does not change.

        Args:
            prefix: Prefix of the prompts. If the last prompt tokens were held back, they are run first, without
                observers.
            tokens: Further tokens, one row per prompt.
            interventions: Interventions, applied in order.
            observers: Plain hooks, which run after the hooks of the interventions.
            mask: 1 for a token, 0 for padding at the end of a shorter row; ``None`` if no row has padding.

        Returns:
            Logits of ``tokens``, and a new prefix that ends with ``tokens``.

        Raises:
            ValueError: If the tokens do not fit the context, if they do not have one row per prompt, if an intervention
                acts on rows of the prefix that were run without it, or if a hook point never fires.
            TypeError: If ``interventions`` is not a sequence of interventions.
        """
        interventions = checked_interventions(interventions)
        new = torch.ones_like(tokens.cpu()) if mask is None else mask.cpu().long()
        if len(tokens) != len(prefix.batch) or new.shape != tokens.shape or not tokens.shape[1]:
            raise ValueError(
                f"tokens have the shape {tuple(tokens.shape)} and their mask {tuple(new.shape)}; for a prefix of "
                f"{len(prefix.batch)} prompt(s) both must be ({len(prefix.batch)}, new), with at least one new token"
            )
        self.points.require_firing(name for name, _ in observers)
        self._require_runnable(prefix)
        prefix, interventions = resolved(self, prefix, interventions, 100)
        prefix = self.completed(prefix, interventions)
        start, columns = prefix.mask.shape[1], torch.cat((prefix.mask, new), dim=1)
        self.require_room(int(columns.sum(dim=1).max()))
        if self.backend.outgrown(columns, new.shape[1]):
            if new.shape[1] > 1:
                return self._extend_one_by_one(prefix, tokens, new, interventions, observers)
            cache = self._computed_again(prefix, prefix.tokens, prefix.mask, interventions)
        else:
            cache = self.backend.fork(prefix.cache)
        with self.intervened(interventions, prefix.batch, Cursor(start), observers):
            logits = self.run(tokens, columns, cache, last_only=False)
        # The logits of the next token come from the last token of each row, not from the padding after it.
        last = (new * torch.arange(1, new.shape[1] + 1)).argmax(dim=1).to(logits.device)
        newest = logits[torch.arange(len(logits), device=logits.device), last]
        if prefix.logits is not None:
            newest = torch.where(new.any(dim=1, keepdim=True).to(logits.device), newest, prefix.logits)
        ids = torch.cat((prefix.tokens, tokens.cpu()), dim=1)
        return logits, Prefix(prefix.batch, ids, cache, columns, newest, prefix.under, of=prefix.of)

    @torch.no_grad()
    def read_rows(
        self,
        prefix: Prefix,
        start: int,
        observers: Sequence[Hook],
        *,
        tokens: Int[Tensor, "batch new"] | None = None,
        mask: Int[Tensor, "batch new"] | None = None,
    ) -> None:
        """Run the last columns of the prompts again, so that observers read their rows. The prefix does not change.

        Keys and values of earlier columns are taken from the prefix, and layers after the last observer are not run.

        Args:
            prefix: Prefix of the prompts.
            start: First column to run.
            observers: Plain hooks on layers. They read each row once, but possibly also rows of earlier columns.
            tokens: Tokens to run in place of the prompts' own from ``start`` on.
            mask: 1 for a token of ``tokens``, 0 for padding at the end of a shorter row; ``None`` for no padding.

        Raises:
            ValueError: If a hook point never fires, or if the tokens do not fit the context.
        """
        self.points.require_firing(name for name, _ in observers)
        prefix.require_run_by(self.hooked)
        last = last_layer(name for name, _ in observers)
        whole = prefix.batch.tokens(self.pad_token), prefix.batch.mask()
        if tokens is None:
            tokens, mask = (x[:, start:] for x in whole)
        elif mask is None:
            mask = torch.ones_like(tokens)
        assert mask is not None
        columns = torch.cat((whole[1][:, :start], mask.long()), dim=1)
        self.require_room(int(columns.sum(dim=1).max()))
        acting = on_prompt(prefix.under)
        is_shared = isinstance(prefix.cache, KeyValueCache) and not self.backend.outgrown(columns, tokens.shape[1])
        if last is None or not is_shared:
            with self.intervened(acting, prefix.batch, Cursor(0), observers):
                self.run(torch.cat((whole[0][:, :start], tokens.cpu()), dim=1), columns, None, last_only=True)
            return
        cache = prefix.cache.truncated(start)
        with lock_of(self.hooked):
            lean = None if acting or not self._can_be_lean(cache) else lean_rows_plan(self.backend, observers, last)
            if lean is not None:
                with self._hooked(()):
                    read_lean_rows(self.backend, lean, observers, tokens.to(self.device), columns, cache)
                return
        with self.intervened(acting, prefix.batch, Cursor(start), observers):
            self.run_to(last, tokens, columns, cache)

    def _extend_one_by_one(
        self,
        prefix: Prefix,
        tokens: Tensor,
        new: Tensor,
        interventions: Sequence[Intervention],
        observers: Sequence[Hook],
    ) -> tuple[Tensor, Prefix]:
        """Extend a prefix by one column at a time, because keys must be computed again between two columns."""
        logits: list[Tensor] = []
        for column in range(new.shape[1]):
            here = slice(column, column + 1)
            row, prefix = self.extend(prefix, tokens[:, here], interventions, observers, mask=new[:, here])
            logits.append(row)
        return torch.cat(logits, dim=1), prefix

    def _computed_again(
        self, prefix: Prefix, tokens: Tensor, mask: Tensor, interventions: Sequence[Intervention]
    ) -> Any:
        """A cache with the keys and values that these tokens have as the beginning of a longer sequence.

        Raises:
            ValueError: If the prefix was run under an intervention that is not one of ``interventions``.
        """
        if not all(any(applied is item for item in interventions) for applied in prefix.under):
            raise ValueError(
                "the sequence outgrows a rotary table, so the keys of the prefix must be computed again; pass the "
                "interventions under which the prefix was run"
            )
        cache = self.backend.new_cache(len(prefix.batch))
        self.run_prompts(interventions, prefix.batch, tokens, mask, cache)
        return cache

    def _require_runnable(self, prefix: Prefix) -> None:
        """Check that this model ran a prefix and, if a layer has a window, that no padding lies between tokens.

        Raises:
            ValueError: If another model ran it, or if there is such padding.
        """
        prefix.require_run_by(self.hooked)
        after_token = prefix.mask.cumsum(dim=1) > 0
        if bool((after_token & (prefix.mask == 0)).any()) and any(
            self.backend.window(layer) is not None for layer in range(self.shape.n_layers)
        ):
            raise ValueError(
                "a row of the prefix ends in padding, and the model has sliding windows, which would count the "
                "padding; extend such rows one at a time"
            )

    @torch.no_grad()
    def completed(self, prefix: Prefix, interventions: Sequence[Intervention] = ()) -> Prefix:
        """The prefix with logits. If the last prompt tokens were held back, they are run under the interventions.

        Raises:
            ValueError: If another model ran the prefix, or without an intervention that changes the prompt.
            TypeError: If ``interventions`` is not a sequence of interventions.
        """
        interventions = checked_interventions(interventions)
        prefix.require_run_by(self.hooked)
        prefix.require_run_under([item for item in interventions if item.changes_prompt])
        if prefix.logits is not None:
            return prefix
        last, cache = prefix.batch.tokens(self.pad_token)[:, -1:], self.backend.fork(prefix.cache)
        cursor, mask = Cursor(prefix.mask.shape[1]), torch.cat((prefix.mask, torch.ones_like(last)), dim=1)
        with self.intervened(interventions, prefix.batch, cursor):
            logits = self.run(last, mask, cache, last_only=True)[:, -1]
        tokens = torch.cat((prefix.tokens, last), dim=1)
        return Prefix(prefix.batch, tokens, cache, mask, logits, interventions, of=prefix.of)

    @torch.no_grad()
    def decode(
        self,
        prefix: Prefix,
        interventions: Sequence[Intervention] = (),
        *,
        max_new_tokens: int = 100,
        observers: Sequence[Hook] = (),
        decoding: DecodingSettings | None = None,
        stepping: Stepping | None = None,
    ) -> list[Generation]:
        """Generate greedy responses to the prompts of a prefix. The prefix itself does not change.

        Args:
            prefix: Prefix of the prompts.
            interventions: Interventions, applied in order.
            max_new_tokens: Maximum length of a response, in tokens. A response also ends when the context is full.
            observers: Plain hooks, which run after the hooks of the interventions. Each pass has one row per prompt. If
                the last prompt tokens were held back, the first pass runs them. Each later pass runs one token of every
                response.
            decoding: Stop tokens, stop strings and penalties; by default :attr:`decoding`.
            stepping: Passes to make in place of those of :meth:`stepping`.

        Raises:
            ValueError: If an intervention acts on rows of the prefix that were run without it, if a hook point never
                fires, or if ``max_new_tokens`` is not positive.
            TypeError: If ``interventions`` is not a sequence of interventions.
        """
        interventions = checked_interventions(interventions)
        self.points.require_firing(name for name, _ in observers)
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
        decoding = self.decoding if decoding is None else decoding
        self._require_runnable(prefix)
        prefix.require_run_under(interventions)
        prefix, interventions = resolved(self, prefix, interventions, max_new_tokens)
        # Padding does not count towards the context length. A token that was held back does.
        length = prefix.mask.sum(dim=1) + (prefix.logits is None)
        limits = (self.shape.n_ctx - length).clamp(min=0, max=max_new_tokens)
        stops, last = torch.tensor(decoding.stop_tokens, dtype=torch.long), prefix.batch.tokens(self.pad_token)[:, -1]
        strings = decoding.stop_strings
        texts = [ResponseText(self.tokenizer, strings) for _ in limits] if strings else []
        responses = Responses(limits, stops, last, texts)
        self._decode(responses, prefix, interventions, observers, decoding.rule(prefix), stepping or self.stepping)
        return [
            self._generation(ids, decoding.stop_tokens, texts[row] if texts else None)
            for row, ids in enumerate(responses.rows())
        ]

    def _decode(
        self,
        responses: Responses,
        prefix: Prefix,
        interventions: Sequence[Intervention],
        observers: Sequence[Hook],
        rule: LogitsRule,
        stepping: Stepping,
    ) -> None:
        """Append tokens until every response has ended. If there are observers, also run each response's last token."""
        cursor, cache, logits = Cursor(), self.backend.fork(prefix.cache), prefix.logits
        tokens, mask, renewed = prefix.tokens, prefix.mask, False

        def unfinished() -> bool:
            return bool(responses.pending.any() or (observers and responses.running.any()))

        while unfinished():
            limit = int((responses.limits - len(responses.steps)).max()) + 1
            with stepping(interventions, prefix.batch, cursor, observers, cache, limit) as step:
                while unfinished():
                    if logits is None:
                        columns = torch.cat((mask, responses.running.long()[:, None]), dim=1)
                        if columns.shape[1] > prefix.batch.width and self.backend.outgrown(columns, 1) and not renewed:
                            break
                        cursor.start, mask = mask.shape[1], columns
                        tokens = torch.cat((tokens, responses.newest[:, None]), dim=1)
                        logits = step(responses.newest[:, None], mask)
                        renewed = False
                    self._require_numbers(logits[responses.pending.to(logits.device)])
                    responses.append(rule(logits, responses.steps).argmax(dim=-1).cpu())
                    logits = None
                else:
                    return
            cache, renewed = self._computed_again(prefix, tokens, mask, interventions), True

    def _require_numbers(self, logits: Float[Tensor, "row d_vocab"]) -> None:
        """Check that logits are numbers. The largest of NaN logits is token 0, which would look like a response.

        Raises:
            ValueError: If a logit is NaN.
        """
        if logits.isnan().any():
            dtype = str(self.hooked.cfg.dtype).removeprefix("torch.")
            remedy = "the weights may be broken, or an intervention may return NaN"
            if dtype == "float16":
                remedy = "float16 overflows above 65,504; load the model with dtype='bfloat16' or 'float32'"
            raise ValueError(f"logits are NaN in {dtype}; {remedy}")

    def _generation(
        self, ids: list[int], stop_tokens: Sequence[int], searched: ResponseText | None = None
    ) -> Generation:
        """Response with the tokens before the first stop token or the first stop string."""
        if searched is not None and searched.ended:
            return Generation(searched.text.strip(), torch.tensor(ids[: searched.length], dtype=torch.long), True)
        end = next((i for i, token in enumerate(ids) if token in stop_tokens), None)
        text = cast("str", self.tokenizer.decode(ids[:end], skip_special_tokens=True))
        tokens: Int[Tensor, "response"] = torch.tensor(ids[:end], dtype=torch.long)
        return Generation(text.strip(), tokens, end is not None, None if end is None else ids[end])
