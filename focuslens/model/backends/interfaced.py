"""Attention of any rotary decoder on the engine, through the attention interface of transformers.

Most Hugging Face classes of attention hand their rotated queries and keys to a function that the configuration names.
The engine registers such a function. A pass then runs Hugging Face's own module, whose projections are those of the
bridge with their hook points, and the engine computes the attention. No list of families is needed: ``measuring.py``
tells what each layer hands over.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor
from transformers import AttentionInterface

from focuslens.model.attention import LayerCache, Steps
from focuslens.model.engine import Filled, Pass, attend, is_hooked, replaced_forwards

__all__ = [
    "ENGINE",
    "Call",
    "LayerForm",
    "LayerPass",
    "configs_of",
    "engine_forward",
    "implemented",
    "is_of_transformers",
    "own_module",
    "parameters_of",
    "replacing",
    "running_layer",
    "split_projection",
    "through_interface",
]

ENGINE = "focuslens"
"""Name of the engine's function in the attention interface. No mask has this name, so that none is built."""


@dataclass(frozen=True, eq=False)
class LayerForm:
    """Form of a layer's attention, as its Hugging Face class hands it to the attention interface.

    Attributes:
        scale: Factor that multiplies the query-key products.
        window: Maximum number of keys that a row attends to, including the row's own key; ``None`` for no limit.
        steps: Further steps of the architecture.
        rotary: Whether queries and keys are rotated.
    """

    scale: float
    window: int | None
    steps: Steps
    rotary: bool


@dataclass(frozen=True, eq=False)
class LayerPass:
    """One layer in a pass on the engine.

    Attributes:
        bridge: Attention module of the bridge.
        rows: Rows and columns of the pass.
        cache: Keys and values of the layer.
        form: Form of the layer's attention, with the window of this pass.
        stop: Whether the pass ends once the layer's keys and values are complete.
    """

    bridge: Any
    rows: Pass
    cache: LayerCache
    form: LayerForm
    stop: bool


running_layer: ContextVar[LayerPass | list[Call]] = ContextVar("running_layer")
"""Layer whose attention module is running or, during a measurement, the calls of the layers so far."""


class Call(NamedTuple):
    """Arguments of one call of the attention interface."""

    query: Tensor
    shapes: tuple[tuple[int, ...], ...]
    mask: Any
    arguments: Mapping[str, Any]


def _engine_attention(
    module: Any,
    query: Float[Tensor, "batch head row d_head"],
    key: Float[Tensor, "batch kv_head row d_head"],
    value: Float[Tensor, "batch kv_head row d_head"],
    attention_mask: Any,
    **arguments: Any,
) -> tuple[Float[Tensor, "batch row head d_head"], None]:
    """Attention function of the engine. Its mask and its arguments are those of :class:`LayerPass`."""
    running = running_layer.get(None)
    if not isinstance(running, LayerPass):
        raise RuntimeError("the attention function 'focuslens' runs inside passes of a FocusModel only")
    points = running.bridge._modules
    query = points["hook_rot_q"](query) if "hook_rot_q" in points else query
    key = points["hook_rot_k"](key) if "hook_rot_k" in points else key
    running.cache.append(*(rearrange(x, "batch kv row d -> batch row kv d") for x in (key, value)))
    if running.stop:
        raise Filled
    q, form = rearrange(query, "batch head row d -> batch row head d"), running.form
    # The layer's own tensor, which can have moved since the measurement.
    steps = form.steps if form.steps.sinks is None else replace(form.steps, sinks=arguments["s_aux"])
    return attend(running.bridge, running.rows, q, running.cache.segments, form.window, form.scale, steps), None


AttentionInterface.register(ENGINE, _engine_attention)


def configs_of(hooked: Any) -> list[Any]:
    """Configurations that the model and its attention layers read."""
    configs = [hooked.original_model.config, getattr(hooked.original_model.base_model, "config", None)]
    configs += [getattr(own_module(block.attn), "config", None) for block in hooked.blocks]
    by_identity = {id(config): config for config in configs if hasattr(config, "_attn_implementation")}
    return list(by_identity.values())


@contextmanager
def implemented(configs: Sequence[Any], name: str) -> Generator[None]:
    """Let layers with these configurations use the attention function called ``name`` inside a ``with`` block."""
    earlier = [(config, config._attn_implementation) for config in configs]
    try:
        for config, _ in earlier:
            config._attn_implementation = name
        yield
    finally:
        for config, implementation in earlier:
            config._attn_implementation = implementation


def engine_forward(
    running: LayerPass, /, *arguments: Any, **named: Any
) -> tuple[Float[Tensor, "batch row d_model"], None]:
    """Replacement for the ``forward`` of a bridge's attention that runs on the engine, with the same hooks."""
    return through_interface(running.bridge, running, running, *arguments, **named)


def through_interface(
    bridge: Any, value: LayerPass | list[Call], layer: LayerPass | None, /, *arguments: Any, **named: Any
) -> tuple[Float[Tensor, "batch row d_model"], None]:
    """Run Hugging Face's module under the hooks of the bridge. ``value`` is for the attention function."""
    hidden_states = named.pop("hidden_states") if "hidden_states" in named else arguments[0]
    arguments, own, points = arguments[1:], own_module(bridge), bridge._modules
    if layer is not None:
        layer.rows.require(hidden_states, layer.cache)
        named["attention_mask"] = None
        for name in _CACHES & parameters_of(type(own)):
            named[name] = _Columns(layer.cache.columns)
    if "hook_cos" in points and isinstance(named.get("position_embeddings"), tuple):
        named["position_embeddings"] = bridge._apply_position_embedding_hooks(named["position_embeddings"])
    with ExitStack() as stack:
        stack.callback(running_layer.reset, running_layer.set(value))
        stack.enter_context(replacing(split_projection(bridge)))
        stack.enter_context(replacing(_normed_points(bridge)))
        result: Any = own(bridge.hook_in(hidden_states), *arguments, **named)
    output = result[0] if isinstance(result, tuple) else result
    if "hook_hidden_states" in points and split_projection(bridge):
        output = points["hook_hidden_states"](output)
    return bridge.hook_out(output), None


@cache
def parameters_of(kind: type) -> frozenset[str]:
    """Names of the parameters of a class's ``forward``."""
    forward: Any = kind.forward  # type: ignore[attr-defined]
    return frozenset(inspect.signature(forward).parameters)


_CACHES = {"past_key_values", "past_key_value", "cache"}
"""Names that the cache has had among the arguments of attention."""


@dataclass(frozen=True)
class _Columns:
    """Number of earlier columns, in place of Hugging Face's cache. The engine keeps the keys and values itself."""

    columns: int

    def get_seq_length(self, layer: int = 0) -> int:
        """Number of columns before the rows of this pass."""
        return self.columns

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Keys and values of this pass, unchanged."""
        return keys, values


def own_module(bridge: Any) -> Any:
    """Hugging Face's module that a component of a bridge wraps."""
    return getattr(bridge, "original_component", bridge)


def is_of_transformers(module: Any) -> bool:
    """Whether a module has a class of transformers, not one of a checkpoint's own code."""
    return type(module).__module__.startswith("transformers.models.")


@contextmanager
def replacing(forwards: Mapping[Any, Callable[..., Any]]) -> Generator[None]:
    """Replace ``forward`` methods, and put back those that were replaced before."""
    earlier = {module: vars(module).get("forward") for module in forwards}
    try:
        with replaced_forwards(list(forwards), list(forwards.values())):
            yield
    finally:
        for module, forward in earlier.items():
            if forward is not None:
                vars(module)["forward"] = forward


def split_projection(bridge: Any) -> dict[Any, Callable[..., Any]]:
    """Fused projection of Hugging Face's module, and a replacement that runs the split ones with their hook points."""
    submodules = getattr(bridge, "submodules", {})
    name = getattr(submodules.get("qkv"), "name", None)
    fused = None if name is None else getattr(own_module(bridge), name, None)
    if fused is None:
        return {}

    def run_parts(x: Tensor) -> Tensor:
        return torch.cat([project(x) for project in (bridge.q, bridge.k, bridge.v)], dim=-1)

    return {fused: run_parts}


def _normed_points(bridge: Any) -> dict[Any, Callable[..., Any]]:
    """Norms of queries and keys with a hook point of TransformerLens after them that has hooks."""
    forwards: dict[Any, Callable[..., Any]] = {}
    for norm_name, point_name in (("q_norm", "hook_q_normed"), ("k_norm", "hook_k_normed")):
        norm, point = bridge._modules.get(norm_name), bridge._modules.get(point_name)
        if norm is not None and point is not None and is_hooked(point):
            forwards[norm] = partial(_norm_with_point, norm.forward, point, bridge)
    return forwards


def _norm_with_point(forward: Any, point: Any, bridge: Any, x: Tensor, *arguments: Any, **named: Any) -> Tensor:
    normed = forward(x, *arguments, **named)
    # TransformerLens's own pass norms [batch head row d]; some of Hugging Face's classes norm [batch row head d].
    rows_first = normed.ndim == 4 and _norms_before_heads(own_module(bridge))
    if not rows_first:
        return point(normed)
    hooked = point(rearrange(normed, "batch row head d -> batch head row d"))
    return rearrange(hooked, "batch head row d -> batch row head d")


def _norms_before_heads(own: Any) -> bool:
    """Whether a class norms its queries before it moves the head axis, as the source of its ``forward`` tells."""
    source = "".join(inspect.getsource(type(own).forward).split())
    return 0 <= source.find("q_norm(") < source.find(".transpose(1,2)")
