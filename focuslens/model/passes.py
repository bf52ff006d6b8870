"""Forward passes of a TransformerLens model under interventions."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Generator, Iterable, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeAlias, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from focuslens.heads import HeadKind, ModelShape
from focuslens.hooks import Cursor, Hook, Intervention, PromptLike, checked_interventions, last_layer
from focuslens.model.backends import Backend
from focuslens.model.decoding_settings import DecodingSettings
from focuslens.model.engine import KeyValueCache, without_dropout, without_hooks
from focuslens.model.hook_points import HookPoints, lock_of, own_passes
from focuslens.model.lean import LeanDecoder, LeanPrompts, lean_agrees, lean_plan
from focuslens.model.lean_choice import WORTH_RECORDING, divided, why_not_lean
from focuslens.model.lean_recorded import CudaGraphs, Recorder
from focuslens.model.long_prompts import layers_counted, layers_shown
from focuslens.model.running_tokens import RunningTokens
from focuslens.prompts.batch import EncodedPrompt, PromptBatch, PromptInput, is_one_prompt

__all__ = ["PassRunner", "Stepping"]

Step: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""Function from the newest tokens ``[batch 1]`` and the mask of all columns to logits ``[batch d_vocab]``."""

Stepping: TypeAlias = Callable[..., AbstractContextManager[Step]]
"""Function with the arguments of :meth:`PassRunner.stepping`."""


class PassRunner(ABC):
    """Forward passes of a TransformerLens model under interventions.

    Attributes:
        backend: Interface to the TransformerLens model.
        tokenizer: Tokenizer of the checkpoint.
        decoding: Stop tokens, stop strings and penalties of the checkpoint.
        points: Checks that the model's hook points fire, and that edits of their activations change the logits.
        lean: Whether layers without hooks of others may run from their weights.
        compile: Whether passes over the rows of a response are recorded and replayed on a GPU; see
            :mod:`focuslens.model.lean_recorded`. Results differ by rounding at most.
    """

    lean: bool = True
    compile: bool = False

    def __init__(self, backend: Backend, tokenizer: Any, decoding: DecodingSettings) -> None:
        self.backend = backend
        self.tokenizer: Any = tokenizer
        self.decoding = decoding
        self.points = HookPoints(backend)
        self._running = RunningTokens.of(backend.hooked)
        self._lean_agrees: bool | None = None
        self._reasons: set[str] = set()

    @abstractmethod
    def encode(self, prompt: PromptInput) -> EncodedPrompt:
        """Tokens of a prompt, and the prompt's spans as token ranges."""

    @property
    def hooked(self) -> Any:
        """The TransformerLens model."""
        return self.backend.hooked

    @property
    def stop_tokens(self) -> tuple[int, ...]:
        """Tokens that end a response."""
        return self.decoding.stop_tokens

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
        sequence = cast("Sequence[PromptInput]", [prompts] if is_one_prompt(prompts) else prompts)
        return PromptBatch.of([self._checked(self.encode(prompt)) for prompt in sequence])

    def _checked(self, prompt: EncodedPrompt) -> EncodedPrompt:
        """The prompt, if the model has an embedding for each of its tokens.

        Raises:
            ValueError: If it has not.
        """
        if bool(((prompt.tokens < 0) | (prompt.tokens >= self.shape.d_vocab)).any()):
            raise ValueError(
                f"the prompt has token ids from {int(prompt.tokens.min())} to {int(prompt.tokens.max())}; the model's "
                f"vocabulary has the ids 0 to {self.shape.d_vocab - 1}"
            )
        return prompt

    def require_acting(self, names: Iterable[str]) -> None:
        """Check that hooks on the named hook points can change the logits; see :meth:`HookPoints.require_acting`."""
        names = list(names)
        self.points.require_acting(names)
        self.points.require_acting_plainly(names)

    def cache_window(self, layer: int) -> int | None:
        """Maximum number of keys that TransformerLens's cache keeps in a layer; ``None`` for no limit."""
        return self.backend.window(layer) if self.backend.is_bridge else None

    @property
    def sink_layers(self) -> frozenset[int]:
        """Layers whose heads have a further logit without a value; see :class:`focuslens.HookTarget`."""
        return self.backend.sink_layers

    @property
    def slow_attention(self) -> str | None:
        """Reason why attention runs on TransformerLens's own path, which stores every pattern; ``None`` for the engine.

        A measurement of a few tokens, once per model, finds the reason.
        """
        return self.backend.slow_attention()

    @property
    def head_kinds(self) -> tuple[HeadKind, ...]:
        """Kind of the attention heads of each layer."""
        self.backend.slow_attention()  # the measurement tells more than the attributes of modules
        return tuple(self.backend.head_kind(layer) for layer in range(self.shape.n_layers))

    def require_running(self, batch: PromptBatch, start: int, n_rows: int | None) -> None:
        """Check that the pass that is running runs the tokens of ``batch``; see :class:`focuslens.HookTarget`."""
        self._running.require(batch, start, n_rows)

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

        Raises:
            TypeError: If ``interventions`` is not a sequence of interventions.
        """
        acting = checked_interventions(interventions)
        # Hooks are set on the model itself. Without the lock, a pass would also run under the hooks of other threads.
        with lock_of(self.hooked), self._hooked([*self._hooks_of(acting, prompt, cursor), *observers]):
            yield

    @contextmanager
    def stepping(
        self,
        interventions: Sequence[Intervention],
        prompt: PromptBatch,
        cursor: Cursor,
        observers: Sequence[Hook],
        cache: Any,
        limit: int,
    ) -> Generator[Step]:
        """Like :meth:`intervened`, for passes of one row per prompt. Layers without other hooks run from their weights.

        Args:
            interventions: Interventions, applied in order.
            prompt: The prompts.
            cursor: Cursor, which the caller sets before each pass.
            observers: Plain hooks, which run after the hooks of the interventions.
            cache: Keys and values of the earlier columns. It may change.
            limit: Maximum number of passes.

        Yields:
            Function from the newest tokens and the mask of all columns to the logits of the newest tokens.
        """
        with lock_of(self.hooked):
            hooks = [*self._hooks_of(interventions, prompt, cursor), *observers]
            plan = lean_plan(self.backend, hooks) if self._can_be_lean(cache) else []
            own, others = divided(hooks, plan)
            with self._hooked(others):
                if any(plan):
                    recorder = self._recorder() if limit >= WORTH_RECORDING else None
                    decoder = LeanDecoder(self.backend, plan, own, cache, limit, recorder)
                    yield lambda tokens, mask: decoder.step(tokens.to(self.device), mask)
                    self._warn_of(decoder.not_recorded)
                else:
                    self._warn_of(why_not_lean(cache, plan, self.lean, self._lean_agrees))
                    yield lambda tokens, mask: self.run(tokens, mask, cache, last_only=True)[:, -1]

    def run_prompts(
        self,
        interventions: Sequence[Intervention],
        prompt: PromptBatch,
        tokens: Int[Tensor, "batch column"],
        mask: Int[Tensor, "batch column"],
        cache: Any,
        *,
        logits: bool = False,
        keep: Collection[int] = (),
    ) -> tuple[Float[Tensor, "batch d_vocab"] | None, dict[int, Tensor]]:
        """Fill an empty cache with the keys and values of prompts.

        Args:
            interventions: Interventions, applied in order.
            prompt: The prompts.
            tokens: Tokens of the prompts, with or without the last one.
            mask: Attention mask of the tokens.
            cache: Cache without columns.
            logits: Whether the logits of the last token are needed.
            keep: Layers whose inputs are returned.

        Returns:
            The logits, and the inputs of layers, before hooks change them.
        """
        stored: dict[int, Tensor] = {}
        with lock_of(self.hooked), layers_shown(tokens, self.shape.n_layers) as reach:
            hooks = self._hooks_of(interventions, prompt, Cursor(0))
            plan = lean_plan(self.backend, hooks, prompts=True) if self._can_be_lean(cache) else []
            own, others = divided(hooks, plan)
            with self._hooked(others):
                if any(plan):
                    prompts = LeanPrompts(self.backend, plan, own, cache, mask, held=0 if logits else 1)
                    residual = self.backend.embed(tokens.to(self.device))
                    return prompts.run(residual, keep=keep, logits=logits, reach=reach)
                # Rows of other caches cannot be run from a layer on.
                kept = keep if isinstance(cache, KeyValueCache) else ()
                with layers_counted(self.backend, reach), self._stored_inputs(kept, stored):
                    if logits:
                        return self.run(tokens, mask, cache, last_only=True)[:, -1], stored
                    self.backend.fill(tokens.to(self.device), mask, cache)
        return None, stored

    def run_prompts_from(
        self,
        layer: int,
        residual: Float[Tensor, "batch column d_model"],
        interventions: Sequence[Intervention],
        prompt: PromptBatch,
        mask: Int[Tensor, "batch column"],
        cache: KeyValueCache,
    ) -> None:
        """Fill the part of a cache from ``layer`` on, which has the input ``residual``."""
        with lock_of(self.hooked), layers_shown(residual, self.shape.n_layers - layer) as reach:
            hooks = self._hooks_of(interventions, prompt, Cursor(0))
            plan = lean_plan(self.backend, hooks, prompts=True) if self._can_be_lean(cache) else []
            own, others = divided(hooks, plan)
            with self._hooked(others):
                if any(plan[layer:]):
                    prompts = LeanPrompts(self.backend, plan, own, cache, mask, held=1)
                    prompts.run(residual, first=layer, reach=lambda reached: reach(reached - layer))
                else:
                    cache.append_attention_mask(mask)
                    layers = range(layer, self.shape.n_layers)
                    self.backend.run_layers(layers, residual, mask, cache, to_keys=True, held=1)

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

    def _can_be_lean(self, cache: Any) -> bool:
        if not self.lean or not isinstance(cache, KeyValueCache):
            return False
        if self._lean_agrees is None:
            with without_hooks(self.hooked), without_dropout(self.hooked):
                self._lean_agrees = lean_agrees(self.backend)
        return bool(self._lean_agrees)

    def _recorder(self) -> Recorder | None:
        """Way to record passes; ``None`` if the user does not want it, or the device has none."""
        if self.compile and self.device.type == "cuda":
            return CudaGraphs(self.device)
        self._warn_of(f"the model is on {self.device.type}, and passes are recorded on CUDA only")
        return None

    def _warn_of(self, reason: str | None) -> None:
        """Warn once that passes are not recorded although the user wants it."""
        if self.compile and reason is not None and reason not in self._reasons:
            self._reasons.add(reason)
            warnings.warn(f"compile=True: passes are not recorded: {reason}", stacklevel=2)

    def _hooks_of(
        self, interventions: Sequence[Intervention], prompt: PromptLike | None, cursor: Cursor | None
    ) -> list[Hook]:
        with own_passes():
            hooks = [hook for item in interventions for hook in item.hooks(self, prompt, cursor=cursor)]
            self.require_acting(name for name, _ in hooks)
        return hooks

    @contextmanager
    def _hooked(self, hooks: Sequence[Hook]) -> Generator[None]:
        """Set hooks on the model for the duration of a ``with`` block."""
        # Passes can end before the unembedding, where tokens are forgotten, or begin after the embedding.
        self._running.forget()
        try:
            with without_dropout(self.hooked), self.hooked.hooks(fwd_hooks=list(hooks)) if hooks else nullcontext():
                yield
        finally:
            self._running.forget()

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

    def run_to(
        self, last: int, tokens: Int[Tensor, "batch row"], mask: Int[Tensor, "batch column"], cache: Any
    ) -> None:
        """Run rows over a cache, up to the layer ``last``, under the hooks that are currently set. The cache grows."""
        if isinstance(cache, KeyValueCache):
            cache.append_attention_mask(mask[:, -tokens.shape[1] :].long())
            self.backend.run_layers(range(last + 1), self.backend.embed(tokens.to(self.device)), mask, cache)
        else:
            self.run(tokens, mask, cache, last_only=True)

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
            TypeError: If ``interventions`` is not a sequence of interventions.
        """
        interventions = checked_interventions(interventions)
        self.require_room(len(tokens))
        self.points.require_firing(name for name, _ in observers)
        batch = None if prompt is None else PromptBatch.of([prompt])
        mask, last = torch.ones(1, len(tokens), dtype=torch.long), last_layer(name for name, _ in observers)
        n_layers = self.shape.n_layers if last is None else last + 1
        acting = self.intervened(interventions, batch, Cursor(0), observers)
        with acting, layers_shown(tokens[None], n_layers) as reach, layers_counted(self.backend, reach):
            if last is None:
                self.run(tokens[None], mask, None, last_only=True)
            else:
                self.backend.run_to(last, tokens[None].to(self.device), mask)

    @property
    def pad_token(self) -> int:
        """Token that fills padding columns."""
        # Padding is masked, which makes any token suitable that has an embedding. Tokenizers can have a padding token
        # that was added without one.
        token = self.tokenizer.pad_token_id
        return 0 if token is None or not 0 <= token < self.shape.d_vocab else token

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
