"""FocusModel: tokenise, prefill, extend and generate over a TransformerLens model, under interventions."""

from __future__ import annotations

import logging
from collections.abc import Collection, Generator, Mapping, Sequence
from contextlib import contextmanager
from threading import RLock
from typing import Any, Literal, overload
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor

from focuslens.hooks import Cursor, Hook, Intervention, PromptLike, last_layer
from focuslens.model import loading
from focuslens.model.backends import Backend, ModelShape, backend_for, describe
from focuslens.model.decoding import decode, extend
from focuslens.model.hook_points import HookPoints
from focuslens.model.load_errors import told_errors
from focuslens.model.prefilling import copies, prefill, rerun
from focuslens.prompts.batch import EncodedPrompt, Generation, Prefix, PromptBatch
from focuslens.prompts.encoder import PromptEncoder

__all__ = ["FocusModel"]

_LOG = logging.getLogger(__name__)

_turns: WeakKeyDictionary[Any, RLock] = WeakKeyDictionary()
"""Whose turn it is on each TransformerLens model."""


class FocusModel:
    """A TransformerLens model that takes prompts with parts, and interventions.

    Args:
        hooked: A ``HookedTransformer`` or ``TransformerBridge``. It is used as it is, and never changed.
        tokenizer: The checkpoint's own fast tokenizer. By default the model's; where TransformerLens has told it to
            prepend a BOS that the original does not, the original, if it lies on this machine.
        chat: Whether prompts are put into the tokenizer's chat template; by default, if it has one. Some base models
            ship a chat template: pass ``False`` for those.
        chat_template_kwargs: Further arguments of the chat template, e.g. ``{"date_string": "26 Jul 2024"}``.
        stop_tokens: Tokens that end a response; by default the tokenizer's EOS.
        name: What result files call the model.
        revision: Branch, tag or commit that result files name.

    Raises:
        TypeError: If ``hooked`` is no TransformerLens model.
        ValueError: If there is no tokenizer, or ``chat`` is true without a chat template.
    """

    def __init__(
        self,
        hooked: Any,
        tokenizer: Any | None = None,
        *,
        chat: bool | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        stop_tokens: Sequence[int] | None = None,
        name: str | None = None,
        revision: str | None = None,
    ) -> None:
        self.backend: Backend = backend_for(hooked)
        self.tokenizer: Any = loading.original_tokenizer(hooked.tokenizer) if tokenizer is None else tokenizer
        if self.tokenizer is None:
            raise ValueError("the model has no tokenizer; pass one: FocusModel(hooked, tokenizer=...)")
        if chat is None:
            chat = bool(getattr(self.tokenizer, "chat_template", None))
        self.encoder = PromptEncoder(self.tokenizer, chat, dict(chat_template_kwargs or {}))
        if stop_tokens is None:
            stop_tokens = () if self.tokenizer.eos_token_id is None else (self.tokenizer.eos_token_id,)
        self.stop_tokens = tuple(stop_tokens)
        self.points = HookPoints(self.backend)
        self.name = name or str(getattr(hooked.cfg, "model_name", "model"))
        self.revision = revision

    @classmethod
    def from_pretrained(
        cls,
        name: str,
        *,
        device: str | None = None,
        device_map: loading.DeviceMap | None = None,
        dtype: str | torch.dtype = "float32",
        backend: Literal["hooked", "bridge"] | None = None,
        n_ctx: int | None = None,
        revision: str | None = None,
        chat: bool | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> FocusModel:
        """Open a model of the Hugging Face hub, or a local directory in its format, without processing weights.

        Args:
            name: Hub name or directory, or ``demo`` for the embedded model.
            device: ``cuda`` where there is one, else ``cpu``.
            device_map: In place of ``device``, for a model that does not fit one: ``"auto"``, or Hugging Face's map of
                modules to devices. The backend is then ``bridge``.
            dtype: Of the weights, e.g. ``"bfloat16"``.
            backend: ``hooked`` (a ``HookedTransformer``: Llama, Mistral, Qwen2 and Qwen3 families, TransformerLens 3)
                or ``bridge`` (a ``TransformerBridge``: whatever it boots). By default ``hooked`` where it can be had.
            n_ctx: Context length in tokens; by default all that the checkpoint declares.
            revision: Branch, tag or commit on the hub.
            chat: As in :class:`FocusModel`.
            chat_template_kwargs: As in :class:`FocusModel`.

        Raises:
            FileNotFoundError: If there is no such checkpoint here or on the hub, or the hub cannot be reached.
            PermissionError: If access to the model has to be granted.
            ValueError: If the checkpoint cannot be opened in the way asked for; the message says what would work.
        """
        resolved = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
        if not isinstance(resolved, torch.dtype):
            raise ValueError(
                f"dtype is {dtype!r}; it must be the name of a torch dtype, such as 'float32' or 'bfloat16'"
            )
        if device_map is None:
            device = loading.checked_device(device)
        elif device is not None:
            raise ValueError(f"device is {device!r} and device_map {device_map!r}; give one of them")
        # One directory has one name, wherever it is opened from.
        source = loading.checkpoint_source(name)
        tokenizer = loading.load_tokenizer(source, revision)
        load = loading.loader(source, backend, revision, device_map)
        _LOG.info("loading %s in %s on %s", source, str(resolved).removeprefix("torch."), device_map or device)
        with told_errors(source, revision):
            hooked = load(source, tokenizer, device=device, dtype=resolved, n_ctx=n_ctx, revision=revision)
        return cls(
            hooked,
            tokenizer,
            chat=chat,
            chat_template_kwargs=chat_template_kwargs,
            stop_tokens=loading.stop_ids(source, tokenizer, revision),
            name=name if name == loading.DEMO else source,
            revision=revision or loading.resolved_revision(source),
        )

    @classmethod
    def demo(cls, **settings: Any) -> FocusModel:
        """The embedded model: a small Llama trained on the synthetic corpus. Needs no network.

        Settings are those of :meth:`from_pretrained`, such as ``device``, ``dtype`` and ``backend``.
        """
        return cls.from_pretrained(loading.DEMO, **settings)

    def __repr__(self) -> str:
        shape, cfg = self.shape, self.hooked.cfg
        return (
            f"FocusModel({self.name!r}: {type(self.hooked).__name__}, {shape.n_layers} layers x {shape.n_heads} heads, "
            f"d_head {shape.d_head}, {str(cfg.dtype).removeprefix('torch.')} on {self.backend.device.type})"
        )

    @property
    def hooked(self) -> Any:
        """The TransformerLens model."""
        return self.backend.hooked

    @property
    def shape(self) -> ModelShape:
        """Layers, heads and sizes."""
        return self.backend.shape

    @property
    def description(self) -> dict[str, Any]:
        """What result files say of the model."""
        prompts = {"chat": self.encoder.chat, "chat_template_kwargs": dict(self.encoder.template_kwargs)}
        return {
            "name": self.name,
            "revision": self.revision,
            **prompts,
            "prompt_format": self.encoder.digest,
            "stop_tokens": list(self.stop_tokens),
            **describe(self.backend),
        }

    def encode(self, prompt: str | EncodedPrompt) -> EncodedPrompt:
        """A prompt's tokens, exactly as the model's own tokenizer gives them, and its parts as token ranges."""
        return prompt if isinstance(prompt, EncodedPrompt) else self.encoder.encode(prompt)

    def to_tokens(self, prompt: str | EncodedPrompt) -> Int[Tensor, "1 pos"]:
        """A prompt's tokens as a batch of one, ready for ``model.hooked``; :meth:`encode` gives the parts too."""
        return self.encode(prompt).tokens[None].to(self.backend.device)

    def batch(self, prompts: PromptLike) -> PromptBatch:
        """One prompt or several as a left-padded batch."""
        if isinstance(prompts, PromptBatch):
            return prompts
        many = [prompts] if isinstance(prompts, str | EncodedPrompt) else prompts
        return PromptBatch.of([self.encode(prompt) for prompt in many])

    @contextmanager
    def intervened(
        self,
        interventions: Sequence[Intervention],
        prompt: PromptLike | None,
        cursor: Cursor | None = None,
        observers: Sequence[Hook] = (),
    ) -> Generator[None]:
        """Run ``model.hooked`` under interventions; whatever happens inside, nothing is left behind.

        Other threads wait until it is their turn.

        Observers are further hooks, added after those of the interventions.
        """
        # Hooks are on the model itself: another thread's pass, or this one's, would run under the hooks of both.
        with _turns.setdefault(self.hooked, RLock()):
            hooks = [hook for one in interventions for hook in one.hooks(self, prompt, cursor=cursor)]
            self.points.require_acting(name for name, _ in hooks)
            with self.hooked.hooks(fwd_hooks=[*hooks, *observers]):
                yield

    @torch.no_grad()
    def logits(
        self,
        tokens: Int[Tensor, "*batch pos"] | Sequence[int] | str | EncodedPrompt,
        interventions: Sequence[Intervention] = (),
        *,
        prompt: str | EncodedPrompt | None = None,
    ) -> Float[Tensor, "pos d_vocab"]:
        """Logits at every position, in one pass without a cache.

        Args:
            tokens: Token ids, or a prompt.
            interventions: Applied in order.
            prompt: The prompt that ``tokens`` begin with, where a response follows it: it has the parts, and its last
                token's row is the first that produces the response. By default all of ``tokens`` is the prompt.

        Raises:
            ValueError: If ``tokens`` do not begin with the prompt's, or do not fit the context.
        """
        if isinstance(tokens, str | EncodedPrompt):
            ids, prompt = self.encode(tokens).tokens, tokens if prompt is None else prompt
        else:
            ids = torch.as_tensor(tokens, dtype=torch.long).cpu()
            if ids.ndim == 2 and len(ids) == 1:
                ids = ids[0]
            if ids.ndim != 1:
                raise ValueError(f"tokens have the shape {tuple(ids.shape)}; give one sequence, [pos] or [1, pos]")
        encoded = EncodedPrompt(ids, {}) if prompt is None else self.encode(prompt)
        if not torch.equal(ids[: len(encoded.tokens)], encoded.tokens):
            raise ValueError("tokens do not begin with the tokens of the prompt")
        self.require_room(len(ids))
        batch = PromptBatch.of([encoded])
        with self.intervened(interventions, batch, Cursor(0)):
            mask = torch.ones(1, len(ids), dtype=torch.long)
            return self.run(ids[None], mask, None, last_only=False)[0]

    @torch.no_grad()
    def observe(
        self,
        tokens: Int[Tensor, "pos"],
        observers: Sequence[Hook],
        interventions: Sequence[Intervention] = (),
        *,
        prompt: EncodedPrompt | None = None,
    ) -> None:
        """Run the model once on given tokens, for what plain hooks see of it, and no further than they look.

        The prompt is what ``tokens`` begin with; interventions may need it.

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
                self.backend.run_to(last, tokens[None].to(self.backend.device), mask)

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
        sweep in turn, over keys and values that all settings share. ``keep`` names layers from which :meth:`rerun` may
        go on: their input is kept.

        Raises:
            ValueError: If a prompt does not fit the context.
        """
        batch = self.batch(prompts)
        self.require_room(batch.width)
        return prefill(self, batch, interventions, hold_last=hold_last, keep=keep)

    def rerun(self, prefix: Prefix, interventions: Sequence[Intervention], *, copies: int = 1) -> Prefix:
        """Run a prefix's prompts again under interventions that change them, each prompt ``copies`` times in a row.

        What lies below the first layer that the interventions touch is taken over, where the prefix kept that layer's
        input, and not computed again.

        Raises:
            ValueError: If the prefix was run under interventions, or does not hold its last token back.
        """
        return rerun(self, prefix, interventions, copies)

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

        ``observers`` are plain hooks that see what the interventions made; ``mask`` is 0 behind the end of a row that
        is shorter than the others.

        A last token that was held back is run first, under the interventions and unobserved.

        Raises:
            ValueError: If the tokens do not fit the context or are not one row a prompt, an intervention should have
                acted on the prefix and did not, or a hook point does not fire.
        """
        return extend(self, prefix, tokens, interventions, observers, mask)

    def copies(self, prefix: Prefix, n: int) -> Prefix:
        """A prefix in which every prompt stands ``n`` times in a row, over the keys and values of the one given."""
        return copies(self, prefix, n)

    @overload
    def generate(
        self, prompts: str | EncodedPrompt, interventions: Sequence[Intervention] = ..., *, max_new_tokens: int = ...
    ) -> Generation: ...
    @overload
    def generate(
        self,
        prompts: Sequence[str] | Sequence[EncodedPrompt],
        interventions: Sequence[Intervention] = ...,
        *,
        max_new_tokens: int = ...,
    ) -> list[Generation]: ...
    def generate(
        self,
        prompts: str | EncodedPrompt | Sequence[str] | Sequence[EncodedPrompt],
        interventions: Sequence[Intervention] = (),
        *,
        max_new_tokens: int = 100,
    ) -> Generation | list[Generation]:
        """Greedy responses: one for a prompt, a list for a list, which is run as one left-padded batch.

        Args:
            prompts: Put into the model's chat template if it has one.
            interventions: Applied in order.
            max_new_tokens: At most so many tokens a response; it also ends where the context does.

        Raises:
            ValueError: If a prompt does not fit the context.
        """
        # Held back whatever the interventions are, the last token is computed in one way under all of them.
        prefix = self.prefill(prompts, interventions, hold_last=True)
        responses = self.decode(prefix, interventions, max_new_tokens=max_new_tokens)
        return responses[0] if isinstance(prompts, str | EncodedPrompt) else responses

    def decode(
        self,
        prefix: Prefix,
        interventions: Sequence[Intervention] = (),
        *,
        max_new_tokens: int = 100,
        observers: Sequence[Hook] = (),
        repetition_penalty: float = 1.0,
    ) -> list[Generation]:
        """Greedy responses that follow a prefix, which stays as it is.

        ``observers`` are plain hooks that see what the interventions made, in passes of one row a prompt: the prompt's
        last token where it was held back, then every token of the responses. ``repetition_penalty`` is that of Hugging
        Face's generation configs.

        Raises:
            ValueError: If an intervention changes the prompt's rows and the prefix, which holds its last token back,
                was run without it, or a hook point does not fire.
        """
        self.points.require_firing(name for name, _ in observers)
        return decode(self, prefix, interventions, max_new_tokens, observers, repetition_penalty)

    def run(
        self, tokens: Int[Tensor, "batch row"], mask: Int[Tensor, "batch column"], cache: Any | None, *, last_only: bool
    ) -> Float[Tensor, "batch logit_row d_vocab"]:
        """One pass of the model as it stands, hooks included; ``cache``, if there is one, grows.

        Gives logits of every row, or of the last alone. ``mask`` is 1 where a column, of the cache or of these rows,
        holds a token, and 0 where it is padding.
        """
        return self.backend.forward(tokens.to(self.backend.device), mask, cache, last_only=last_only)

    @property
    def pad_token(self) -> int:
        """The token that padding is made of."""
        # It is masked out, so any token will do; a valid one is needed for the embedding.
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
