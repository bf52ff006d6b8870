"""Do a model's hook points act? Some carry the name of one and never fire, or fire and ignore what a hook returns.

``TransformerBridge`` boots dozens of architectures, and on some of them attention is computed by Hugging Face's own
kernel: ``hook_rot_q`` may never fire (Phi-3, GPT-NeoX), an edited ``hook_pattern`` may go nowhere (OPT, GPT-J). An
intervention there would seem to do nothing. So each point is tried out once a model, on a pass of four tokens.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from focuslens.model.backends import Backend

__all__ = ["HookPoints", "attention_points"]

_POINTS = ("hook_q", "hook_k", "hook_rot_q", "hook_rot_k", "hook_attn_scores", "hook_pattern", "hook_z")
"""The points on which the package sets hooks."""


def _point(name: str) -> str:
    return name.rsplit(".", 1)[-1]


def attention_points(backend: Backend, point: str) -> list[str]:
    """Full names of one attention hook point in every layer that has it."""
    names, present = (
        (f"blocks.{layer}.attn.{point}" for layer in range(backend.shape.n_layers)),
        backend.hooked.hook_dict,
    )
    return [name for name in names if name in present]


class HookPoints:
    """Which attention hook points of a model fire, and at which of them an edit changes the logits."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        # Only what was found good is remembered: whoever repairs a model is not refused for what it was.
        self._present: set[str] = set()
        self._firing: set[str] = set()
        self._acting: set[str] = set()

    def require_firing(self, names: Iterable[str]) -> None:
        """Check that hooks on these points see something.

        Raises:
            ValueError: If the model has no such point, or it never fires.
        """
        self._backend.require_supported()
        wanted = sorted(set(names))
        # A bridge puts its dictionary together anew each time, which takes longer than a layer.
        if not self._present.issuperset(wanted):
            self._present.update(self._backend.hooked.hook_dict)
        missing = [name for name in wanted if name not in self._present]
        if missing:
            raise ValueError(f"{self._kind} has no hook point {missing[0]!r}; hooks on it would be ignored")
        points = {_point(name) for name in wanted if _point(name) in _POINTS and name not in self._firing}
        for point in sorted(points):
            self._watch(point)
        silent = [name for name in wanted if _point(name) in _POINTS and name not in self._firing]
        if silent:
            raise ValueError(f"{silent[0]} of this {self._kind} never fires, so nothing can be seen or changed there")

    def require_acting(self, names: Iterable[str]) -> None:
        """Check that hooks on these points can change anything.

        Raises:
            ValueError: If the model has no such point, or it never fires, or ignores what a hook returns.
        """
        wanted = sorted(set(names))
        self.require_firing(wanted)
        for name in wanted:
            point = _point(name)
            if point in _POINTS and point not in self._acting:
                # With hooks on the same points both times: where hooks are may decide how attention is computed.
                firing = [other for other in attention_points(self._backend, point) if other in self._firing]
                if torch.equal(self._run((n, _see) for n in firing), self._run((n, _disturb) for n in firing)):
                    raise ValueError(
                        f"{name} of this {self._kind} ignores what a hook returns, so interventions there would do "
                        "nothing"
                    )
                self._acting.add(point)

    def _watch(self, point: str) -> None:
        """Find out in which layers a point fires."""

        def watch(name: str) -> tuple[str, Any]:
            def see(tensor: Tensor, hook: Any) -> None:
                # By the name asked for: a bridge's hook points have several, and know themselves by another.
                self._firing.add(name)

            return name, see

        self._run(watch(name) for name in attention_points(self._backend, point))

    @torch.no_grad()
    def _run(self, hooks: Iterable[tuple[str, Any]]) -> Tensor:
        hooked = self._backend.hooked
        tokens = torch.arange(1, 5, device=self._backend.device)[None] % self._backend.shape.d_vocab
        with _without_hooks(hooked), hooked.hooks(fwd_hooks=list(hooks)):
            return self._backend.forward(tokens, torch.ones_like(tokens), None, last_only=True)

    @property
    def _kind(self) -> str:
        hooked = self._backend.hooked
        architecture = getattr(hooked.cfg, "architecture", None) or getattr(hooked.cfg, "original_architecture", None)
        return f"{type(hooked).__name__} ({architecture})" if architecture else type(hooked).__name__


@contextmanager
def _without_hooks(hooked: Any) -> Generator[None]:
    """Lift whatever hooks others have set: these four tokens are none of theirs."""
    points = list({id(point): point for point in hooked.hook_dict.values()}.values())
    kept = [(store, list(store.items())) for p in points for store in (p._forward_hooks, p._forward_pre_hooks)]
    for store, _ in kept:
        store.clear()
    try:
        yield
    finally:
        for store, entries in kept:
            store.clear()
            store.update(entries)


def _see(tensor: Tensor, hook: Any) -> None:
    pass


def _disturb(tensor: Tensor, hook: Any) -> Tensor:
    """Other numbers, the same every time and without the global random state."""
    return torch.linspace(-3, 3, tensor.numel(), device=tensor.device).reshape(tensor.shape).to(tensor.dtype)
