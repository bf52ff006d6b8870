"""Passes over prompts and the rows after them, layer by layer: from the weights where possible, else under hooks.

A layer is *lean* if its parts are known and if nobody but FocusLens looks at it: all its hooks are functions on rows
(:class:`focuslens.hooks.RowHook`). Other layers run as in every other pass, on the attention engine, and fire all their
hook points. Both kinds can alternate.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from functools import partial
from itertools import groupby
from typing import Any, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from focuslens.hooks import Hook, RowHook, layer_of
from focuslens.model.attention import attend_causally
from focuslens.model.backends import Backend
from focuslens.model.engine import KeyValueCache, Pass, is_hooked
from focuslens.model.lean_attention import Tail
from focuslens.model.lean_choice import Watch, has_global_hooks, roots_of
from focuslens.model.lean_layer import LeanLayer, keys_and_values, run_layer
from focuslens.model.lean_products import Scratch
from focuslens.model.lean_recorded import NotRecorded, PassInputs, RecordedLayer, RecordedRun, Recorder
from focuslens.util.notes import MinorWarning

__all__ = ["LeanDecoder", "LeanPrompts", "lean_agrees", "lean_plan"]


def lean_plan(backend: Backend, hooks: Sequence[Hook], *, prompts: bool = False) -> list[LeanLayer | None]:
    """The lean form of each layer under ``hooks``; ``None`` for a layer that has to run under TransformerLens.

    Hooks that are already set on the model belong to somebody else. Their layers are not lean.

    Args:
        backend: The model.
        hooks: Hooks of FocusLens.
        prompts: Whether the plan is for whole prompts, whose attention a fused kernel computes. Hooks must then change
            every row, and patterns have none. Otherwise the plan is for response rows.
    """
    others = {layer_of(name) for name, hook in hooks if not _is_on_rows(name, hook, prompts)}
    roots, watch = roots_of(backend.hooked), Watch()
    watched = has_global_hooks() or any(
        "forward" in vars(module) or is_hooked(module) or not watch.is_original(type(module)) for module in roots
    )
    # Kernels of torch.autocast round where single operations would not.
    if None in others or watched or torch.is_autocast_enabled(backend.device.type):
        return [None] * backend.shape.n_layers
    layers = backend.lean_layers()
    if len({layer.q.weight.device for layer in layers if layer is not None}) > 1:
        return [None] * len(layers)
    return [
        None if layer is None or i in others or watch.acts_on(block) else layer
        for i, (layer, block) in enumerate(zip(layers, backend.hooked.blocks, strict=True))
    ]


def _is_on_rows(name: str, hook: Any, prompts: bool) -> bool:
    point = name.rsplit(".", 1)[-1]
    if not isinstance(hook, RowHook) or point not in (*_LINEAR, *_PATTERNS):
        return False
    return not prompts or (hook.every_row and point in _LINEAR)


_LINEAR = ("hook_q", "hook_k", "hook_rot_q", "hook_z")
_PATTERNS = ("hook_attn_scores", "hook_pattern")


class _Layers:
    """Layers of a model in order: runs of lean layers, and runs of other ones.

    Args:
        backend: The model.
        plan: Lean form of each layer.
        hooks: Hooks of the lean layers.
    """

    def __init__(self, backend: Backend, plan: Sequence[LeanLayer | None], hooks: Sequence[Hook]) -> None:
        self.backend, self.plan = backend, plan
        self._given, self._handles = hooks, RemovableHandle.next_id
        self._hooks: dict[int, dict[str, list[RowHook]]] = defaultdict(dict)
        for name, hook in hooks:
            layer = layer_of(name)
            if layer is not None and isinstance(hook, RowHook):
                self._hooks[layer].setdefault(name.rsplit(".", 1)[-1], []).append(hook)
        self.edits = {i: self.functions(i) for i in range(len(plan))}

    def runs(self, first: int = 0) -> list[tuple[bool, range]]:
        """Whether each run of layers from ``first`` on is lean, and the places of its layers."""
        runs: list[tuple[bool, range]] = []
        for is_lean, group in groupby(range(first, len(self.plan)), key=lambda i: self.plan[i] is not None):
            places = list(group)
            runs.append((is_lean, range(places[0], places[-1] + 1)))
        return runs

    def functions(self, place: int, *, reads: bool | None = None) -> dict[str, list[Callable[[Tensor], Tensor | None]]]:
        """Functions of a layer's hooks by hook point: all, those that only read, or those that change something."""
        chosen = {
            point: [hook.on_rows for hook in hooks if reads in (None, hook.reads)]
            for point, hooks in self._hooks[place].items()
        }
        return {point: functions for point, functions in chosen.items() if functions}

    def reads_last(self, place: int) -> bool:
        """Whether the functions of a layer that only read come after those that change something."""
        return all(
            [hook.reads for hook in hooks] == sorted(hook.reads for hook in hooks)
            for hooks in self._hooks[place].values()
        )

    def require_unwatched(self, during: str, *, prompts: bool = False) -> None:
        """Raise ``RuntimeError`` if lean layers have hooks of others, which can only have been added meanwhile."""
        if RemovableHandle.next_id == self._handles:  # PyTorch counts the hooks that have been added
            return
        plan = lean_plan(self.backend, self._given, prompts=prompts)
        watched = [i for i, layer in enumerate(plan) if layer is None and self.plan[i] is not None]
        if watched:
            raise RuntimeError(
                f"hooks were added to layers {watched} during {during}, where they would not act; add them before it, "
                "or set model.lean = False"
            )
        self._handles = RemovableHandle.next_id

    def lean(self, place: int) -> LeanLayer:
        layer = self.plan[place]
        assert layer is not None
        return layer


class LeanDecoder:
    """Passes of one row per prompt after a prefix, with lean layers.

    Args:
        backend: The model.
        plan: Lean form of each layer, at least one of which is not ``None``.
        hooks: Hooks of the lean layers.
        cache: Keys and values of the prefix. Layers that are not lean extend it.
        limit: Maximum number of passes.
        recorder: Way to record passes over lean layers, which are then replayed; ``None`` for none.

    Attributes:
        not_recorded: Reason why passes are not recorded although there is a recorder; ``None`` if they are.
    """

    def __init__(
        self,
        backend: Backend,
        plan: Sequence[LeanLayer | None],
        hooks: Sequence[Hook],
        cache: KeyValueCache,
        limit: int,
        recorder: Recorder | None = None,
    ) -> None:
        self._layers, self._cache, self._recorder = _Layers(backend, plan, hooks), cache, recorder
        self._runs = self._layers.runs()
        scratch, recorded = Scratch(), recorder is not None
        self._tails = {
            i: Tail(
                cache.layers[i].segments,
                limit,
                layer.scale,
                self._layers.edits[i],
                recorded=recorded,
                scratch=scratch,
            )
            for i, layer in enumerate(plan)
            if layer is not None
        }
        self._recorded: dict[int, tuple[Sequence[int | None], RecordedRun]] = {}
        self.not_recorded: str | None = None

    def step(self, tokens: Int[Tensor, "batch 1"], mask: Int[Tensor, "batch key"]) -> Float[Tensor, "batch d_vocab"]:
        """Logits of one new token per prompt.

        Args:
            tokens: The new tokens.
            mask: Attention mask of all columns, the new one included.

        Raises:
            RuntimeError: If a hook of somebody else has been added to a lean layer since the first pass.
        """
        rows, backend = Pass(1, mask.cpu()), self._layers.backend
        self._cache.append_attention_mask(mask[:, -1:])
        residual = backend.embed(tokens)
        turns = backend.turns(self._layers.plan, mask, 1, residual)
        hidden: Hidden = {}
        for is_lean, places in self._runs:
            if is_lean:
                residual = self._run(places, residual[:, 0], rows, PassInputs(turns, hidden))[:, None]
            else:
                residual = backend.run_layers(places, residual, mask, self._cache)
        self._layers.require_unwatched("a response")
        return backend.unembed(residual)[:, -1]

    def _run(
        self, places: range, x: Float[Tensor, "row d_model"], rows: Pass, inputs: PassInputs
    ) -> Float[Tensor, "row d_model"]:
        """Output of successive lean layers."""
        windows = [self._window(i, rows, inputs.hidden, x.device) for i in places]
        if self._recorder is not None:
            try:
                return self._recorded_run(places, windows, len(x), self._recorder)(x, inputs)
            except NotRecorded as error:
                self._give_up(str(error))
        for i, window in zip(places, windows, strict=True):
            layer, tail = self._layers.lean(i), self._tails[i]
            tail.hidden = inputs.hidden[window]
            x = run_layer(layer, x, 1, inputs.turns[layer.rotary], tail.attend, self._layers.edits[i])
        return x

    def _window(self, place: int, rows: Pass, hidden: Hidden, device: torch.device) -> int | None:
        """Window of a layer in this pass. Its mask is in ``hidden`` afterwards."""
        window = self._cache.window(place, self._layers.lean(place).window, rows)
        if window not in hidden:
            visible = rows.visible(window, device)
            hidden[window] = None if visible is None else ~visible
        return window

    def _recorded_run(
        self, places: range, windows: Sequence[int | None], n_rows: int, recorder: Recorder
    ) -> RecordedRun:
        known, run = self._recorded.get(places.start, (None, None))
        if run is None or known != windows:  # windows can change after the last prompt token
            if not all(self._layers.reads_last(i) for i in places):
                raise NotRecorded("a hook that changes an activation comes after one that reads it")
            layers = [
                RecordedLayer(
                    self._layers.lean(i),
                    self._tails[i],
                    window,
                    self._layers.functions(i, reads=False),
                    self._layers.functions(i, reads=True),
                )
                for i, window in zip(places, windows, strict=True)
            ]
            run = RecordedRun(layers, n_rows, recorder)
            self._recorded[places.start] = (windows, run)
        return run

    def _give_up(self, reason: str) -> None:
        """Go on without recordings."""
        self._recorder, self.not_recorded = None, reason
        self._recorded.clear()
        for i, tail in self._tails.items():
            tail.release()
            tail.edits = self._layers.edits[i]


Hidden: TypeAlias = dict[int | None, "Tensor | None"]
"""Keys that rows do not attend to, by window; ``None`` if they attend to all."""


class LeanPrompts:
    """One pass over whole prompts with lean layers, which fills a cache.

    Args:
        backend: The model.
        plan: Lean form of each layer for prompts, at least one of which is not ``None``.
        hooks: Hooks of the lean layers.
        cache: Cache without columns in the layers that run.
        mask: Attention mask of the prompts: 1 for a token, 0 for padding on the left.
        held: Number of further tokens of each prompt, which a later pass runs.
    """

    def __init__(
        self,
        backend: Backend,
        plan: Sequence[LeanLayer | None],
        hooks: Sequence[Hook],
        cache: KeyValueCache,
        mask: Int[Tensor, "batch column"],
        held: int,
    ) -> None:
        self._layers, self._cache, self._mask, self._held = _Layers(backend, plan, hooks), cache, mask, held
        self._rows = Pass(mask.shape[1], mask.cpu())

    def run(
        self,
        residual: Float[Tensor, "batch row d_model"],
        *,
        first: int = 0,
        keep: Collection[int] = (),
        logits: bool = False,
        reach: Callable[[int], None] = lambda layer: None,
    ) -> tuple[Float[Tensor, "batch d_vocab"] | None, dict[int, Tensor]]:
        """Run the layers from ``first`` on.

        Args:
            residual: Input of the layer ``first``.
            first: First layer to run.
            keep: Layers whose inputs are returned.
            logits: Whether the logits of the last row are needed. Otherwise the pass ends when the cache is complete.
            reach: Function that is called with the index of each layer that begins.

        Returns:
            The logits, and the inputs ``[batch row d_model]`` by layer.

        Raises:
            RuntimeError: If a hook of somebody else has been added to a lean layer meanwhile.
        """
        backend, n_rows, last = self._layers.backend, self._mask.shape[1], len(self._layers.plan) - 1
        self._cache.append_attention_mask(self._mask)
        turns = backend.turns(self._layers.plan, self._mask, n_rows, residual, self._held)
        stored: dict[int, Tensor] = {}
        for is_lean, places in self._layers.runs(first):
            for part in [places] if is_lean else [range(i, i + 1) for i in places]:
                if not is_lean:
                    reach(part.start)
                    stored |= {part.start: residual} if part.start in keep else {}
                    to_keys = not logits and part.start == last
                    residual = backend.run_layers(
                        part, residual, self._mask, self._cache, to_keys=to_keys, held=self._held
                    )
                    continue
                x = residual.flatten(0, 1)
                for i in part:
                    reach(i)
                    stored |= {i: x.unflatten(0, (-1, n_rows))} if i in keep else {}
                    layer, edits = self._layers.lean(i), self._layers.edits[i]
                    turn = turns[layer.rotary]
                    if i == last and not logits:
                        self._append(i, *keys_and_values(layer, x, n_rows, turn, edits))
                        break
                    x = run_layer(layer, x, n_rows, turn, partial(self._attend, i), edits)
                residual = x.unflatten(0, (-1, n_rows))
        self._layers.require_unwatched("the prompts", prompts=True)
        return (backend.unembed(residual[:, -1:])[:, -1] if logits else None), stored

    def _append(self, place: int, keys: Tensor, values: Tensor) -> None:
        self._cache.layers[place].append(*(x.unflatten(0, (-1, self._mask.shape[1])) for x in (keys, values)))

    def _attend(self, place: int, q: Tensor, keys: Tensor, values: Tensor) -> Float[Tensor, "row head d_head"]:
        self._append(place, keys, values)
        layer = self._layers.lean(place)
        window = self._cache.window(place, layer.window, self._rows)
        segment, padding = self._cache.layers[place].segments[0], self._rows.left_padding
        assert padding is not None, "lean layers run whole prompts, padded on the left"
        rows = q.unflatten(0, (-1, self._mask.shape[1]))
        return attend_causally(rows, segment, padding, window, layer.scale).flatten(0, 1)


@torch.no_grad()
def lean_agrees(backend: Backend) -> bool | None:
    """Whether lean layers give the logits of plain passes, up to rounding, for four test tokens and a fifth after them.

    The model must have no hooks on hook points. The result is ``None`` if it has no lean layers now.
    """
    plan = lean_plan(backend, ())
    tokens = torch.arange(1, 6, device=backend.device)[None] % backend.shape.d_vocab
    mask, plain, lean = torch.ones(1, 5, dtype=torch.long), backend.new_cache(1, 4), backend.new_cache(1, 4)
    if not any(plan) or not isinstance(plain, KeyValueCache):
        return None
    expected = [backend.forward(tokens[:, :4], mask[:, :4], plain, last_only=True)[:, -1]]
    expected.append(backend.forward(tokens[:, 4:], mask, plain, last_only=True)[:, -1])
    prompts = LeanPrompts(backend, plan, (), lean, mask[:, :4], held=0)
    first, _ = prompts.run(backend.embed(tokens[:, :4]), logits=True)
    assert first is not None
    second = LeanDecoder(backend, plan, (), lean, 1).step(tokens[:, 4:], mask)
    tolerance = 1e-4 if first.dtype in (torch.float32, torch.float64) else 0.05
    agree = all(
        bool((ours - theirs).abs().max() <= tolerance * theirs.abs().max())
        for ours, theirs in zip((first, second), expected, strict=True)
    )
    if not agree:
        text = "layers that are computed from their weights give other logits, so all run under TransformerLens"
        warnings.warn(text, MinorWarning, stacklevel=3)
    return agree
