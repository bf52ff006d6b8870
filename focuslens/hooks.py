"""The language interventions speak: ordinary TransformerLens hooks.

A hook is a ``(name, function)`` pair, usable in anyone's ``run_with_hooks`` or ``hooks()``. With a key-value cache a
forward pass sees only the newest rows, so a hook must know which column its first row stands in. Where the tensor
holds a key axis that is ``number of keys - number of rows``; at the query hooks it is a :class:`Cursor`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, TypeVar, runtime_checkable

from torch import Tensor

from focuslens.heads import Head, ModelShape
from focuslens.prompts.batch import EncodedPrompt, PromptBatch
from focuslens.prompts.prompt import Prompt

__all__ = [
    "Cursor",
    "Hook",
    "HookTarget",
    "Intervention",
    "PromptLike",
    "hook_name",
    "is_row_wise",
    "last_layer",
    "layer_of",
    "on_prompt",
    "row_wise",
]

Hook: TypeAlias = "tuple[str, Callable[[Tensor, Any], Tensor | None]]"
"""A TransformerLens forward hook: the hook point's name and the function ``(tensor, hook) -> tensor or None``."""

PromptLike: TypeAlias = "str | Prompt | EncodedPrompt | PromptBatch | Sequence[str] | Sequence[EncodedPrompt]"
"""One prompt, or a batch of prompts that is padded on the left."""


def hook_name(layer: int, point: str) -> str:
    """The full name of an attention hook point, e.g. ``blocks.3.attn.hook_pattern``."""
    return f"blocks.{layer}.attn.{point}"


def layer_of(name: str) -> int | None:
    """The layer that a hook point is in; ``None`` for one outside the layers."""
    parts = name.split(".")
    return int(parts[1]) if parts[0] == "blocks" else None


def last_layer(names: Iterable[str]) -> int | None:
    """The last layer that any of the hook points is in; ``None`` where one is outside the layers, or there is none."""
    layers = [layer_of(name) for name in names]
    return None if None in layers else max((layer for layer in layers if layer is not None), default=None)


_F = TypeVar("_F", bound="Callable[..., Any]")


def row_wise(hook: _F) -> _F:
    """Mark a hook on ``hook_attn_scores`` or ``hook_pattern`` that can do with some rows at a time.

    FocusLens then calls it with ``[batch head row key]`` blocks of bounded memory instead of once with all rows. A
    block ends with its last row's own column: its first row stands in column ``number of keys - number of rows``.
    """
    hook.row_wise = True  # type: ignore[attr-defined]
    return hook


def is_row_wise(hook: Any) -> bool:
    """Whether a hook is marked by :func:`row_wise`."""
    return bool(getattr(hook, "row_wise", False))


@dataclass
class Cursor:
    """The column in which the rows of the current forward pass begin.

    ``start`` is set by whoever runs the model pass by pass. Left at ``None``, as in a user's own ``run_with_hooks``,
    it is inferred: a pass with at least as many rows as the prompt starts at column 0, a shorter one continues a
    cache that holds everything before it.
    """

    start: int | None = None

    def first_response_row(self, batch: PromptBatch, n_rows: int) -> int:
        """Index of the first row of this pass that produces a response token."""
        if self.start is not None:
            return batch.first_response_row(self.start)
        return batch.width - 1 if n_rows >= batch.width else 0


@runtime_checkable
class HookTarget(Protocol):
    """The part of a model that an intervention needs to make its hooks; :class:`focuslens.FocusModel` is one."""

    @property
    def shape(self) -> ModelShape:
        """Layers, heads and sizes."""
        ...

    def batch(self, prompts: PromptLike) -> PromptBatch:
        """One prompt or several as a left-padded batch."""
        ...

    def require_acting(self, names: Iterable[str]) -> None:
        """Refuse hook points at which a hook changes nothing.

        Raises:
            ValueError: If the model has no such point, or it never fires, or ignores the value of a hook.
        """
        ...

    def cache_window(self, layer: int) -> int | None:
        """Keys that TransformerLens's own cache keeps of a layer; ``None`` for all of them."""
        ...


@runtime_checkable
class Intervention(Protocol):
    """A change of the forward pass: a frozen value that gives TransformerLens hooks."""

    @property
    def heads(self) -> tuple[Head, ...]:
        """The heads it acts on."""
        ...

    @property
    def changes_prompt(self) -> bool:
        """Whether rows before the last prompt token change, and with them the prompt's keys and values."""
        ...

    def describe(self) -> dict[str, Any]:
        """Kind and settings, as JSON, for result files."""
        ...

    def hooks(self, model: HookTarget, prompt: PromptLike | None = None, *, cursor: Cursor | None = None) -> list[Hook]:
        """Hooks for one prompt or one left-padded batch, in the order in which they must be added."""
        ...


def on_prompt(interventions: Sequence[Intervention]) -> list[Intervention]:
    """What changes the prompt's own rows; of an intervention that has a ``prompt_part()``, that part."""
    return [getattr(one, "prompt_part", lambda one=one: one)() for one in interventions if one.changes_prompt]
