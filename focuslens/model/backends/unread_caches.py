"""Keys and values of earlier tokens for bridged attention that does not read the key-value cache by itself."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any

__all__ = ["reading_cache"]

_ARGUMENTS = ("past_key_values", "layer_past")
"""Names of the cache among the arguments of attention that TransformerLens knows."""

_REPLACED = ("forward", "_reshape_qkv_to_heads")


@contextmanager
def reading_cache(attentions: Sequence[Any], cache: Any | None) -> Generator[None]:
    """Let attention layers that would ignore a key-value cache read and extend it inside a ``with`` block.

    Without the earlier keys, every new token would attend to itself only. There are two reasons to ignore a cache:

    - TransformerLens does not know the name ``cache``, which the argument has had since transformers 5.24.
    - TransformerLens computes attention with ALiBi and fused projections (MPT, Falcon) from the keys of the current
      pass alone.
    """
    layers = [layer for layer in attentions if cache is not None and hasattr(layer, "original_component")]
    # Another library, such as accelerate, may have replaced these methods for good.
    earlier = [{name: vars(layer)[name] for name in _REPLACED if name in vars(layer)} for layer in layers]
    try:
        for layer in layers:
            vars(layer)["forward"] = _with_named_cache(layer, cache)
            if _ignores_cache(layer):
                vars(layer)["_reshape_qkv_to_heads"] = _with_earlier_keys(layer, cache)
        yield
    finally:
        for layer, methods in zip(layers, earlier, strict=True):
            for name in _REPLACED:
                vars(layer).pop(name, None)
            vars(layer).update(methods)


def _with_named_cache(layer: Any, cache: Any) -> Callable[..., Any]:
    """``forward`` of a layer that receives the cache under a name that TransformerLens knows."""
    original = layer.forward

    def forward(*arguments: Any, **named: Any) -> Any:
        if not any(name in named for name in _ARGUMENTS):
            named["past_key_values"] = cache
        return original(*arguments, **named)

    return forward


def _ignores_cache(layer: Any) -> bool:
    """Whether a bridged attention layer computes attention itself, without the update of a cache."""
    compute = getattr(type(layer), "_reconstruct_attention", None)
    names = () if compute is None else compute.__code__.co_names
    return "_reshape_qkv_to_heads" in names and "_update_kv_cache" not in names


def _with_earlier_keys(layer: Any, cache: Any) -> Callable[..., Any]:
    """``_reshape_qkv_to_heads`` of a layer that also returns the keys and values of the cache."""
    original = layer._reshape_qkv_to_heads

    def reshape(*arguments: Any) -> Any:
        q, k, v, *sizes = original(*arguments)
        return q, *layer._update_kv_cache(k, v, past_key_values=cache), *sizes

    return reshape
