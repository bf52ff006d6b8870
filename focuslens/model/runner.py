"""Passes, prefixes and greedy decoding over a TransformerLens model, under interventions."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import replace
from threading import RLock
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor

from focuslens.heads import ModelShape
from focuslens.hooks import Cursor, Hook, Intervention, PromptLike, last_layer, layer_of, on_prompt
from focuslens.model.backends import Backend
from focuslens.model.engine import KeyValueCache
from focuslens.model.generation import Generation, Prefix, repetition_penalised
from focuslens.model.hook_points import HookPoints
from focuslens.prompts.batch import EncodedPrompt, PromptBatch

__all__ = ["ModelRunner", "first_layer"]

_locks: WeakKeyDictionary[Any, RLock] = WeakKeyDictionary()
"""One lock per TransformerLens model: hooks are set on the model itself, so its passes take turns."""


class ModelRunner(ABC):
    """Runs a TransformerLens model: passes, prefixes and greedy decoding, under interventions.

    Attributes:
        backend: The TransformerLens model behind one interface.
        tokenizer: The checkpoint's own tokenizer.
        stop_tokens: Tokens that end a response.
        points: The hook points that fire and act.
    """

    def __init__(self, backend: Backend, tokenizer: Any, stop_tokens: Sequence[int]) -> None:
        self.backend = backend
        self.tokenizer: Any = tokenizer
        self.stop_tokens = tuple(stop_tokens)
        self.points = HookPoints(backend)

    @abstractmethod
    def encode(self, prompt: str | EncodedPrompt) -> EncodedPrompt:
        """A prompt's tokens and its parts as token ranges."""

    @property
    def hooked(self) -> Any:
        """The TransformerLens model."""
        return self.backend.hooked

    @property
    def shape(self) -> ModelShape:
        """Layers, heads and sizes."""
        return self.backend.shape

    @property
    def device(self) -> torch.device:
        """The device of the model's weights."""
        return self.backend.device

    def batch(self, prompts: PromptLike) -> PromptBatch:
        """One prompt or several as a left-padded batch."""
        if isinstance(prompts, PromptBatch):
            return prompts
        listed = [prompts] if isinstance(prompts, str | EncodedPrompt) else prompts
        return PromptBatch.of([self.encode(prompt) for prompt in listed])

    def require_acting(self, names: Iterable[str]) -> None:
        """Refuse hook points that a hook cannot change anything at; see :meth:`HookPoints.require_acting`."""
        self.points.require_acting(names)

    def cache_window(self, layer: int) -> int | None:
        """Keys that TransformerLens's own cache keeps of a layer; ``None`` for all of them."""
        return self.backend.window(layer) if self.backend.is_bridge else None

    @contextmanager
    def intervened(
        self,
        interventions: Sequence[Intervention],
        prompt: PromptLike | None,
        cursor: Cursor | None = None,
        observers: Sequence[Hook] = (),
    ) -> Generator[None]:
        """Run ``model.hooked`` under interventions; the hooks are removed at the end, also after an exception.

        Other threads wait for their turn. Observers are further hooks, added after those of the interventions.
        """
        # Hooks are on the model itself: another thread's pass, or this one's, would run under the hooks of both.
        with _locks.setdefault(self.hooked, RLock()):
            hooks = [hook for item in interventions for hook in item.hooks(self, prompt, cursor=cursor)]
            self.require_acting(name for name, _ in hooks)
            with self.hooked.hooks(fwd_hooks=[*hooks, *observers]):
                yield

    def run(
        self, tokens: Int[Tensor, "batch row"], mask: Int[Tensor, "batch column"], cache: Any | None, *, last_only: bool
    ) -> Float[Tensor, "batch logit_row d_vocab"]:
        """Logits of one pass of the model as it stands, hooks included; a cache grows by the pass's columns.

        Args:
            tokens: Tokens of the rows.
            mask: 1 where a column, of the cache or of these rows, holds a token, and 0 where it is padding.
            cache: Keys and values of earlier columns; ``None`` for a pass without a cache.
            last_only: Whether to give logits of the last row alone.
        """
        return self.backend.forward(tokens.to(self.device), mask, cache, last_only=last_only)

    @torch.no_grad()
    def observe(
        self,
        tokens: Int[Tensor, "pos"],
        observers: Sequence[Hook],
        interventions: Sequence[Intervention] = (),
        *,
        prompt: EncodedPrompt | None = None,
    ) -> None:
        """Run the model once on given tokens under plain hooks, up to the last layer that they are in.

        The tokens begin with the prompt, which interventions may need.

        Raises:
            ValueError: If the tokens do not fit the context, or a hook point does not exist or fire.
        """
        self.require_room(len(tokens))
        self.points.require_firing(name for name, _ in observers)
        batch = None if prompt is None else PromptBatch.of([prompt])
        mask, last = torch.ones(1, len(tokens), dtype=torch.long), last_layer(name for name, _ in observers)
        with self.intervened(interventions, batch, Cursor(0), observers):
            if last is None:
                self.run(tokens[None], mask, None, last_only=True)
            else:
                self.backend.run_to(last, tokens[None].to(self.device), mask)

    @torch.no_grad()
    def prefill(
        self,
        prompts: PromptLike,
        interventions: Sequence[Intervention] = (),
        *,
        hold_last: bool = False,
        keep: Collection[int] = (),
    ) -> Prefix:
        """Run prompts once; the result can be extended and generated from any number of times.

        With ``hold_last`` every token but the last of each prompt is run. The last token's row produces the first
        response token, so interventions on the response begin there: held back, it is run under each setting of a
        sweep in turn, over keys and values that all settings share. ``keep`` names layers whose input is kept:
        :meth:`rerun` may start at these.

        Raises:
            ValueError: If a prompt does not fit the context, or ``keep`` names a layer that the model lacks.
        """
        batch = self.batch(prompts)
        self.require_room(batch.width)
        cache, mask, tokens = self.backend.new_cache(len(batch)), batch.mask(), batch.tokens(self.pad_token)
        if hold_last:
            mask, tokens = mask[:, :-1], tokens[:, :-1]
        beyond = [layer for layer in keep if not 0 <= layer < self.shape.n_layers]
        if beyond:
            raise ValueError(f"keep names layer {beyond[0]}; the model has layers 0 to {self.shape.n_layers - 1}")
        residuals: dict[int, Tensor] = {}
        # Interventions on the response alone begin with the last prompt token and need no other row of the prompt.
        acting = on_prompt(interventions) if hold_last else interventions
        logits = None
        if tokens.shape[1]:
            layers = keep if isinstance(cache, KeyValueCache) else ()
            with self.intervened(acting, batch, Cursor(0)), self._kept_inputs(layers, residuals):
                if hold_last:
                    self.backend.fill(tokens.to(self.device), mask, cache)
                else:
                    logits = self.run(tokens, mask, cache, last_only=True)[:, -1]
        return Prefix(batch, cache, mask, logits, tuple(interventions), residuals)

    @contextmanager
    def _kept_inputs(self, layers: Collection[int], residuals: dict[int, Tensor]) -> Generator[None]:
        """Keep the input of some layers as it is before any hook: hooks act when the layer is run again."""

        def keeper(layer: int) -> Any:
            def keep(point: Any, arguments: tuple[Tensor, ...]) -> None:
                residuals[layer] = arguments[0]

            return keep

        handles = [self.backend.residual_point(layer).register_forward_pre_hook(keeper(layer)) for layer in layers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def rerun(self, prefix: Prefix, interventions: Sequence[Intervention], *, copies: int = 1) -> Prefix:
        """Run a prefix's prompts again under interventions that change them, each prompt ``copies`` times in a row.

        Layers below the first layer that the interventions touch are taken from the prefix and not computed again,
        where the prefix kept that layer's input.

        Raises:
            ValueError: If the prefix was run under interventions, or does not hold its last token back.
        """
        if prefix.logits is not None or prefix.under:
            raise ValueError(
                "only a prefix that was run without interventions and holds its last token back can be run again"
            )
        batch = prefix.batch.repeated(copies)
        first = first_layer(self, interventions, batch)
        if first == self.shape.n_layers:
            return replace(self.copies(prefix, copies), under=tuple(interventions))
        residual = prefix.residuals.get(first)
        if residual is None or not isinstance(prefix.cache, KeyValueCache):
            return self.prefill(batch, interventions, hold_last=True)
        cache, mask = prefix.cache.below(first, copies), prefix.mask.repeat_interleave(copies, dim=0)
        with self.intervened(on_prompt(interventions), batch, Cursor(0)):
            self.backend.run_from(first, residual.repeat_interleave(copies, dim=0), mask, cache)
        return Prefix(batch, cache, mask, None, tuple(interventions))

    def copies(self, prefix: Prefix, n: int) -> Prefix:
        """A prefix in which every prompt stands ``n`` times in a row, over the keys and values of the one given."""
        logits = None if prefix.logits is None else prefix.logits.repeat_interleave(n, dim=0)
        cache, mask = self.backend.fork(prefix.cache, n), prefix.mask.repeat_interleave(n, dim=0)
        return Prefix(prefix.batch.repeated(n), cache, mask, logits, prefix.under)

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
        """Run further tokens after a prefix, which stays as it is; logits of each, and the longer prefix.

        Args:
            prefix: The prompts. A last token that was held back is run first, under the interventions and unobserved.
            tokens: One row per prompt.
            interventions: Applied in order.
            observers: Plain hooks that see activations as the interventions leave them.
            mask: 0 behind the end of a row that is shorter than the others.

        Raises:
            ValueError: If the tokens do not fit the context or are not one row per prompt, an intervention should have
                acted on the prefix and did not, or a hook point does not fire.
        """
        new = torch.ones_like(tokens.cpu()) if mask is None else mask.cpu().long()
        if len(tokens) != len(prefix.batch) or new.shape != tokens.shape or not tokens.shape[1]:
            raise ValueError(
                f"tokens have the shape {tuple(tokens.shape)} and their mask {tuple(new.shape)}; for a prefix of "
                f"{len(prefix.batch)} prompt(s) both must be ({len(prefix.batch)}, new), with at least one new token"
            )
        self.points.require_firing(name for name, _ in observers)
        prefix = self._completed(prefix, interventions)
        start, columns = prefix.mask.shape[1], torch.cat((prefix.mask, new), dim=1)
        self.require_room(int(columns.sum(dim=1).max()))
        cache = self.backend.fork(prefix.cache)
        with self.intervened(interventions, prefix.batch, Cursor(start), observers):
            logits = self.run(tokens, columns, cache, last_only=False)
        # The next token follows each row's last token, not the padding behind it.
        last = (new * torch.arange(1, new.shape[1] + 1)).argmax(dim=1).to(logits.device)
        newest = logits[torch.arange(len(logits), device=logits.device), last]
        if prefix.logits is not None:
            newest = torch.where(new.any(dim=1, keepdim=True).to(logits.device), newest, prefix.logits)
        return logits, Prefix(prefix.batch, cache, columns, newest, prefix.under)

    def _completed(self, prefix: Prefix, interventions: Sequence[Intervention]) -> Prefix:
        """A prefix whose last token, if it was held back, has been run under the interventions."""
        prefix.require_run_under([item for item in interventions if item.changes_prompt])
        if prefix.logits is not None:
            return prefix
        last, cache = prefix.batch.tokens(self.pad_token)[:, -1:], self.backend.fork(prefix.cache)
        cursor, mask = Cursor(prefix.mask.shape[1]), torch.cat((prefix.mask, torch.ones_like(last)), dim=1)
        with self.intervened(interventions, prefix.batch, cursor):
            logits = self.run(last, mask, cache, last_only=True)[:, -1]
        return Prefix(prefix.batch, cache, mask, logits, tuple(interventions))

    @torch.no_grad()
    def decode(
        self,
        prefix: Prefix,
        interventions: Sequence[Intervention] = (),
        *,
        max_new_tokens: int = 100,
        observers: Sequence[Hook] = (),
        repetition_penalty: float = 1.0,
        stop_tokens: Sequence[int] | None = None,
    ) -> list[Generation]:
        """Greedy responses that follow a prefix, which stays as it is.

        Args:
            prefix: The prompts.
            interventions: Applied in order.
            max_new_tokens: Most tokens per response; a response also ends where the context does.
            observers: Plain hooks that see activations as the interventions leave them, in passes of one row per
                prompt: the prompt's last token where it was held back, then every token of the responses.
            repetition_penalty: That of Hugging Face's generation configs; 1 for none.
            stop_tokens: Tokens that end a response; by default the model's.

        Raises:
            ValueError: If an intervention changes the prompt's rows and the prefix, which holds its last token back,
                was run without it, or a hook point does not fire.
        """
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
        self.points.require_firing(name for name, _ in observers)
        prefix.require_run_under(interventions)
        penalised = repetition_penalised(prefix.batch, repetition_penalty)
        stop_tokens = self.stop_tokens if stop_tokens is None else stop_tokens
        # Each prompt has the room it would have alone: padding takes none of the context. A token held back takes one.
        taken = prefix.mask.sum(dim=1) + (prefix.logits is None)
        limits = (self.shape.n_ctx - taken).clamp(min=0, max=max_new_tokens)
        cursor, cache, mask, logits = Cursor(), self.backend.fork(prefix.cache), prefix.mask, prefix.logits
        stops = torch.tensor(stop_tokens, dtype=torch.long)
        newest, chosen = prefix.batch.tokens(self.pad_token)[:, -1], list[Tensor]()
        # Responses that go on, and responses to which the newest token belongs; any other row is run as padding.
        pending = running = limits > 0
        with self.intervened(interventions, prefix.batch, cursor, observers):
            while pending.any() or (observers and running.any()):
                if logits is None:
                    cursor.start = mask.shape[1]
                    mask = torch.cat((mask, running.long()[:, None]), dim=1)
                    logits = self.run(newest[:, None], mask, cache, last_only=True)[:, -1]
                newest, logits = penalised(logits, chosen).argmax(dim=-1).cpu(), None
                if pending.any():
                    chosen.append(newest)
                running = pending & ~torch.isin(newest, stops)
                pending = running & (len(chosen) < limits)
        rows = torch.stack(chosen, dim=1).tolist() if chosen else [[] for _ in prefix.batch.prompts]
        return [self._generation(row[:limit], stop_tokens) for row, limit in zip(rows, limits.tolist(), strict=True)]

    def _generation(self, ids: list[int], stop_tokens: Sequence[int]) -> Generation:
        """A response's tokens up to the first stop token, and their text."""
        end = next((i for i, token in enumerate(ids) if token in stop_tokens), None)
        text = cast("str", self.tokenizer.decode(ids[:end], skip_special_tokens=True))
        tokens: Int[Tensor, "response"] = torch.tensor(ids[:end], dtype=torch.long)
        return Generation(text.strip(), tokens, end is not None, None if end is None else ids[end])

    @property
    def pad_token(self) -> int:
        """The token that fills padded columns."""
        # Padding is masked out, so any token will do; the embedding needs a valid one.
        return 0 if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id

    def require_room(self, length: int) -> None:
        """Refuse more tokens than the model's context has room for.

        Raises:
            ValueError: If there are more.
        """
        if length > self.shape.n_ctx:
            raise ValueError(
                f"{length} tokens do not fit the model's context of {self.shape.n_ctx}; "
                "shorten the prompt, or load the model with a larger n_ctx"
            )


def first_layer(model: ModelRunner, interventions: Sequence[Intervention], batch: PromptBatch) -> int:
    """The first layer whose prompt rows interventions change.

    -1 where an intervention acts outside the layers, such as on the embedding; the number of layers where none acts.
    """
    hooks = [hook for item in on_prompt(interventions) for hook in item.hooks(model, batch, cursor=Cursor(0))]
    layers = [layer_of(name) for name, _ in hooks]
    return min((-1 if layer is None else layer for layer in layers), default=model.shape.n_layers)
