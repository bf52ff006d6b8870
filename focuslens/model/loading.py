"""Loading of Hugging Face checkpoints as TransformerLens models, with unprocessed weights and the full context length.

TransformerLens's loader accepts only official model names, limits the context of several families to 2,048 tokens, and
folds and centres weights. This module instead takes the configuration and all weights unchanged from the checkpoint.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, TypeAlias, cast

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from focuslens.model.exported import add_to_queries, is_exported, plain_config, taken_out
from focuslens.model.hooked_weights import hooked_config, hooked_state_dict
from focuslens.model.load_errors import explained_errors, require_checkpoint, require_decoder
from focuslens.model.plain import LENGTHS, OWN_CODE_LENGTHS, PlainLoader, Reference, UnfitError
from focuslens.util.memory import is_out_of_memory

__all__ = [
    "Checkpoint",
    "DeviceMap",
    "Loaded",
    "as_hooked",
    "boot",
    "checked_device",
    "load_tokenizer",
    "open_checkpoint",
    "original_tokenizer",
]

DeviceMap: TypeAlias = str | Mapping[str, str | int]
"""Hugging Face device map: ``"auto"``, ``"balanced"``, ``"sequential"``, or a mapping from module names to devices."""


def checked_device(device: str | None) -> str:
    """Check that a device exists, and return it. The default is ``cuda`` if available, else ``cpu``.

    Raises:
        ValueError: If the device does not exist.
    """
    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        reason = f" ({reason})" if len(reason) < 80 else ""  # torch lists all device types if the name is unknown
        available = ", ".join(_devices())
        raise ValueError(f"device is {device!r}, which is not available{reason}; available: {available}") from error
    return device


def _devices() -> list[str]:
    """Names of the devices on this machine that can run models."""
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    return ["cpu", *gpus, *(["mps"] if torch.backends.mps.is_available() else [])]


def load_tokenizer(name: str, revision: str | None = None, *, trust_remote_code: bool = False) -> Any:
    """Load the tokenizer of a checkpoint.

    Raises:
        FileNotFoundError: If ``name`` is neither the directory of a checkpoint nor a model on the hub.
        PermissionError: If access to the model has not been granted.
        ValueError: If the tokenizer is not a fast tokenizer. Slow tokenizers do not report character offsets.
    """
    require_checkpoint(name)
    with explained_errors(name, revision):
        tokenizer = cast("Any", AutoTokenizer).from_pretrained(
            name, revision=revision, trust_remote_code=trust_remote_code
        )
    if trust_remote_code:
        # TransformerLens loads the tokenizer again with these arguments, and would ask on the terminal.
        tokenizer.init_kwargs["trust_remote_code"] = True
    if not tokenizer.is_fast:
        raise ValueError(
            f"the tokenizer of {name!r} is a slow one ({type(tokenizer).__name__}) without character offsets; "
            "convert it to a fast tokenizer (tokenizer.json) first"
        )
    return tokenizer


def original_tokenizer(tokenizer: Any) -> Any:
    """Original tokenizer of a checkpoint, in place of a tokenizer that TransformerLens has changed.

    TransformerLens reloads every tokenizer with ``add_bos_token=True``. If this changes the tokens of a test text,
    and the original tokenizer is in the local cache, the original tokenizer is returned. Otherwise ``tokenizer`` itself
    is returned.
    """
    if tokenizer is None or not tokenizer.name_or_path:
        return tokenizer
    try:
        original = cast("Any", AutoTokenizer).from_pretrained(
            tokenizer.name_or_path, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError):
        return tokenizer
    return tokenizer if original("x").input_ids == tokenizer("x").input_ids else original


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A checkpoint in Hugging Face format, and how to open it.

    Attributes:
        name: Hub name or directory.
        config: The checkpoint's configuration.
        revision: Branch, tag or commit on the hub.
        device: Device of the model; ``None`` with a device map.
        device_map: Hugging Face device map.
        dtype: Type of the weights.
        trust_remote_code: Whether to run Python code that the checkpoint contains.
        exported: Whether ``focuslens export`` wrote the checkpoint. ``config`` is then the configuration of its base.
    """

    name: str
    config: Any
    revision: str | None
    device: str | None
    device_map: DeviceMap | None
    dtype: torch.dtype
    trust_remote_code: bool = False
    exported: bool = False

    @property
    def has_own_code(self) -> bool:
        """Whether the checkpoint's own code is run. What it computes does not follow from the configuration alone."""
        return self.trust_remote_code and (self.exported or bool(getattr(self.config, "auto_map", None)))

    def backends(self, backend: str | None) -> tuple[str, ...]:
        """Kinds of TransformerLens model to try, in order: ``hooked`` (a ``HookedTransformer``) and ``bridge``.

        Args:
            backend: The only kind to try; ``None`` for every kind that the configuration allows.

        Raises:
            ValueError: If ``backend`` is unknown, or if it is ``hooked`` and there is a device map or TransformerLens
                has no ``HookedTransformer``.
        """
        if backend not in ("hooked", "bridge", None):
            raise ValueError(f"backend is {backend!r}; it must be 'hooked', 'bridge' or None")
        has_hooked = int(version("transformer-lens").split(".")[0]) < 4
        if backend == "hooked" and self.device_map is not None:
            raise ValueError("a HookedTransformer is on one device; with device_map use backend='bridge'")
        own_attention = self.has_own_code and not self.exported
        if backend == "hooked" and own_attention:
            raise ValueError(
                f"{self.name!r} contains code of its own, and a HookedTransformer would compute the architecture whose "
                "name it has; use backend='bridge', which runs the checkpoint's code"
            )
        if backend == "hooked" and not has_hooked:
            raise ValueError("this TransformerLens (4 or later) has no HookedTransformer; use backend='bridge'")
        if backend is not None:
            return (backend,)
        fits = has_hooked and self.device_map is None and not own_attention and is_hooked(self.config)
        return ("hooked", "bridge") if fits else ("bridge",)

    def load(self, backend: str, tokenizer: Any, *, n_ctx: int | None = None, measure: bool = False) -> Loaded:
        """The checkpoint as a TransformerLens model with unprocessed weights.

        Args:
            backend: ``hooked`` or ``bridge``.
            tokenizer: The checkpoint's own tokenizer.
            n_ctx: Context length of a ``HookedTransformer``; by default the length in the configuration.
            measure: Whether to measure logits of the plain Hugging Face model first.

        Raises:
            UnfitError: If this kind of model cannot hold the checkpoint.
            ValueError: If the checkpoint lacks a weight, or has a weight that its architecture does not have.
        """
        if self.exported:
            return self._load_exported(backend, tokenizer, n_ctx)
        load = self._load_hooked if backend == "hooked" else self._load_bridge
        return load(tokenizer, n_ctx, measure)

    def _load_exported(self, backend: str, tokenizer: Any, n_ctx: int | None) -> Loaded:
        device = "cpu" if backend == "hooked" else self.device
        loader = PlainLoader(AutoModelForCausalLM, device, measure=True, n_ctx=n_ctx)
        plain = loader.from_pretrained(self.name, **self._plain_settings)
        vectors, hooked = taken_out(plain), self._wrapped(plain, backend, tokenizer, n_ctx)
        add_to_queries(hooked, vectors)
        return Loaded(hooked, loader.reference)

    def _wrapped(self, plain: Any, backend: str, tokenizer: Any, n_ctx: int | None) -> Any:
        if backend == "hooked":
            return as_hooked(plain, tokenizer, device=str(self.device), dtype=self.dtype, n_ctx=n_ctx)
        return boot(self.name, tokenizer, hf_model=plain, device=self.device, dtype=self.dtype)

    @property
    def _plain_settings(self) -> dict[str, Any]:
        settings = {"revision": self.revision, "dtype": self.dtype, "attn_implementation": "eager"}
        return {**settings, "trust_remote_code": self.trust_remote_code}

    def _load_hooked(self, tokenizer: Any, n_ctx: int | None, measure: bool) -> Loaded:
        hooked_config(self.config, dtype=self.dtype, device=str(self.device))  # before any weight is read
        loader = PlainLoader(AutoModelForCausalLM, "cpu", measure=measure, n_ctx=n_ctx)
        plain = loader.from_pretrained(self.name, **self._plain_settings)
        hooked = as_hooked(plain, tokenizer, device=str(self.device), dtype=self.dtype, n_ctx=n_ctx)
        return Loaded(hooked, loader.reference)

    def _load_bridge(self, tokenizer: Any, n_ctx: int | None, measure: bool) -> Loaded:
        from transformer_lens.model_bridge.sources.transformers import get_hf_model_class_for_architecture

        architecture = (self.config.architectures or ["unknown"])[0]
        model_class = get_hf_model_class_for_architecture(architecture)
        # What code does with longer prompts does not follow from a stand-in.
        lengths = OWN_CODE_LENGTHS if self.has_own_code else LENGTHS
        loader = PlainLoader(model_class, self.device, measure=measure, n_ctx=n_ctx, lengths=lengths)
        devices: dict[str, Any] = {"device": self.device, "trust_remote_code": self.trust_remote_code}
        if self.device_map is not None:
            maps = self.device_map
            del devices["device"]
            devices["device_map"] = maps if isinstance(maps, str) else dict(maps)
        try:
            bridge = boot(self.name, tokenizer, dtype=self.dtype, revision=self.revision, model_class=loader, **devices)
        except Exception as error:
            # Errors before the plain model was complete are errors of the checkpoint.
            if loader.config is None or is_out_of_memory(error) or isinstance(error, UnfitError):
                raise
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UnfitError(
                f"TransformerLens cannot open {self.name!r} ({architecture}) as a TransformerBridge: {reason}"
            ) from error
        return Loaded(bridge, loader.reference)


@dataclass(frozen=True, eq=False)
class Loaded:
    """A checkpoint as a TransformerLens model.

    Attributes:
        hooked: The ``HookedTransformer`` or ``TransformerBridge``.
        reference: Logits of the plain Hugging Face model; ``None`` if they were not measured.
    """

    hooked: Any
    reference: Reference | None


def open_checkpoint(
    name: str,
    *,
    revision: str | None,
    device: str | None,
    device_map: DeviceMap | None,
    dtype: torch.dtype,
    trust_remote_code: bool = False,
) -> Checkpoint:
    """Read a checkpoint's configuration, and check that it is a decoder-only language model.

    Raises:
        ValueError: If it is another kind of model, its sliding window is less than one key, or it was exported by
            FocusLens and there is a device map.
    """
    config = cast("Any", AutoConfig).from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    require_decoder(config, name)
    exported = is_exported(config)
    if exported and device_map is not None:
        raise ValueError(
            f"{name!r} was written by focuslens export and cannot be spread with device_map; give device, or open its "
            "base with device_map and steer it with the directions"
        )
    config = plain_config(config) if exported else config
    window = getattr(config, "sliding_window", None)
    # An architecture does not read a key that its configuration's class does not declare.
    declared = "sliding_window" in type(config)().to_dict()
    used = "sliding_attention" in (getattr(config, "layer_types", None) or ["sliding_attention"])
    if declared and used and isinstance(window, int) and window < 1:
        raise ValueError(
            f"sliding_window is {window} in the configuration of {name!r}; a window has at least 1 key, and null means "
            "no window"
        )
    return Checkpoint(name, config, revision, device, device_map, dtype, trust_remote_code, exported)


def is_hooked(config: Any) -> bool:
    """Whether a configuration can be that of a ``HookedTransformer``."""
    try:
        hooked_config(config, dtype=torch.float32, device="cpu")
    except (ValueError, AssertionError):  # TransformerLens asserts that it knows the activation function
        return False
    return True


def as_hooked(plain: Any, tokenizer: Any, *, device: str, dtype: torch.dtype, n_ctx: int | None = None) -> Any:
    """A plain Hugging Face model of a supported family as a ``HookedTransformer`` with unprocessed weights.

    Raises:
        UnfitError: If the parameters are not exactly those of a ``HookedTransformer``.
    """
    from transformer_lens import HookedTransformer

    cfg = hooked_config(plain.config, dtype=dtype, device=device, n_ctx=n_ctx)
    # HookedTransformer changes its tokenizer (BOS, padding), so it gets a copy.
    hooked = HookedTransformer(cfg, tokenizer=copy.deepcopy(tokenizer), move_to_device=True)
    missing, unexpected = hooked.load_state_dict(hooked_state_dict(plain.state_dict(), cfg), strict=False)
    missing = [key for key in missing if not re.search(r"(mask|IGNORE|rotary_(sin|cos))$", key)]
    if missing or unexpected:
        raise UnfitError(
            f"{plain.name_or_path!r} does not fit a HookedTransformer: missing {missing}, unexpected {unexpected}"
        )
    return hooked.eval()


def boot(name: str, tokenizer: Any, **settings: Any) -> Any:
    """A ``TransformerBridge``: a Hugging Face model with hook points."""
    from transformer_lens.model_bridge import TransformerBridge

    # A bridge changes its tokenizer (padding), so it gets a copy.
    bridge: Any = TransformerBridge.boot_transformers(name, tokenizer=copy.deepcopy(tokenizer), **settings)
    return bridge.eval()
