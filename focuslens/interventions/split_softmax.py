"""Split-softmax: increase or decrease of the attention to a span (equations 2 and 3 of the paper)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from focuslens.heads import Head, as_heads, check_heads
from focuslens.hooks import Cursor, Hook, HookTarget, PromptLike
from focuslens.interventions.base import checked_span, exactly, require_prompt
from focuslens.interventions.rescaling import ChosenHeads, Rescaling, RowEdit, SpanColumns, pattern_hooks
from focuslens.prompts.batch import PromptBatch, SpanLike
from focuslens.util.checks import checked_number, is_range

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from focuslens.prompts.prompt import Span

__all__ = ["SplitSoftmax", "split_factors", "split_hooks", "split_softmax"]


_WORTH_CHOOSING = 2**15
"""Weights in one row of every other head from which the calls that choose some heads take less time than they save."""


def _check_tau(tau: float) -> None:
    tau = checked_number(tau, "tau")
    if not (math.isfinite(tau) and tau >= 0):
        raise ValueError(
            f"tau is {tau}; it must be a finite number, 0 or more (1 changes nothing, less raises attention)"
        )


def split_softmax(
    pattern: Float[Tensor, "... key"], span: Span | Bool[Tensor, "*#batch key"], tau: float
) -> Float[Tensor, "... key"]:
    """Rescale attention rows so that their mass ``p`` on a span becomes ``p ** tau``.

    The new weights are ``W'[j] = p**tau / p * W[j]`` inside the span, and
    ``W'[j] = (1 - p**tau) / (1 - p) * W[j]`` outside the span (equation 3; Li et al., 2024). The proportions between
    keys inside the span do not change. The proportions between keys outside the span do not change either.

    ``tau < 1`` raises the attention on the span, ``tau = 1`` changes nothing, and ``tau > 1`` lowers the attention on
    the span. At ``tau = 0``, all attention is on the span. Rows with ``p = 0`` or ``p = 1`` do not change.

    Args:
        pattern: Attention weights; each row sums to one.
        span: Half-open range of keys, or a mask that broadcasts against ``pattern`` and is true inside the span.
        tau: The exponent, 0 or more.

    Returns:
        New attention weights in the dtype of ``pattern``; each row sums to one.

    Raises:
        TypeError: If ``pattern`` is no tensor of floating-point numbers, ``span`` is neither one range nor a mask, or
            ``tau`` is no number.
        ValueError: If ``tau`` is negative or not finite, or if ``span`` is a range that does not lie within the keys,
            or a mask of another shape than ``pattern``.
    """
    _check_tau(tau)
    _check_pattern(pattern)
    inside = _checked_mask(span, pattern) if isinstance(span, Tensor) else _key_mask(span, pattern)
    if tau == 1:
        return pattern.clone()
    # Double precision is needed because p**tau / p overflows single precision for tiny p, and because single precision
    # rounds p to 1 if the mass outside the span is tiny. The cost is low because there are few rows.
    exact = exactly(pattern)
    on_span = torch.where(inside, exact, 0).sum(dim=-1, keepdim=True)
    elsewhere = torch.where(inside, 0, exact).sum(dim=-1, keepdim=True)
    raised, lowered = _factors(on_span, elsewhere, _Exponent(1 - tau, -tau, None))
    return (exact * torch.where(inside, raised, lowered)).to(pattern.dtype)


class _Exponent(NamedTuple):
    """Values of ``tau`` in the form in which :func:`_factors` needs them."""

    rest: float | Tensor
    negative: float | Tensor
    acts: Tensor | None
    """1 where ``tau`` is not 1, and 0 elsewhere; ``None`` if ``tau`` is 1 nowhere."""

    @classmethod
    def of(cls, tau: Float[Tensor, "*values"]) -> _Exponent:
        return cls(1 - tau, -tau, (tau != 1).to(tau) if bool((tau == 1).any()) else None)


def _factors(
    on_span: Float[Tensor, "*rows"], elsewhere: Float[Tensor, "*rows"], exponent: _Exponent
) -> tuple[Float[Tensor, "*rows"], Float[Tensor, "*rows"]]:
    """Factors by which split-softmax multiplies the attention inside and outside the span.

    ``on_span`` and ``elsewhere`` are the attention masses of each row inside and outside the span. Both factors are 1
    if either mass is zero or if ``tau`` is 1.
    """
    # With r = (1 - p) / p, log p is -log(1 + r), and 1 / (1 - p) is 1 + 1 / r. Rows need not sum exactly to one, and no
    # difference 1 - p is formed, which for p close to 1 would be mostly rounding error that a large tau amplifies.
    acting = on_span if exponent.acts is None else on_span * exponent.acts
    changed = acting * elsewhere > 0
    # In other rows, elements are divided by 1, and r is not zero, so that gradients are finite.
    tiny = torch.finfo(on_span.dtype).tiny
    ratio = (elsewhere / torch.where(changed, acting, 1.0)).clamp(tiny, 1 / tiny)
    surprise = torch.log1p(ratio)
    raised = torch.exp(exponent.rest * surprise)
    lowered = torch.expm1(exponent.negative * surprise) * (-1 - ratio.reciprocal())
    return torch.where(changed, raised, 1.0), torch.where(changed, lowered, 1.0)


def split_factors(
    on_span: Float[Tensor, "*rows"], elsewhere: Float[Tensor, "*rows"], tau: float
) -> tuple[Float[Tensor, "*rows"], Float[Tensor, "*rows"]]:
    """Factors by which split-softmax multiplies the attention inside and outside a span with the mass ``on_span``."""
    if tau == 1:
        return torch.ones_like(on_span), torch.ones_like(on_span)
    return _factors(on_span, elsewhere, _Exponent(1 - tau, -tau, None))


def _check_pattern(pattern: Any) -> None:
    if not isinstance(pattern, Tensor):
        kind = type(pattern).__name__
        raise TypeError(f"pattern is a {kind}; it must be a torch tensor [... key], such as torch.as_tensor(pattern)")
    if not pattern.is_floating_point() or pattern.ndim < 1:
        raise TypeError(
            f"pattern is a tensor of {pattern.dtype} with the shape {tuple(pattern.shape)}; it must be floating-point "
            "attention weights [... key]"
        )


def _checked_mask(mask: Tensor, pattern: Tensor) -> Bool[Tensor, "*#batch key"]:
    if mask.dtype != torch.bool:
        raise TypeError(f"span is a tensor of {mask.dtype}; it must be one range (start, end), or a mask of torch.bool")
    fits = mask.ndim <= pattern.ndim and mask.shape[-1:] == pattern.shape[-1:]
    if not fits or any(n not in (1, m) for n, m in zip(mask.shape[::-1], pattern.shape[::-1], strict=False)):
        raise ValueError(
            f"span is a mask of the shape {tuple(mask.shape)}, which does not fit a pattern of the shape "
            f"{tuple(pattern.shape)}; give a mask [key] or [... key]"
        )
    return mask


def _key_mask(span: Span, pattern: Tensor) -> Bool[Tensor, "key"]:
    if not is_range(span):
        raise TypeError(
            f"span is {span!r:.80}; it must be one range (start, end) of keys; several ranges are a mask, a torch.bool "
            "tensor that is true inside the span"
        )
    start, end = span
    if not 0 <= start < end <= pattern.shape[-1]:
        raise ValueError(
            f"span ({start}, {end}) does not lie in rows of {pattern.shape[-1]} keys; "
            "a span is a half-open range with 0 <= start < end <= number of keys"
        )
    keys = torch.arange(pattern.shape[-1], device=pattern.device)
    return (keys >= start) & (keys < end)


@dataclass(frozen=True)
class SplitSoftmax:
    """Split-softmax of attention heads, in the rows that produce the response.

    The first of these rows is the row of the last prompt token. Earlier rows do not change, and their keys and values
    do not change either. If the span is empty, no row changes. For example, the span ``relevant`` is empty in a prompt
    without the relevant document. The hook point is ``hook_pattern``.

    Args:
        heads: ``(layer, head)`` pairs.
        tau: The exponent; see :func:`split_softmax`.
        span: Span whose attention is raised or lowered: a name, such as ``relevant``, or a half-open range of token
            positions.
    """

    heads: tuple[Head, ...]
    tau: float
    span: SpanLike = "relevant"

    def __init__(self, heads: Iterable[tuple[int, int]], tau: float, span: SpanLike = "relevant") -> None:
        _check_tau(tau)
        object.__setattr__(self, "heads", as_heads(heads))
        object.__setattr__(self, "tau", float(tau))
        object.__setattr__(self, "span", checked_span(span))

    @property
    def changes_prompt(self) -> bool:
        """Always ``False``, because only the rows that produce the response change."""
        return False

    def describe(self) -> dict[str, Any]:
        """Kind and settings of the intervention as JSON values."""
        return {
            "kind": "split_softmax",
            "tau": self.tau,
            "span": self.span,
            "heads": [list(head) for head in self.heads],
        }

    def hooks(self, model: HookTarget, prompt: PromptLike | None = None, *, cursor: Cursor | None = None) -> list[Hook]:
        """TransformerLens hooks for one prompt, or for a batch padded on the left.

        Raises:
            ValueError: If the prompt is missing, if a head does not exist, or if the model ignores changes of its
                attention patterns. The hooks also raise ``ValueError`` if the model runs tokens other than the prompt
                and its continuation.
            KeyError: If ``span`` is a name and the prompt has no span with this name.
        """
        batch = require_prompt(model, prompt, "split-softmax")
        taus = torch.ones(1, model.shape.n_layers, model.shape.n_heads, dtype=torch.float64)
        for layer, head in check_heads(self.heads, model.shape.n_layers, model.shape.n_heads):
            taus[0, layer, head] = self.tau
        hooks = split_hooks(model, batch, self.span, taus, sorted({head.layer for head in self.heads}), cursor)
        model.require_acting(name for name, _ in hooks)
        return hooks


def split_hooks(
    model: HookTarget,
    batch: PromptBatch,
    span: SpanLike,
    taus: Float[Tensor, "#batch layer head"],
    layers: Sequence[int],
    cursor: Cursor | None,
) -> list[Hook]:
    """Split-softmax hooks, one per layer. Heads whose ``tau`` is 1 do not change.

    Raises:
        KeyError: If ``span`` is a name and a prompt has no span with this name.
    """
    columns = SpanColumns(batch.columns(span, batch.width))
    taus = taus.expand(len(batch), -1, -1)
    edits = {layer: _edit_of(columns, taus[:, layer], batch.width) for layer in layers}
    return pattern_hooks(model, batch, edits, "response", cursor)


def _edit_of(columns: SpanColumns, taus: Float[Tensor, "batch head"], width: int) -> RowEdit:
    """Split-softmax of one layer: of all heads, or of those whose ``tau`` is not 1 if this touches less."""
    chosen = taus != 1
    n_chosen, n = int(chosen.sum()), chosen.numel()
    if not n_chosen or (n - n_chosen) * width < _WORTH_CHOOSING:
        return Rescaling(columns, _Powers(taus))
    pairs = chosen.flatten().nonzero()[:, 0]
    of_pairs = columns.of_prompts(pairs // taus.shape[1])
    return ChosenHeads(Rescaling(of_pairs, _Powers(taus[chosen][:, None])), pairs)


class _Powers:
    """Factors of split-softmax, with an exponent for each prompt and head."""

    def __init__(self, tau: Float[Tensor, "#batch head"]) -> None:
        self._tau = tau[..., None, None]
        self._exponent = _Exponent.of(self._tau)
        self.may_overflow = bool(tau.max() > 1e30)  # the factor outside the span is at most 1 or tau

    def __call__(
        self, on_span: Float[Tensor, "batch head row 1"], elsewhere: Float[Tensor, "batch head row 1"]
    ) -> tuple[Float[Tensor, "batch head row 1"], Float[Tensor, "batch head row 1"]]:
        if self._tau.device != on_span.device:
            self._tau = self._tau.to(on_span.device, on_span.dtype)
            self._exponent = _Exponent.of(self._tau)
        return _factors(on_span, elsewhere, self._exponent)
