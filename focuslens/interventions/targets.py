"""Strength per prompt: split-softmax and steering that bring the heads' attention to a target."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from jaxtyping import Float
from torch import Tensor

from focuslens.heads import Head, as_heads, check_heads, heads_by_layer
from focuslens.hooks import Cursor, Hook, HookTarget, Intervention, PromptLike, RowHook, hook_name
from focuslens.interventions.base import Positions, checked_span, require_prompt
from focuslens.interventions.directions import FocusDirections
from focuslens.interventions.lanes import Lanes
from focuslens.interventions.split_softmax import SplitSoftmax
from focuslens.interventions.steering import FocusSteering
from focuslens.model.question_rows import question_attention
from focuslens.prompts.batch import PromptBatch, SpanLike
from focuslens.util.checks import checked_share, numbers

if TYPE_CHECKING:
    from focuslens.model.focus_model import FocusModel
    from focuslens.model.generation import Prefix

__all__ = ["TargetedSplitSoftmax", "TargetedSteering"]

SINK = "sink"
"""Name of the first two tokens and the sinks of heads as a part."""


@dataclass(frozen=True)
class TargetedSplitSoftmax:
    r"""Split-softmax whose exponent lets the heads attend to a span with a given mean mass, for each prompt.

    In the row of the last prompt token, head :math:`h` has the mass :math:`p_h` on the span. The exponent
    :math:`\tau \le 1` solves :math:`\frac{1}{n} \sum_h p_h^\tau = m`. It is 1 if the mean mass is :math:`m` or more
    already, or if a mass is on no token of the span.

    Args:
        heads: ``(layer, head)`` pairs.
        mass: The mean mass :math:`m`, from 0 to 1. At 1, all attention is on the span.
        span: Span whose attention is raised; see :class:`SplitSoftmax`.
    """

    heads: tuple[Head, ...]
    mass: float
    span: SpanLike = "relevant"

    def __init__(self, heads: Iterable[tuple[int, int]], mass: float, span: SpanLike = "relevant") -> None:
        object.__setattr__(self, "heads", as_heads(heads))
        object.__setattr__(self, "mass", checked_share(mass, "mass"))
        object.__setattr__(self, "span", checked_span(span))

    @property
    def changes_prompt(self) -> bool:
        """Always ``False``, because only the rows that produce the response change."""
        return False

    def describe(self) -> dict[str, Any]:
        """Kind and settings of the intervention as JSON values."""
        heads = [list(head) for head in self.heads]
        return {"kind": "targeted_split_softmax", "mass": self.mass, "span": self.span, "heads": heads}

    def hooks(self, model: HookTarget, prompt: PromptLike | None = None, *, cursor: Cursor | None = None) -> list[Hook]:
        """TransformerLens hooks. The prompts are run first, to find the exponents.

        Raises:
            ValueError, KeyError, TypeError: As for :meth:`SelfFocus.hooks`.
        """
        return _hooks(self, model, prompt, cursor, "targeted split-softmax")

    def resolve(self, model: FocusModel, prefix: Prefix, max_new_tokens: int = 100) -> tuple[PromptBatch, Intervention]:
        """The prompts of a prefix, and split-softmax with an exponent for each prompt."""
        del max_new_tokens
        taus = self.taus(model, prefix)
        return prefix.batch, Lanes([[SplitSoftmax(self.heads, tau, self.span)] for tau in taus])

    def taus(self, model: FocusModel, prefix: Prefix) -> list[float]:
        """The exponent for each prompt of a prefix."""
        heads = check_heads(self.heads, model.shape.n_layers, model.shape.n_heads)
        rows = question_attention(model, prefix, heads, "last").attention
        inside = prefix.batch.columns(self.span, prefix.batch.width)
        return [
            _exponent(row[:, columns].double().sum(dim=-1), self.mass)
            for row, columns in zip(rows, inside, strict=True)
        ]


def _exponent(masses: Float[Tensor, "head"], target: float) -> float:
    """The exponent ``tau <= 1`` at which the mean of ``masses ** tau`` is the target."""
    if not len(masses) or bool((masses <= 0).any()) or float(masses.mean()) >= target:
        return 1.0
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if float((masses**middle).mean()) > target else (low, middle)
    return high if target < 1 else 0.0


@dataclass(frozen=True, eq=False)
class TargetedSteering:
    """Focus steering whose strength brings the heads' attention to a target, for each prompt.

    The attention of the steered heads in the row of the last prompt token is measured at each strength of ``alphas``.
    The strength of a prompt is the first at which the mean mass on a part reaches the target, on the line between two
    measurements. For the sink the mass falls to the target, for other parts it rises. If no strength reaches the
    target, the one with the nearest mass is taken.

    The magnitude control of the paper's revised version was not available. This is an algorithm of our own.

    Args:
        directions: Focus directions.
        mass: The target, from 0 to 1.
        heads: Heads to steer; the default is all heads with a direction.
        part: ``sink`` for the first two tokens and the sinks of heads (gpt-oss), or a span, such as ``document``.
        alphas: Strengths to measure, in the order in which they are tried. The first one must be 0.
        positions: Rows to steer; see :class:`FocusSteering`. With ``all``, each strength runs the prompt again.
    """

    directions: FocusDirections
    mass: float
    heads: tuple[Head, ...]
    part: SpanLike
    alphas: tuple[float, ...]
    positions: Positions

    def __init__(
        self,
        directions: FocusDirections,
        mass: float,
        heads: Iterable[tuple[int, int]] | None = None,
        *,
        part: SpanLike = SINK,
        alphas: Sequence[float] = (0, 0.25, 0.5, 1, 2),
        positions: Positions = "all",
    ) -> None:
        example = FocusSteering(directions, 0, heads, positions)
        strengths = tuple(float(alpha) for alpha in numbers(alphas, "alphas"))
        if len(strengths) < 2 or strengths[0] != 0:
            raise ValueError(f"alphas are {strengths}; there must be 0 first, and at least one strength after it")
        object.__setattr__(self, "directions", example.directions)
        object.__setattr__(self, "mass", checked_share(mass, "mass"))
        object.__setattr__(self, "heads", example.heads)
        object.__setattr__(self, "part", checked_span(part))
        object.__setattr__(self, "alphas", strengths)
        object.__setattr__(self, "positions", positions)

    @property
    def changes_prompt(self) -> bool:
        """Whether rows before the last prompt token are also steered."""
        return self.positions == "all"

    def describe(self) -> dict[str, Any]:
        """Kind and settings of the intervention as JSON values, with a digest in place of the directions."""
        return {
            "kind": "targeted_steering",
            "mass": self.mass,
            "part": self.part,
            "alphas": list(self.alphas),
            "site": self.directions.site,
            "positions": self.positions,
            "directions_sha256": self.directions.digest,
            "heads": [list(head) for head in self.heads],
        }

    def hooks(self, model: HookTarget, prompt: PromptLike | None = None, *, cursor: Cursor | None = None) -> list[Hook]:
        """TransformerLens hooks. The prompts are run first, to find the strengths.

        Raises:
            ValueError, KeyError, TypeError: As for :meth:`SelfFocus.hooks`.
        """
        return _hooks(self, model, prompt, cursor, "targeted steering")

    def resolve(self, model: FocusModel, prefix: Prefix, max_new_tokens: int = 100) -> tuple[PromptBatch, Intervention]:
        """The prompts of a prefix, and steering with a strength for each prompt."""
        del max_new_tokens
        return prefix.batch, Lanes([[self._at(alpha)] for alpha in self.strengths(model, prefix)])

    def strengths(self, model: FocusModel, prefix: Prefix) -> list[float]:
        """The strength for each prompt of a prefix."""
        measured = torch.stack([self._masses(model, prefix, alpha) for alpha in self.alphas], dim=1)
        return [self._strength(masses) for masses in measured.tolist()]

    def _at(self, alpha: float) -> FocusSteering:
        return FocusSteering(self.directions, alpha, self.heads, self.positions)

    def _masses(self, model: FocusModel, prefix: Prefix, alpha: float) -> Float[Tensor, "batch"]:
        steering = [self._at(alpha)] if alpha else []
        steered = model.rerun(prefix, steering) if steering and self.changes_prompt else prefix
        rows = last_rows(model, steered, self.heads, steering)
        width, padding = prefix.batch.width, prefix.batch.padding
        if self.part == SINK:
            inside = torch.stack([(torch.arange(width) >= n) & (torch.arange(width) < n + 2) for n in padding])
        else:
            inside = prefix.batch.columns(self.part, width)
        masses = (rows * inside[:, None]).double().sum(dim=-1)
        if self.part == SINK:
            with_sinks = model.sink_layers
            has_sink = torch.tensor([head.layer in with_sinks for head in self.heads])
            masses = masses + (1 - rows.double().sum(dim=-1)) * has_sink
        return masses.mean(dim=1)

    def _strength(self, masses: Sequence[float]) -> float:
        """The first strength that reaches the target, from the mass at each strength."""
        sign = -1 if self.part == SINK else 1
        gaps = [sign * (self.mass - mass) for mass in masses]
        if gaps[0] <= 0:
            return 0.0
        for i in range(1, len(gaps)):
            if gaps[i] <= 0:
                before, after = self.alphas[i - 1], self.alphas[i]
                return before + (after - before) * gaps[i - 1] / (gaps[i - 1] - gaps[i])
        return self.alphas[min(range(len(gaps)), key=gaps.__getitem__)]


def last_rows(
    model: FocusModel, prefix: Prefix, heads: Sequence[Head], interventions: Sequence[Intervention]
) -> Float[Tensor, "batch head column"]:
    """Attention of heads in the row of the last prompt token, under interventions. The prefix holds this token back."""
    rows: dict[int, Float[Tensor, "batch head column"]] = {}

    def hook(layer: int, chosen: list[int]) -> RowHook:
        def read(pattern: Float[Tensor, "batch head row key"]) -> None:
            if layer not in rows:  # a second pass runs the first response token
                rows[layer] = pattern[:, chosen, -1, : prefix.batch.width].float().cpu()

        return RowHook(lambda pattern, hook: read(pattern), read, reads=True)

    chosen = heads_by_layer(heads)
    hooks = [(hook_name(layer, "hook_pattern"), hook(layer, list(own))) for layer, own in chosen.items()]
    model.decode(prefix, interventions, max_new_tokens=1, observers=hooks)
    place = {Head(layer, head): (layer, i) for layer, own in chosen.items() for i, head in enumerate(own)}
    return torch.stack([rows[layer][:, i] for layer, i in (place[head] for head in heads)], dim=1)


def _hooks(
    intervention: TargetedSplitSoftmax | TargetedSteering,
    model: HookTarget,
    prompt: PromptLike | None,
    cursor: Cursor | None,
    purpose: str,
) -> list[Hook]:
    if not hasattr(model, "prefill"):
        raise TypeError(f"{purpose} runs the model first, so it needs a FocusModel, not a {type(model).__name__}")
    runner = cast("FocusModel", model)
    prefix = runner.prefill(require_prompt(model, prompt, purpose), hold_last=True)
    batch, resolved = intervention.resolve(runner, prefix)
    return resolved.hooks(model, batch, cursor=cursor)
