"""Forward passes, prompt prefixes and greedy decoding with a TransformerLens model under interventions."""

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
from focuslens.model.generation import Generation, Penalty, Prefix, Responses, repetition_penalised
from focuslens.model.hook_points import HookPoints
from focuslens.prompts.batch import EncodedPrompt, PromptBatch

__all__ = ["ModelRunner", "first_layer"]

_locks: WeakKeyDictionary[Any, RLock] = WeakKeyDictionary()
"""One lock per TransformerLens model, so that a pass does not run under hooks that other threads have set."""


class ModelRunner(ABC):
    """Forward passes, prompt prefixes and greedy decoding with a TransformerLens model under interventions.

    Attributes:
        backend: Interface to the TransformerLens model.
        tokenizer: Tokenizer of the checkpoint.
        stop_tokens: Tokens that end a response.
        points: Verifier of the model's hook points; see :class:`HookPoints`.
    """

    def __init__(self, backend: Backend, tokenizer: Any, stop_tokens: Sequence[int]) -> None:
        self.backend = backend
        self.tokenizer: Any = tokenizer
        self.stop_tokens = tuple(stop_tokens)
        self.points = HookPoints(backend)

    @abstractmethod
    def encode(self, prompt: str | EncodedPrompt) -> EncodedPrompt:
        """Tokens of a prompt, and the prompt's spans as token ranges."""

    @property
    def hooked(self) -> Any:
        """The TransformerLens model."""
        return self.backend.hooked

    @property
    def shape(self) -> ModelShape:
        """Sizes of the model, such as the number of layers and the number of heads."""
        return self.backend.shape

    @property
    def device(self) -> torch.device:
        """Device of the model's weights."""
        return self.backend.device

    def batch(self, prompts: PromptLike) -> PromptBatch:
        """Left-padded batch of one or more prompts."""
        if isinstance(prompts, PromptBatch):
            return prompts
        sequence = [prompts] if isinstance(prompts, str | EncodedPrompt) else prompts
        return PromptBatch.of([self.encode(prompt) for prompt in sequence])

    def require_acting(self, names: Iterable[str]) -> None:
        """Check that hooks on the named hook points can change the logits; see :meth:`HookPoints.require_acting`."""
        self.points.require_acting(names)

    def cache_window(self, layer: int) -> int | None:
        """Maximum number of keys that TransformerLens's cache keeps in a layer; ``None`` for no limit."""
        return self.backend.window(layer) if self.backend.is_bridge else None

    @contextmanager
    def intervened(
        self,
        interventions: Sequence[Intervention],
        prompt: PromptLike | None,
        cursor: Cursor | None = None,
        observers: Sequence[Hook] = (),
    ) -> Generator[None]:
        """Set the hooks of interventions on :attr:`hooked` for the duration of a ``with`` block.

        Only one thread at a time can be inside such a block. Observers are plain hooks, which run after the hooks of
        the interventions.
        """
        # Hooks are set on the model itself. Without the lock, a pass would also run under the hooks of other threads.
        with _locks.setdefault(self.hooked, RLock()):
            hooks = [hook for item in interventions for hook in item.hooks(self, prompt, cursor=cursor)]
            self.require_acting(name for name, _ in hooks)
            with self.hooked.hooks(fwd_hooks=[*hooks, *observers]):
                yield

    def run(
        self, tokens: Int[Tensor, "batch row"], mask: Int[Tensor, "batch column"], cache: Any | None, *, last_only: bool
    ) -> Float[Tensor, "batch logit_row d_vocab"]:
        """Logits of one forward pass under the hooks that are currently set.

        Args:
            tokens: Tokens of the rows in this pass.
            mask: Attention mask of the columns in the cache and of the new rows: 1 for a token, 0 for padding.
            cache: Key-value cache of earlier columns, to which the pass appends the new keys and values; ``None`` for a
                pass without a cache.
            last_only: Whether to return only the logits of the last row.
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
        """Run one forward pass with observers, up to the last layer that has an observer.

        Args:
            tokens: Token ids.
            observers: Plain hooks, which run after the hooks of the interventions.
            interventions: Interventions, applied in order.
            prompt: Prompt at the beginning of ``tokens``. Some interventions need the prompt.

        Raises:
            ValueError: If the tokens do not fit the context, or if a hook point does not exist or never fires.
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
        """Run prompts once, and return a prefix for any number of calls of :meth:`extend` and :meth:`decode`.

        The row of a prompt's last token produces the first response token. Interventions on the response therefore
        begin at this row. If the last token is held back, each setting of a sweep can run this row under different
        interventions. All settings share the keys and values of the other rows.

        Args:
            prompts: One prompt, or several prompts that form a batch.
            interventions: Interventions, applied in order.
            hold_last: Whether to hold back the last token of each prompt, which later calls then run.
            keep: Layers whose inputs are stored in the prefix. :meth:`rerun` can start at any of these layers.

        Raises:
            ValueError: If a prompt does not fit the context, or ``keep`` names a layer that does not exist.
        """
        batch = self.batch(prompts)
        self.require_room(batch.width)
        cache, mask, tokens = self.backend.new_cache(len(batch)), batch.mask(), batch.tokens(self.pad_token)
        if hold_last:
            mask, tokens = mask[:, :-1], tokens[:, :-1]
        missing = [layer for layer in keep if not 0 <= layer < self.shape.n_layers]
        if missing:
            raise ValueError(f"keep names layer {missing[0]}; the model has layers 0 to {self.shape.n_layers - 1}")
        residuals: dict[int, Tensor] = {}
        # Without the last prompt tokens, this pass has no rows that interventions on the response would change.
        acting = on_prompt(interventions) if hold_last else interventions
        logits = None
        if tokens.shape[1]:
            layers = keep if isinstance(cache, KeyValueCache) else ()
            with self.intervened(acting, batch, Cursor(0)), self._stored_inputs(layers, residuals):
                if hold_last:
                    self.backend.fill(tokens.to(self.device), mask, cache)
                else:
                    logits = self.run(tokens, mask, cache, last_only=True)[:, -1]
        return Prefix(batch, cache, mask, logits, tuple(interventions), residuals)

    @contextmanager
    def _stored_inputs(self, layers: Collection[int], residuals: dict[int, Tensor]) -> Generator[None]:
        """Store the inputs of layers in ``residuals`` for the duration of a ``with`` block.

        The inputs are stored before hooks change them, because a rerun sets hooks on the same layers again.
        """

        def storing(layer: int) -> Any:
            def store(point: Any, arguments: tuple[Tensor, ...]) -> None:
                residuals[layer] = arguments[0]

            return store

        handles = [self.backend.residual_point(layer).register_forward_pre_hook(storing(layer)) for layer in layers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def rerun(self, prefix: Prefix, interventions: Sequence[Intervention], *, copies: int = 1) -> Prefix:
        """Run the prompts of a prefix again under interventions on the prompt, with ``copies`` rows per prompt.

        If the prefix stores the input of the first layer that the interventions change, the run starts at that layer.
        The keys and values of all lower layers are taken from the prefix.

        Raises:
            ValueError: If the prefix was run under interventions or without ``hold_last``.
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
        """A new prefix with ``n`` consecutive rows per prompt.

        The new prefix shares the keys and values of ``prefix`` if :attr:`Prefix.is_shared` is true.
        """
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
        # The logits of the next token come from the last token of each row, not from the padding after it.
        last = (new * torch.arange(1, new.shape[1] + 1)).argmax(dim=1).to(logits.device)
        newest = logits[torch.arange(len(logits), device=logits.device), last]
        if prefix.logits is not None:
            newest = torch.where(new.any(dim=1, keepdim=True).to(logits.device), newest, prefix.logits)
        return logits, Prefix(prefix.batch, cache, columns, newest, prefix.under)

    def _completed(self, prefix: Prefix, interventions: Sequence[Intervention]) -> Prefix:
        """The prefix with logits. If the last prompt tokens were held back, they are run under the interventions."""
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
        """Generate greedy responses to the prompts of a prefix. The prefix itself does not change.

        Args:
            prefix: Prefix of the prompts.
            interventions: Interventions, applied in order.
            max_new_tokens: Maximum length of a response, in tokens. A response also ends when the context is full.
            observers: Plain hooks, which run after the hooks of the interventions. Each pass has one row per prompt. If
                the last prompt tokens were held back, the first pass runs them. Each later pass runs one token of every
                response.
            repetition_penalty: Repetition penalty, defined in the same way as in Hugging Face's ``GenerationConfig``; 1
                for no penalty.
            stop_tokens: Tokens that end a response; by default :attr:`stop_tokens`.

        Raises:
            ValueError: If an intervention acts on rows of the prefix that were run without it, if a hook point never
                fires, or if ``max_new_tokens`` or ``repetition_penalty`` is out of range.
        """
        self.points.require_firing(name for name, _ in observers)
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
        penalised = repetition_penalised(prefix.batch, repetition_penalty)
        prefix.require_run_under(interventions)
        stop_tokens = self.stop_tokens if stop_tokens is None else stop_tokens
        # Padding takes no room in the context. A token that was held back takes room, but is not in the mask yet.
        length = prefix.mask.sum(dim=1) + (prefix.logits is None)
        limits = (self.shape.n_ctx - length).clamp(min=0, max=max_new_tokens)
        stops, last = torch.tensor(stop_tokens, dtype=torch.long), prefix.batch.tokens(self.pad_token)[:, -1]
        responses = Responses(limits, stops, last)
        self._decode(responses, prefix, interventions, observers, penalised)
        return [self._generation(ids, stop_tokens) for ids in responses.rows()]

    def _decode(
        self,
        responses: Responses,
        prefix: Prefix,
        interventions: Sequence[Intervention],
        observers: Sequence[Hook],
        penalised: Penalty,
    ) -> None:
        """Append tokens until every response has ended. If there are observers, also run each response's last token."""
        cursor, cache, mask, logits = Cursor(), self.backend.fork(prefix.cache), prefix.mask, prefix.logits
        with self.intervened(interventions, prefix.batch, cursor, observers):
            while responses.pending.any() or (observers and responses.running.any()):
                if logits is None:
                    cursor.start = mask.shape[1]
                    mask = torch.cat((mask, responses.running.long()[:, None]), dim=1)
                    logits = self.run(responses.newest[:, None], mask, cache, last_only=True)[:, -1]
                responses.append(penalised(logits, responses.steps).argmax(dim=-1).cpu())
                logits = None

    def _generation(self, ids: list[int], stop_tokens: Sequence[int]) -> Generation:
        """Response with the tokens before the first stop token."""
        end = next((i for i, token in enumerate(ids) if token in stop_tokens), None)
        text = cast("str", self.tokenizer.decode(ids[:end], skip_special_tokens=True))
        tokens: Int[Tensor, "response"] = torch.tensor(ids[:end], dtype=torch.long)
        return Generation(text.strip(), tokens, end is not None, None if end is None else ids[end])

    @property
    def pad_token(self) -> int:
        """Token that fills padding columns."""
        # Padding is masked, which makes any token of the vocabulary suitable.
        return 0 if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id

    def require_room(self, length: int) -> None:
        """Check that ``length`` tokens fit the model's context.

        Raises:
            ValueError: If ``length`` is larger than the context length.
        """
        if length > self.shape.n_ctx:
            raise ValueError(
                f"{length} tokens do not fit the model's context of {self.shape.n_ctx}; "
                "shorten the prompt, or load the model with a larger n_ctx"
            )


def first_layer(model: ModelRunner, interventions: Sequence[Intervention], batch: PromptBatch) -> int:
    """First layer in which interventions change rows of the prompt; ``n_layers`` if none of them changes the prompt.

    The result is -1 if an intervention acts outside the layers, for example on the embedding.
    """
    hooks = [hook for item in on_prompt(interventions) for hook in item.hooks(model, batch, cursor=Cursor(0))]
    layers = [layer_of(name) for name, _ in hooks]
    return min((-1 if layer is None else layer for layer in layers), default=model.shape.n_layers)
