"""Verification that a model's hook points fire, and that edits of their activations change the logits.

``TransformerBridge`` supports dozens of architectures. In some architectures, a Hugging Face kernel computes attention.
``hook_rot_q`` then never fires (Phi-3, GPT-NeoX), or an edit of ``hook_pattern`` has no effect (OPT, GPT-J). An
intervention on one of these hook points would silently have no effect. Each hook point is therefore tested once per
model, with passes over four tokens.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable
from contextlib import contextmanager
from contextvars import ContextVar
from threading import RLock
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from focuslens.hooks import hook_name
from focuslens.model.backends import Backend
from focuslens.model.engine import without_hooks

__all__ = ["HookPoints", "attention_points", "kind_of", "lock_of", "own_passes"]

_locks: WeakKeyDictionary[Any, RLock] = WeakKeyDictionary()

_POINTS = ("hook_q", "hook_k", "hook_rot_q", "hook_rot_k", "hook_attn_scores", "hook_pattern", "hook_z")
"""Attention hook points on which the package sets hooks."""


def lock_of(hooked: Any) -> RLock:
    """The lock of a TransformerLens model, so that no pass runs under hooks that other threads have set."""
    return _locks.setdefault(hooked, RLock())


def kind_of(hooked: Any) -> str:
    """Class and architecture of a TransformerLens model, for error messages."""
    architecture = getattr(hooked.cfg, "architecture", None) or getattr(hooked.cfg, "original_architecture", None)
    return f"{type(hooked).__name__} ({architecture})" if architecture else type(hooked).__name__


def _point(name: str) -> str:
    return name.rsplit(".", 1)[-1]


def attention_points(backend: Backend, point: str) -> list[str]:
    """Full names of an attention hook point, one per layer that has the hook point."""
    names = [hook_name(layer, point) for layer in range(backend.shape.n_layers)]
    points = backend.hooked.hook_dict
    return [name for name in names if name in points]


_own: ContextVar[bool] = ContextVar("_own", default=False)


@contextmanager
def own_passes() -> Generator[None]:
    """Context in which hooks are made for passes of FocusLens, rather than for TransformerLens's ``run_with_hooks``."""
    token = _own.set(True)
    try:
        yield
    finally:
        _own.reset(token)


class HookPoints:
    """Verifier of attention hook points: they must fire, and edits of their activations must change the logits."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        # Only successful checks are remembered. A failed check is repeated, because the model may have been fixed.
        self._present: set[str] = set()
        self._firing: set[str] = set()
        self._acting: set[str] = set()
        self._acting_plainly: set[str] = set()

    def require_firing(self, names: Iterable[str]) -> None:
        """Check that hooks on the named hook points are called.

        Raises:
            ValueError: If a hook point does not exist or never fires.
        """
        self._backend.require_supported()
        required = sorted(set(names))
        # A bridge rebuilds ``hook_dict`` at every access. This takes longer than the forward pass of a layer.
        if not self._present.issuperset(required):
            self._present.update(self._backend.hooked.hook_dict)
        missing = [name for name in required if name not in self._present]
        if missing:
            raise ValueError(f"{self._kind} has no hook point {missing[0]!r}; hooks on it would be ignored")
        points = {_point(name) for name in required if _point(name) in _POINTS and name not in self._firing}
        for point in sorted(points):
            self._watch(point)
        silent = [name for name in required if _point(name) in _POINTS and name not in self._firing]
        if silent:
            raise ValueError(f"{silent[0]} of this {self._kind} never fires, so a hook there would have no effect")

    def require_acting(self, names: Iterable[str]) -> None:
        """Check that hooks on the named hook points can change the logits.

        Raises:
            ValueError: If a hook point does not exist or never fires, or if the model ignores the tensors that hooks on
                a hook point return.
        """
        required = sorted(set(names))
        self.require_firing(required)
        for name in required:
            point = _point(name)
            if point in _POINTS and point not in self._acting:
                # Both passes have hooks on the same hook points, because the numerical results of attention can depend
                # on which hook points have hooks.
                firing = [other for other in attention_points(self._backend, point) if other in self._firing]
                if torch.equal(self._run((n, _observe) for n in firing), self._run((n, _disturb) for n in firing)):
                    raise ValueError(
                        f"{name} of this {self._kind} ignores what a hook returns, so interventions there would have "
                        "no effect"
                    )
                self._acting.add(point)

    def require_acting_plainly(self, names: Iterable[str]) -> None:
        """Check that hooks change the logits of TransformerLens's own passes too, for hooks that may run there.

        On the attention engine, hook points can act that TransformerLens's own attention ignores (Llama 4, Phi-3).

        Raises:
            ValueError: If the edits of a hook point change nothing.
        """
        if _own.get() or not self._backend.is_measured:
            return
        for name in sorted(set(names)):
            point = _point(name)
            if point not in _POINTS or point in self._acting_plainly:
                continue
            firing = attention_points(self._backend, point)
            observed = self._run(((n, _observe) for n in firing), plain=True)
            if torch.equal(observed, self._run(((n, _disturb) for n in firing), plain=True)):
                raise ValueError(
                    f"{name} of this {self._kind} acts in the passes of a FocusModel only; in TransformerLens's own "
                    "passes, hooks there would have no effect. Pass the intervention to the FocusModel instead, as in "
                    "model.generate(prompt, [intervention])"
                )
            self._acting_plainly.add(point)

    def _watch(self, point: str) -> None:
        """Record the layers in which a hook point fires."""

        def recording(name: str) -> tuple[str, Any]:
            def record(tensor: Tensor, hook: Any) -> None:
                # A hook point of a bridge has several names. ``hook.name`` may therefore differ from ``name``.
                self._firing.add(name)

            return name, record

        self._run(recording(name) for name in attention_points(self._backend, point))

    @torch.no_grad()
    def _run(self, hooks: Iterable[tuple[str, Any]], *, plain: bool = False) -> Tensor:
        """Logits of the last of four test tokens, from a pass with ``hooks`` as the only hooks.

        With ``plain``, the pass is TransformerLens's own.
        """
        hooked = self._backend.hooked
        tokens = torch.arange(1, 5, device=self._backend.device)[None] % self._backend.shape.d_vocab
        # The check removes all hooks for one pass, so it waits for passes under the hooks of other threads.
        with lock_of(hooked), without_hooks(hooked), hooked.hooks(fwd_hooks=list(hooks)):
            if plain:
                return hooked(tokens, return_type="logits", attention_mask=torch.ones_like(tokens))[:, -1:]
            return self._backend.forward(tokens, torch.ones_like(tokens), None, last_only=True)

    @property
    def _kind(self) -> str:
        return kind_of(self._backend.hooked)


def _observe(tensor: Tensor, hook: Any) -> None:
    """Leave the tensor unchanged."""


def _disturb(tensor: Tensor, hook: Any) -> Tensor:
    """Replace the tensor with fixed values. Random values would change the global random state."""
    return torch.linspace(-3, 3, tensor.numel(), device=tensor.device).reshape(tensor.shape).to(tensor.dtype)
