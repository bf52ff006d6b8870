"""Which layers are lean: hooks and code of others, the reason why no layer is lean, and when recording is worth it."""

from __future__ import annotations

from collections.abc import Sequence
from types import FunctionType
from typing import Any

import torch

from focuslens.hooks import Hook, layer_of
from focuslens.model.engine import KeyValueCache, is_hooked
from focuslens.model.lean_layer import LeanLayer

__all__ = ["WORTH_RECORDING", "Watch", "divided", "has_global_hooks", "roots_of", "why_not_lean"]

WORTH_RECORDING = 8
"""Number of passes from which on recording them can save time: a recording takes as long as about four passes."""


def divided(hooks: Sequence[Hook], plan: Sequence[LeanLayer | None]) -> tuple[list[Hook], list[Hook]]:
    """Hooks of lean layers, and all other hooks."""
    lean = {layer for layer, form in enumerate(plan) if form is not None}
    own = [hook for hook in hooks if layer_of(hook[0]) in lean]
    return own, [hook for hook in hooks if layer_of(hook[0]) not in lean]


def why_not_lean(cache: Any, plan: Sequence[LeanLayer | None], wanted: bool, agrees: bool | None) -> str:
    """Reason why every layer of a pass runs under TransformerLens.

    Args:
        cache: Cache of the pass.
        plan: The plan; empty if there was no reason to make one.
        wanted: Whether lean layers are wanted.
        agrees: Whether lean layers give the logits of plain passes; ``None`` if this is not known.
    """
    if not wanted:
        return "model.lean is False"
    if plan:
        return "every layer has hooks that FocusLens did not set, or no lean form"
    if agrees is False:
        return "layers that are computed from their weights give other logits"
    return "no layer has a lean form" if isinstance(cache, KeyValueCache) else "the model has a cache of its own"


def roots_of(hooked: Any) -> list[Any]:
    """Modules whose calls lean layers leave out: the model itself, and the list of its blocks."""
    original = getattr(hooked, "original_model", None)
    own = [] if original is None else [original, original.base_model]
    return [hooked, hooked.blocks, *own]


def has_global_hooks() -> bool:
    """Whether hooks of PyTorch act on all modules of the process."""
    module = torch.nn.modules.module
    return bool(
        module._global_forward_hooks  # pyright: ignore[reportPrivateUsage]
        or module._global_forward_pre_hooks  # pyright: ignore[reportPrivateUsage]
    )


class Watch:
    """Finds blocks where the modules have hooks or code of somebody else, for one plan."""

    def __init__(self) -> None:
        self._original: dict[type, bool] = {}

    def acts_on(self, block: Any) -> bool:
        """Whether a module of a block has hooks of somebody else, or is not what its package made it."""
        found: list[Any] = [block]
        for module in found:  # ``block.modules()`` also makes the names, which takes as long as decoding a token
            if not self.is_original(type(module)) or "forward" in module.__dict__:
                return True
            if (
                module._forward_hooks
                or module._forward_pre_hooks
                or module._backward_hooks
                or module._backward_pre_hooks
            ) and is_hooked(module):
                return True
            for name, child in module._modules.items():
                if child is not None:
                    if name.startswith("hook_") and type(child).__name__ != "HookPoint":
                        return True
                    found.append(child)
        return False

    def is_original(self, kind: type) -> bool:
        """Whether a class of modules calculates with the code of its package."""
        if kind not in self._original:
            self._original[kind] = _is_original(kind)
        return self._original[kind]


def _is_original(kind: type) -> bool:
    """Whether a class of modules calculates with the code of its package: no subclass of a user, no patched method."""
    for base in kind.__mro__:
        if base is torch.nn.Module:
            return True
        functions = (value for value in vars(base).values() if isinstance(value, FunctionType))
        if not all(function.__module__.startswith(_PACKAGES) for function in functions):
            return False
    return True


_PACKAGES = ("torch.", "transformers.", "transformer_lens.")
