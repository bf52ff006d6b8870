"""FocusModel: a TransformerLens model that accepts prompts with named spans, and interventions."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from typing import Any, Literal, TypeVar, overload

import torch
from jaxtyping import Float, Int
from torch import Tensor

from focuslens.hooks import Cursor, Intervention
from focuslens.model import loading
from focuslens.model.backends import backend_for, describe
from focuslens.model.generation import Generation
from focuslens.model.load_errors import explained_errors
from focuslens.model.runner import ModelRunner
from focuslens.prompts.batch import EncodedPrompt, PromptBatch
from focuslens.prompts.encoder import PromptEncoder

__all__ = ["FocusModel"]

_LOG = logging.getLogger(__name__)

_R = TypeVar("_R")


class FocusModel(ModelRunner):
    """A TransformerLens model that accepts prompts with named spans, and interventions.

    Args:
        hooked: A ``HookedTransformer`` or ``TransformerBridge``. The values of its weights stay unchanged.
        tokenizer: The checkpoint's own fast tokenizer. The default is the tokenizer of ``hooked``. If TransformerLens
            has made that tokenizer prepend a BOS token, the default is the original tokenizer from the local cache.
        chat: Whether prompts are put into the tokenizer's chat template. The default is true if the tokenizer has a
            template. Some base models ship a chat template: pass ``False`` for these models.
        chat_template_kwargs: Further arguments of the chat template, e.g. ``{"date_string": "26 Jul 2024"}``.
        stop_tokens: Tokens that end a response; by default the tokenizer's EOS token.
        name: Name of the model in result files.
        revision: Branch, tag or commit of the checkpoint, for result files.

    Raises:
        TypeError: If ``hooked`` is not a TransformerLens model.
        ValueError: If there is no tokenizer, or ``chat`` is true and the tokenizer has no chat template.
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
        backend = backend_for(hooked)
        tokenizer = loading.original_tokenizer(hooked.tokenizer) if tokenizer is None else tokenizer
        if tokenizer is None:
            raise ValueError("the model has no tokenizer; pass one: FocusModel(hooked, tokenizer=...)")
        if chat is None:
            chat = bool(getattr(tokenizer, "chat_template", None))
        self.encoder = PromptEncoder(tokenizer, chat, dict(chat_template_kwargs or {}))
        if stop_tokens is None:
            stop_tokens = () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
        super().__init__(backend, tokenizer, stop_tokens)
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
        """Open a model from the Hugging Face hub or from a local directory in its format, with unprocessed weights.

        Args:
            name: Hub name or directory; ``"demo"`` for the embedded model (``"./demo"`` for a directory of that name).
            device: Device of the model; by default ``cuda`` if available, else ``cpu``.
            device_map: Alternative to ``device`` for a model that does not fit on one device: ``"auto"``, or Hugging
                Face's map of modules to devices. A device map implies the backend ``bridge``.
            dtype: Type of the weights, e.g. ``"bfloat16"``.
            backend: ``hooked`` (a ``HookedTransformer``: Llama, Mistral, Qwen2 and Qwen3 families, TransformerLens 3)
                or ``bridge`` (a ``TransformerBridge``: every architecture that TransformerLens supports). The default
                is ``hooked`` for the checkpoints that can be opened that way, else ``bridge``.
            n_ctx: Context length in tokens; by default the length that the checkpoint declares.
            revision: Branch, tag or commit on the hub.
            chat: As in :class:`FocusModel`.
            chat_template_kwargs: As in :class:`FocusModel`.

        Raises:
            FileNotFoundError: If the checkpoint is neither a directory nor on the hub, or the hub cannot be reached.
            PermissionError: If access to the model has not been granted.
            ValueError: If the checkpoint cannot be opened with these arguments. The message names arguments that work.
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
        path = loading.checkpoint_path(name)
        tokenizer = loading.load_tokenizer(path, revision)
        load = loading.loader(path, backend, revision, device_map)
        _LOG.info("loading %s in %s on %s", path, str(resolved).removeprefix("torch."), device_map or device)
        with explained_errors(path, revision):
            hooked = load(path, tokenizer, device=device, dtype=resolved, n_ctx=n_ctx, revision=revision)
        return cls(
            hooked,
            tokenizer,
            chat=chat,
            chat_template_kwargs=chat_template_kwargs,
            stop_tokens=loading.stop_ids(path, tokenizer, revision),
            name=name if name == loading.EMBEDDED else path,
            revision=revision or loading.resolved_revision(path),
        )

    @classmethod
    def demo(cls, **settings: Any) -> FocusModel:
        """The embedded model: a small Llama trained on the synthetic corpus. Needs no network.

        The settings are arguments of :meth:`from_pretrained`, such as ``device``, ``dtype`` and ``backend``.
        """
        return cls.from_pretrained(loading.EMBEDDED, **settings)

    def __repr__(self) -> str:
        shape, cfg = self.shape, self.hooked.cfg
        return (
            f"FocusModel({self.name!r}: {type(self.hooked).__name__}, {shape.n_layers} layers x {shape.n_heads} heads, "
            f"d_head {shape.d_head}, {str(cfg.dtype).removeprefix('torch.')} on {self.device.type})"
        )

    @property
    def description(self) -> dict[str, Any]:
        """Description of the model in result files."""
        return {
            "name": self.name,
            "revision": self.revision,
            "chat": self.encoder.chat,
            "chat_template_kwargs": dict(self.encoder.template_kwargs),
            "prompt_format": self.encoder.digest,
            "stop_tokens": list(self.stop_tokens),
            **describe(self.backend),
        }

    def encode(self, prompt: str | EncodedPrompt) -> EncodedPrompt:
        """Tokens of a prompt, exactly as the model's own tokenizer gives them, and its spans as token ranges."""
        return prompt if isinstance(prompt, EncodedPrompt) else self.encoder.encode(prompt)

    def to_tokens(self, prompt: str | EncodedPrompt) -> Int[Tensor, "1 pos"]:
        """Tokens of a prompt as a batch of one, for ``model.hooked``; :meth:`encode` gives the spans too."""
        return self.encode(prompt).tokens[None].to(self.device)

    def map(self, function: Callable[..., _R], calls: Iterable[tuple[Any, ...]]) -> Generator[_R]:
        """Results of ``function(model, *call)`` for every call, computed on demand; see :class:`focuslens.Executor`."""
        return (function(self, *call) for call in calls)

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
            interventions: Interventions, applied in order.
            prompt: The prompt at the beginning of ``tokens``, if a response follows the prompt. The prompt defines the
                spans, and the row of its last token produces the first response token. By default ``tokens`` hold the
                prompt only.

        Raises:
            ValueError: If ``tokens`` are not one sequence, do not begin with the tokens of the prompt, or do not fit
                the context.
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
        """Greedy response to a prompt, or responses to a list of prompts, which are run as one left-padded batch.

        Args:
            prompts: Texts or encoded prompts. Texts are put into the chat template if :attr:`encoder` uses one.
            interventions: Interventions, applied in order.
            max_new_tokens: Maximum length of a response, in tokens. A response also ends at the end of the context.

        Raises:
            ValueError: If a prompt does not fit the context.
        """
        # The last token is held back with and without interventions, so that its row is always computed in one way.
        prefix = self.prefill(prompts, interventions, hold_last=True)
        responses = self.decode(prefix, interventions, max_new_tokens=max_new_tokens)
        return responses[0] if isinstance(prompts, str | EncodedPrompt) else responses
