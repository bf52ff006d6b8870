"""Loading of Hugging Face checkpoints as TransformerLens models, with unprocessed weights and the full context length.

TransformerLens's loader accepts only official model names, limits the context of several families to 2,048 tokens, and
folds and centres weights. This module instead takes the configuration and all weights unchanged from the checkpoint.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from functools import partial
from importlib import resources
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeAlias, cast

import torch
from einops import rearrange
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from focuslens.model.load_errors import explained_errors, require_checkpoint, require_decoder

__all__ = [
    "EMBEDDED",
    "FAMILIES",
    "DeviceMap",
    "checked_device",
    "checkpoint_path",
    "hooked_config",
    "hooked_state_dict",
    "load_bridge",
    "load_hooked",
    "load_tokenizer",
    "loader",
    "original_tokenizer",
    "repetition_penalty",
    "resolved_revision",
    "stop_ids",
]

DeviceMap: TypeAlias = str | Mapping[str, str | int]
"""Hugging Face device map: ``"auto"``, ``"balanced"``, ``"sequential"``, or a mapping from module names to devices."""

EMBEDDED = "demo"
"""Name of the model that ships with the package."""

FAMILIES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
"""Architectures that this module can load as a ``HookedTransformer``."""


def checkpoint_path(name: str) -> str:
    """Absolute path of a local or embedded model, so that each model has a single name. Hub names do not change."""
    path = Path(str(resources.files("focuslens"))) / "assets" / EMBEDDED if name == EMBEDDED else Path(name)
    return str(path.resolve()) if path.is_dir() else name


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


def load_tokenizer(name: str, revision: str | None = None) -> Any:
    """Load the tokenizer of a checkpoint.

    Raises:
        FileNotFoundError: If ``name`` is neither the directory of a checkpoint nor a model on the hub.
        PermissionError: If access to the model has not been granted.
        ValueError: If the tokenizer is not a fast tokenizer. Slow tokenizers do not report character offsets.
    """
    require_checkpoint(name)
    with explained_errors(name, revision):
        tokenizer = cast("Any", AutoTokenizer).from_pretrained(name, revision=revision)
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
        original = cast("Any", AutoTokenizer).from_pretrained(tokenizer.name_or_path, local_files_only=True)
    except (OSError, ValueError):
        return tokenizer
    return tokenizer if original("x").input_ids == tokenizer("x").input_ids else original


def resolved_revision(name: str) -> str | None:
    """Hash of the commit that the hub loads for a model name; ``None`` for a local directory."""
    return getattr(cast("Any", AutoConfig).from_pretrained(name), "_commit_hash", None)


def stop_ids(name: str, tokenizer: Any, revision: str | None = None) -> tuple[int, ...]:
    """Ids of the tokens that end a response.

    They are the EOS tokens of the generation config. If there are none, the tokenizer's EOS token is used.
    """
    try:
        stop: Any = cast("Any", GenerationConfig).from_pretrained(name, revision=revision).eos_token_id
    except OSError:
        stop = None
    if stop is None:
        stop = tokenizer.eos_token_id
    if stop is None:
        return ()
    return tuple(stop) if isinstance(stop, list) else (int(stop),)  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]


def repetition_penalty(name: str, revision: str | None = None) -> float:
    """Repetition penalty from a checkpoint's generation config. The default is 1, which leaves the logits unchanged."""
    try:
        config: Any = cast("Any", GenerationConfig).from_pretrained(checkpoint_path(name), revision=revision)
        penalty = config.repetition_penalty
    except OSError:
        penalty = None
    return 1.0 if penalty is None else float(penalty)


def _rope(config: Any) -> dict[str, Any]:
    """Rotary-embedding settings of a Hugging Face configuration, under TransformerLens's names."""
    parameters: dict[str, Any] = dict(getattr(config, "rope_parameters", None) or {})
    kind = parameters.get("rope_type", "default")
    base = {"rotary_base": parameters.get("rope_theta", 10000.0)}
    if kind == "default":
        return base
    if kind == "linear":
        return base | {"rotary_scaling_factor": parameters["factor"]}
    if kind == "llama3":
        return base | {
            "use_NTK_by_parts_rope": True,
            "NTK_by_parts_factor": parameters["factor"],
            "NTK_by_parts_low_freq_factor": parameters["low_freq_factor"],
            "NTK_by_parts_high_freq_factor": parameters["high_freq_factor"],
            "NTK_original_ctx_len": parameters["original_max_position_embeddings"],
        }
    raise ValueError(
        f"rotary scaling {kind!r} is not supported by HookedTransformer loading (default, linear and llama3 are); "
        "open the checkpoint with backend='bridge'"
    )


def _windows(config: Any) -> dict[str, Any]:
    """Sliding-window settings of a Hugging Face configuration, under TransformerLens's names."""
    window = getattr(config, "sliding_window", None)
    if window is None or getattr(config, "use_sliding_window", True) is False:
        return {}
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    names = {"sliding_attention": "local", "full_attention": "global"}
    return {"use_local_attn": True, "window_size": window, "attn_types": [names[kind] for kind in kinds]}


def hooked_config(config: Any, *, dtype: torch.dtype, device: str, n_ctx: int | None = None) -> Any:
    """``HookedTransformerConfig`` that corresponds to a Hugging Face configuration.

    Raises:
        ValueError: If the architecture or its rotary scaling is not supported.
    """
    from transformer_lens import HookedTransformerConfig

    architecture = (config.architectures or ["unknown"])[0]
    if architecture not in FAMILIES:
        raise ValueError(
            f"{architecture} cannot be opened as a HookedTransformer here (supported: {', '.join(FAMILIES)}); "
            "open it with backend='bridge'"
        )
    d_head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads, key_value_heads = config.num_attention_heads, config.num_key_value_heads
    return HookedTransformerConfig(
        n_layers=config.num_hidden_layers,
        d_model=config.hidden_size,
        n_ctx=n_ctx or config.max_position_embeddings,
        d_head=d_head,
        n_heads=heads,
        n_key_value_heads=key_value_heads if key_value_heads != heads else None,
        d_mlp=config.intermediate_size,
        d_vocab=config.vocab_size,
        act_fn=config.hidden_act,
        eps=config.rms_norm_eps,
        normalization_type="RMS",
        final_rms=True,
        gated_mlp=True,
        positional_embedding_type="rotary",
        rotary_dim=d_head,
        rotary_adjacent_pairs=False,
        use_qk_norm=architecture == "Qwen3ForCausalLM",
        original_architecture=architecture,
        model_name=Path(str(config.name_or_path)).name or architecture,
        init_weights=False,
        dtype=dtype,
        device=device,
        **_rope(config),
        **_windows(config),
    )


_NAMES = (
    (r"^model\.embed_tokens\.weight$", "embed.W_E"),
    (r"^model\.norm\.weight$", "ln_final.w"),
    (r"^lm_head\.weight$", "unembed.W_U"),
    (r"^model\.layers\.(\d+)\.input_layernorm\.weight$", r"blocks.\1.ln1.w"),
    (r"^model\.layers\.(\d+)\.post_attention_layernorm\.weight$", r"blocks.\1.ln2.w"),
    (r"^model\.layers\.(\d+)\.self_attn\.([qk])_norm\.weight$", r"blocks.\1.attn.\2_norm.w"),
    (r"^model\.layers\.(\d+)\.self_attn\.([qkvo])_proj\.(weight|bias)$", r"blocks.\1.attn.\2 \3"),
    (r"^model\.layers\.(\d+)\.mlp\.(gate|up|down)_proj\.(weight|bias)$", r"blocks.\1.mlp.\2 \3"),
)
"""Patterns of Hugging Face's parameter names, and the replacements that :func:`_target` inserts."""

_MLP = {"gate": "gate", "up": "in", "down": "out"}
"""Map from Hugging Face's names of the MLP projections to TransformerLens's names."""


def _hooked_entry(name: str, weight: Tensor, heads: dict[str, int], grouped: bool) -> tuple[str, Tensor]:
    """Convert a Hugging Face parameter to the name and layout of TransformerLens.

    ``heads`` maps the projections ``q``, ``k``, ``v`` and ``o`` to their numbers of heads. ``grouped`` is true if query
    heads share key-value heads.
    """
    target = _target(name)
    if " " not in target:
        return target, weight.T if target == "unembed.W_U" else weight
    module, kind = target.split(" ")
    prefix, part = module.rsplit(".", 1)
    letter = "W" if kind == "weight" else "b"
    if part in _MLP:
        if kind == "bias" and part == "gate":
            raise ValueError(
                f"{name!r}: a bias on the MLP's gate has no place in a HookedTransformer; use backend='bridge'"
            )
        return f"{prefix}.{letter}_{_MLP[part]}", weight.T if kind == "weight" else weight
    underscore = "_" if grouped and part in "kv" else ""
    target = f"{prefix}.{underscore}{letter}_{part.upper()}"
    if part == "o":
        return target, rearrange(weight, "m (n h) -> n h m", n=heads["o"]) if kind == "weight" else weight
    if kind == "bias":
        return target, rearrange(weight, "(n h) -> n h", n=heads[part])
    return target, rearrange(weight, "(n h) m -> n m h", n=heads[part])


def _target(name: str) -> str:
    """TransformerLens name of a Hugging Face parameter; for a projection, ``"MODULE weight"`` or ``"MODULE bias"``.

    Raises:
        ValueError: If a HookedTransformer has no such parameter.
    """
    for pattern, replacement in _NAMES:
        if re.match(pattern, name):
            return re.sub(pattern, replacement, name)
    raise ValueError(
        f"parameter {name!r} has no place in a HookedTransformer; open the checkpoint with backend='bridge'"
    )


def hooked_state_dict(state: dict[str, Tensor], cfg: Any) -> dict[str, Tensor]:
    """Convert the state dict of a supported family to TransformerLens's names and layout. Missing biases become zero.

    Raises:
        ValueError: If a HookedTransformer does not have one of the parameters.
    """
    from transformer_lens import HookedTransformer

    key_value_heads = cfg.n_key_value_heads or cfg.n_heads
    heads = {"q": cfg.n_heads, "o": cfg.n_heads, "k": key_value_heads, "v": key_value_heads}
    weights = dict(
        _hooked_entry(name, weight, heads, cfg.n_key_value_heads is not None)
        for name, weight in state.items()
        if not name.endswith("rotary_emb.inv_freq")
    )
    if "unembed.W_U" not in weights:
        weights["unembed.W_U"] = weights["embed.W_E"].T
    meta_cfg = copy.deepcopy(cfg)
    meta_cfg.device = "meta"
    with torch.device("meta"):
        parameters = HookedTransformer(meta_cfg, move_to_device=False).state_dict()
    biases = {name: bias for name, bias in parameters.items() if re.search(r"\.b_|\._b_|\.b_U$", name)}
    zeros = {name: torch.zeros(bias.shape, dtype=cfg.dtype) for name, bias in biases.items() if name not in weights}
    return weights | zeros


def load_hooked(
    name: str, tokenizer: Any, *, device: str, dtype: torch.dtype, n_ctx: int | None, revision: str | None = None
) -> Any:
    """Load a checkpoint of a supported family as a ``HookedTransformer`` with unprocessed weights.

    Raises:
        ValueError: If the checkpoint lacks parameters of the model, or has parameters that the model does not have.
    """
    from transformer_lens import HookedTransformer

    config = cast("Any", AutoConfig).from_pretrained(name, revision=revision)
    cfg = hooked_config(config, dtype=dtype, device=device, n_ctx=n_ctx)
    model: Any = cast("Any", AutoModelForCausalLM).from_pretrained(name, revision=revision, dtype=dtype)
    # HookedTransformer changes its tokenizer (BOS, padding). The copy protects the caller's tokenizer.
    hooked = HookedTransformer(cfg, tokenizer=copy.deepcopy(tokenizer), move_to_device=True)
    missing, unexpected = hooked.load_state_dict(hooked_state_dict(model.state_dict(), cfg), strict=False)
    missing = [key for key in missing if not re.search(r"(mask|IGNORE|rotary_(sin|cos))$", key)]
    if missing or unexpected:
        raise ValueError(f"{name!r} does not fit a HookedTransformer: missing {missing}, unexpected {unexpected}")
    return hooked.eval()


def load_bridge(
    name: str,
    tokenizer: Any,
    *,
    device: str | None,
    dtype: torch.dtype,
    n_ctx: int | None,
    revision: str | None = None,
    device_map: DeviceMap | None = None,
) -> Any:
    """Load a checkpoint as a ``TransformerBridge``, which is the Hugging Face model with hook points."""
    from transformer_lens.model_bridge import TransformerBridge

    boot: Any = TransformerBridge.boot_transformers
    devices: dict[str, Any] = {"device": device}
    if device_map is not None:
        devices = {"device_map": device_map if isinstance(device_map, str) else dict(device_map)}
    bridge = boot(name, dtype=dtype, tokenizer=copy.deepcopy(tokenizer), n_ctx=n_ctx, revision=revision, **devices)
    return bridge.eval()


def loader(name: str, backend: str | None, revision: str | None, device_map: DeviceMap | None = None) -> Any:
    """Function that loads a checkpoint: :func:`load_hooked` or :func:`load_bridge`.

    By default, :func:`load_hooked` is chosen if it can load the checkpoint and there is no device map.

    Raises:
        ValueError: If ``backend`` is unknown, if the checkpoint is not a decoder-only language model, or if ``hooked``
            is requested with a device map or with a TransformerLens that has no HookedTransformer.
    """
    if backend not in ("hooked", "bridge", None):
        raise ValueError(f"backend is {backend!r}; it must be 'hooked', 'bridge' or None")
    with explained_errors(name, revision):
        config = cast("Any", AutoConfig).from_pretrained(name, revision=revision)
    require_decoder(config, name)
    if device_map is not None:
        if backend == "hooked":
            raise ValueError("a HookedTransformer is on one device; with device_map use backend='bridge'")
        return partial(load_bridge, device_map=device_map)
    has_hooked = int(version("transformer-lens").split(".")[0]) < 4
    if backend == "hooked" and not has_hooked:
        raise ValueError("this TransformerLens (4 or later) has no HookedTransformer; use backend='bridge'")
    if backend is None:
        try:
            hooked_config(config, dtype=torch.float32, device="cpu") if has_hooked else None
        except ValueError:
            has_hooked = False
        backend = "hooked" if has_hooked else "bridge"
    return load_hooked if backend == "hooked" else load_bridge
