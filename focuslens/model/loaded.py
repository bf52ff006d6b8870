"""Hugging Face models that are already loaded, opened without a second copy of their weights.

A ``TransformerBridge`` replaces layers of the model that it wraps. It therefore wraps a second tree of modules, whose
parameters are the very parameters of the loaded model. The loaded model does not change. Its own hooks, such as those
of a user or the edits of nnsight, do not act on the second tree.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from transformers import PreTrainedModel

from focuslens.model.backends import Backend
from focuslens.model.decoding_settings import DecodingSettings
from focuslens.model.exported import is_exported
from focuslens.model.load_errors import explained_errors, require_decoder
from focuslens.model.loading import Checkpoint, Loaded, boot
from focuslens.model.opening import open_backend
from focuslens.model.plain import LENGTHS, OWN_CODE_LENGTHS, Reference
from focuslens.model.sources.names import shown_name
from focuslens.model.stop_strings import default_stop_strings

__all__ = ["OpensLoaded", "config_digest", "name_of", "open_loaded", "plain_model", "tokenizer_of"]

_WRAPPED = ("_module", "_model", "model")
"""Attributes under which wrappers hold a Hugging Face model, such as nnsight's ``LanguageModel``."""

_CAPTURING = "_output_capturing_hooks_installed"
"""Mark of transformers on a module whose outputs are captured by hooks."""


def plain_model(model: Any) -> PreTrainedModel:
    """The Hugging Face model itself, or the one inside a wrapper of nnsight or nnterp.

    Raises:
        TypeError: If there is no Hugging Face model.
        ValueError: If its weights are not loaded, or ``focuslens export`` wrote its checkpoint.
    """
    plain = model
    while not isinstance(plain, PreTrainedModel):
        # ``vars`` finds attributes of the wrapper alone. Wrappers can pass on the attributes of their model.
        entries = getattr(plain, "__dict__", {})
        inner = next((entries[name] for name in _WRAPPED if entries.get(name) is not None), None)
        if inner is None:
            raise TypeError(
                f"expected a loaded Hugging Face model (AutoModelForCausalLM.from_pretrained), or nnsight's or "
                f"nnterp's wrapper of one, got {type(model).__name__}; a HookedTransformer or a TransformerBridge is "
                "passed to FocusModel(...), and a name to FocusModel.from_pretrained"
            )
        plain = inner
    if any(parameter.is_meta for parameter in plain.parameters()):
        raise ValueError(
            "the model's weights are not loaded (they are on the device 'meta'); load them first: with nnsight, pass "
            "dispatch=True or call model.dispatch()"
        )
    if is_exported(plain.config):
        raise ValueError(
            "the model has focus directions in its code; open its checkpoint with "
            "FocusModel.from_pretrained(directory, trust_remote_code=True)"
        )
    return plain


def tokenizer_of(model: Any, tokenizer: Any) -> Any:
    """The given tokenizer, or that of a wrapper such as nnsight's ``LanguageModel``.

    Raises:
        ValueError: If there is none, or it is no fast tokenizer, which alone reports character offsets.
    """
    tokenizer = getattr(model, "__dict__", {}).get("tokenizer") if tokenizer is None else tokenizer
    if tokenizer is None:
        raise ValueError(
            "a plain Hugging Face model has no tokenizer; pass one: FocusModel.from_loaded(model, tokenizer)"
        )
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"the tokenizer is a {type(tokenizer).__name__}, a slow one without character offsets; pass the fast "
            "tokenizer that AutoTokenizer.from_pretrained loads"
        )
    return tokenizer


def name_of(plain: PreTrainedModel) -> str:
    """Name of the checkpoint that a model was loaded from; the name of its class if it was not loaded from one."""
    return str(plain.name_or_path or plain.config.name_or_path or type(plain).__name__)


def open_loaded(plain: PreTrainedModel, tokenizer: Any, n_ctx: int | None = None) -> Backend:
    """Open a loaded model as a ``TransformerBridge`` that shares its parameters.

    The logits are compared with those of the plain model every time, because a loaded model can have been changed.

    Raises:
        UnfitError: If a ``TransformerBridge`` does not compute what transformers computes.
        ValueError: If the model is no decoder, TransformerLens does not support its architecture, or ``n_ctx`` is out
            of range.
    """
    name, shared = name_of(plain), _sharing(plain)
    require_decoder(shared.config, name)
    devices = {parameter.device for parameter in shared.parameters()}
    device = str(devices.pop()) if len(devices) == 1 else None
    checkpoint = _LoadedCheckpoint(name, shared.config, None, device, None, shared.dtype, plain=shared)
    with explained_errors(name):
        return open_backend(checkpoint, tokenizer, "bridge", n_ctx)


def _sharing(plain: PreTrainedModel) -> PreTrainedModel:
    """A second tree of modules with the same parameters, without hooks, for inference with eager attention."""
    memo: dict[int, Any] = {id(parameter): parameter for parameter in plain.parameters()}
    for module in plain.modules():
        hooks = [value for name, value in vars(module).items() if name.startswith(("_forward", "_backward"))]
        memo |= {id(value): OrderedDict[Any, Any]() for value in hooks if isinstance(value, dict)}
    shared = copy.deepcopy(plain, memo)
    for module in shared.modules():
        vars(module).pop(_CAPTURING, None)  # the hooks that it stands for were left out
    if not shared.config.architectures:
        shared.config.architectures = [type(plain).__name__]
    shared.set_attn_implementation("eager")
    return shared.eval()


@dataclass(frozen=True, eq=False)
class _LoadedCheckpoint(Checkpoint):
    """A model that is already loaded, in the place of a checkpoint.

    Attributes:
        plain: The Hugging Face model, which a bridge may change.
    """

    plain: Any = None

    @property
    def has_own_code(self) -> bool:
        # A loaded model can compute something else than its configuration says, so it is always compared.
        return True

    def backends(self, backend: str | None) -> tuple[str, ...]:
        return ("bridge",)

    @torch.no_grad()
    def load(self, backend: str, tokenizer: Any, *, n_ctx: int | None = None, measure: bool = False) -> Loaded:
        own = not type(self.plain).__module__.startswith("transformers.models.")
        declared = cast("int | None", getattr(self.config, "max_position_embeddings", None))
        limit = n_ctx if n_ctx is not None else declared if own else None
        reference = Reference.of(self.plain, limit, OWN_CODE_LENGTHS if own else LENGTHS)
        # Without a device, TransformerLens takes the devices from the model's own device map.
        device = {} if self.device is None else {"device": self.device}
        return Loaded(boot(self.name, tokenizer, hf_model=self.plain, dtype=self.dtype, **device), reference)


_M = TypeVar("_M", bound="OpensLoaded")


class OpensLoaded:
    """Constructor of :class:`FocusModel` for Hugging Face models that are already loaded."""

    _config_digest: str | None

    @classmethod
    def from_loaded(
        cls: type[_M],
        model: Any,
        tokenizer: Any | None = None,
        *,
        n_ctx: int | None = None,
        name: str | None = None,
        **settings: Any,
    ) -> _M:
        """Open a Hugging Face model that is already loaded, without a second copy of its weights.

        The result is a ``TransformerBridge`` whose parameters are those of ``model``. The model itself does not
        change: it computes the same, and hooks on it act on its own passes alone. FocusLens runs the layers without
        these hooks, with eager attention or its own engine.

        Args:
            model: The model, e.g. from ``AutoModelForCausalLM.from_pretrained``, or nnsight's ``LanguageModel`` or
                nnterp's ``StandardizedTransformer`` with loaded weights.
            tokenizer: Its fast tokenizer; by default that of the wrapper.
            n_ctx: Context length in tokens; by default that of the configuration.
            name: Name of the model in result files; by default that of its checkpoint.
            settings: Further arguments of :class:`FocusModel`: ``chat``, ``stop_strings`` and so on. The defaults are
                those of ``from_pretrained``.

        Raises:
            TypeError: If ``model`` is no Hugging Face model.
            ValueError: If there is no fast tokenizer, the weights are not loaded, or the logits differ from those of
                the plain model.
        """
        plain, tokenizer = plain_model(model), tokenizer_of(model, tokenizer)
        called = name or name_of(plain)
        decoding = DecodingSettings.of_generation_config(plain.generation_config, plain.config, tokenizer, called)
        if settings.get("stop_strings") is None:
            default = default_stop_strings(tokenizer, settings.get("chat"))
            settings["stop_strings"] = decoding.stop_strings or default
        settings |= {"decoding": decoding, "revision": getattr(plain.config, "_commit_hash", None)}
        backend = open_loaded(plain, tokenizer, n_ctx)
        opened = cast("Any", cls)(backend, tokenizer, name=shown_name(called), **settings)
        opened._config_digest = config_digest(plain.config)
        return opened


def config_digest(config: Any) -> str:
    """Digest of a configuration, which changes what the same weights compute."""
    unrelated = ("_name_or_path", "_commit_hash", "transformers_version", "dtype", "torch_dtype")
    values = {name: value for name, value in config.to_dict().items() if name not in unrelated}
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:16]
