"""Interface between interventions and models. Interventions provide ordinary TransformerLens hooks.

A hook is a ``(name, function)`` pair that TransformerLens's ``run_with_hooks`` and ``hooks()`` accept.

The *column* of a token is its position in the padded prompt and response, counted from 0. Padding tokens count too.
Each row of a forward pass belongs to one token, and has the column of this token. With a key-value cache, a pass
computes only the rows of the newest tokens. A hook therefore needs the column of the first row in the pass. If the
hook's tensor has a key axis, this column is ``number of keys - number of rows``, because the last row and the last key
belong to the same token. Query tensors have no key axis. Hooks on query tensors therefore read the column from a
:class:`Cursor`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, TypeVar, cast, runtime_checkable

from torch import Tensor

from focuslens.heads import Head, ModelShape
from focuslens.prompts.batch import PromptBatch, PromptInput

__all__ = [
    "Cursor",
    "Hook",
    "HookTarget",
    "Intervention",
    "PromptLike",
    "RowHook",
    "checked_interventions",
    "hook_name",
    "is_intervention",
    "is_row_wise",
    "last_layer",
    "layer_of",
    "on_prompt",
    "row_wise",
]

Hook: TypeAlias = tuple[str, Callable[[Tensor, Any], Tensor | None]]
"""A TransformerLens forward hook: the name of a hook point and a function ``(tensor, hook) -> tensor or None``."""

PromptLike: TypeAlias = PromptInput | PromptBatch | Sequence[PromptInput]
"""One prompt, or several prompts that form a left-padded batch."""


def hook_name(layer: int, point: str) -> str:
    """Full name of an attention hook point, e.g. ``blocks.3.attn.hook_pattern``."""
    return f"blocks.{layer}.attn.{point}"


def layer_of(name: str) -> int | None:
    """Index of the layer that a hook point belongs to; ``None`` for a hook point outside the layers."""
    parts = name.split(".")
    return int(parts[1]) if parts[0] == "blocks" else None


def last_layer(names: Iterable[str]) -> int | None:
    """Index of the last layer that contains one of the hook points.

    The index is ``None`` if there are no hook points, or if any hook point is outside the layers.
    """
    layers = [layer_of(name) for name in names]
    return None if None in layers else max((layer for layer in layers if layer is not None), default=None)


_F = TypeVar("_F", bound="Callable[..., Any]")


def row_wise(hook: _F) -> _F:
    """Mark a hook on ``hook_attn_scores`` or ``hook_pattern`` as able to process blocks of rows.

    To limit memory, FocusLens then calls the hook once per block ``[batch head row key]`` instead of once for all rows.
    The last key and the last row of a block belong to the same column. The column of the block's first row is therefore
    ``number of keys - number of rows``.
    """
    hook.row_wise = True  # type: ignore[attr-defined]
    return hook


def is_row_wise(hook: Any) -> bool:
    """Whether a hook was marked with :func:`row_wise`."""
    return bool(getattr(hook, "row_wise", False))


class RowHook:
    """Hook of TransformerLens with a function for passes in which it changes every row.

    While the model decodes, every row of a pass belongs to the response. FocusLens then computes layers without
    TransformerLens's hook points if all hooks of a layer are of this class, and calls ``on_rows`` where the hook point
    would have called the hook. It does the same for prompts if ``every_row`` is true.

    Args:
        hook: The hook, ``(tensor, hook) -> tensor or None``. It finds the rows to change.
        on_rows: Function ``(tensor) -> tensor or None`` that changes all rows of a tensor, in place or in a copy;
            ``None`` means the tensor itself. The axes are ``[batch row head d_head]`` for queries, keys and outputs of
            heads, and ``[batch head row key]`` for scores and patterns, whose keys are all columns so far. The tensor
            may change after the call, so that a function keeps copies.
        every_row: Whether the hook changes the rows of prompts too.
        reads: Whether ``on_rows`` only reads its tensor. Other functions must depend on nothing but the tensor, because
            passes can be recorded (``compile=True``). In recorded passes the keys include later columns, whose scores
            are minus infinity.
    """

    def __init__(
        self,
        hook: Callable[[Tensor, Any], Tensor | None],
        on_rows: Callable[[Tensor], Tensor | None],
        *,
        every_row: bool = False,
        reads: bool = False,
    ) -> None:
        self.hook, self.on_rows, self.every_row, self.reads = hook, on_rows, every_row, reads
        self.row_wise = is_row_wise(hook)

    def __call__(self, tensor: Tensor, hook: Any) -> Tensor | None:
        """Call the hook."""
        return self.hook(tensor, hook)


@dataclass
class Cursor:
    """Column of the first row in the current forward pass: the row's position in the padded prompt and response.

    :class:`focuslens.FocusModel` sets ``start`` to this column before each pass. If TransformerLens's
    ``run_with_hooks`` is called directly, ``start`` is ``None``, and the column is inferred from the number of rows. A
    pass with at least as many rows as the padded prompt is assumed to start at column 0. A shorter pass is assumed to
    continue a cache that contains the whole prompt, or the whole prompt except its last token.
    """

    start: int | None = None

    def first_response_row(self, batch: PromptBatch, n_rows: int) -> int:
        """Index, within this pass, of the first row that produces a response token."""
        if self.start is not None:
            return batch.first_response_row(self.start)
        return batch.width - 1 if n_rows >= batch.width else 0


@runtime_checkable
class HookTarget(Protocol):
    """Model interface that interventions use to build their hooks, implemented by :class:`focuslens.FocusModel`."""

    @property
    def shape(self) -> ModelShape:
        """Sizes of the model, such as its numbers of layers and heads."""
        ...

    def batch(self, prompts: PromptLike) -> PromptBatch:
        """Left-padded batch of one or more prompts."""
        ...

    def require_acting(self, names: Iterable[str]) -> None:
        """Check that a hook on each named hook point can change the logits.

        Raises:
            ValueError: If the model lacks one of the hook points, a hook point never fires, or the model ignores the
                tensor that a hook returns.
        """
        ...

    def cache_window(self, layer: int) -> int | None:
        """Maximum number of keys that TransformerLens's cache keeps in a layer; ``None`` if there is no limit."""
        ...

    @property
    def sink_layers(self) -> frozenset[int]:
        """Layers whose heads have a further logit without a value (gpt-oss).

        Rows of their patterns sum to less than one. The rest is the mass of this logit, the sink.
        """
        ...

    def require_running(self, batch: PromptBatch, start: int, n_rows: int | None) -> None:
        """Check that the pass that is running runs the tokens of ``batch``. Hooks call this method.

        Only the rows of the pass are compared, as far as they belong to the prompts. Tokens after the prompts can be
        any. A pass that does not begin with the embedding is not checked, because its tokens are unknown.

        Args:
            batch: The prompts that the hooks were made for.
            start: Column of the first row in the pass.
            n_rows: Number of rows in the pass; ``None`` if only the first column is known.

        Raises:
            ValueError: If the pass runs other tokens.
        """
        ...


@runtime_checkable
class Intervention(Protocol):
    """Immutable description of a change to the forward pass. The hooks that :meth:`hooks` returns make the change."""

    @property
    def heads(self) -> tuple[Head, ...] | None:
        """Heads that the intervention acts on; ``None`` for all heads of the layers that it acts on."""
        ...

    @property
    def changes_prompt(self) -> bool:
        """Whether the intervention changes rows before the last prompt token, and thus the prompt's keys and values."""
        ...

    def describe(self) -> dict[str, Any]:
        """Kind and settings of the intervention as JSON values, for result files."""
        ...

    def hooks(self, model: HookTarget, prompt: PromptLike | None = None, *, cursor: Cursor | None = None) -> list[Hook]:
        """Hooks for one prompt or one left-padded batch, in the order in which the model must run the hooks."""
        ...


def checked_interventions(values: Any, name: str = "interventions") -> tuple[Intervention, ...]:
    """The interventions of an argument as a tuple. Every function that takes interventions checks them here.

    Args:
        values: The argument: a list, a tuple, or another iterable. It is read once, so that a generator is not empty
            when interventions are set again for the next pass.
        name: Name of the argument, for messages.

    Raises:
        TypeError: If the argument is not a sequence of interventions, for example a single one.
    """
    if is_intervention(values):
        kind = type(values).__name__
        raise TypeError(f"{name} is one {kind}; it must be a list of interventions, such as [{kind}(...)]")
    if isinstance(values, str | bytes | Mapping | Tensor) or not isinstance(values, Iterable):
        raise TypeError(f"{name} is {_shown(values)}; {_INTERVENTIONS}")
    items = tuple(cast("Iterable[Any]", values))
    for i, item in enumerate(items):
        if not is_intervention(item):
            raise TypeError(f"{name}[{i}] is {_shown(item)}; {_INTERVENTIONS}")
    return items


_INTERVENTIONS = (
    "it must be a list of interventions, such as [fl.SplitSoftmax(heads, tau)] ([] for none); a plain hook goes to "
    "model.hooked.hooks(fwd_hooks=[...])"
)


def is_intervention(value: Any) -> bool:
    """Whether a value is an intervention, rather than for example a class of interventions or a plain hook."""
    return not isinstance(value, type) and hasattr(value, "hooks") and hasattr(value, "changes_prompt")


def _shown(value: Any) -> str:
    if value is None:
        return "None"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    return f"a {type(value).__name__}" if isinstance(value, Tensor) else f"{value!r:.80}, a {type(value).__name__}"


def on_prompt(interventions: Sequence[Intervention]) -> list[Intervention]:
    """Interventions that change prompt rows.

    An intervention with a ``prompt_part`` method is replaced by the result of this method.
    """
    return [_prompt_part(intervention) for intervention in interventions if intervention.changes_prompt]


def _prompt_part(intervention: Intervention) -> Intervention:
    part = getattr(intervention, "prompt_part", None)
    return intervention if part is None else part()
