"""Split-softmax: increase or decrease of the attention to a span (equations 2 and 3 of the paper)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from focuslens.heads import Head, as_heads, check_heads
from focuslens.hooks import Cursor, Hook, HookTarget, PromptLike, RowHook, hook_name, row_wise
from focuslens.interventions.base import checked_span, exactly, first_row, require_prompt
from focuslens.prompts.batch import PromptBatch, SpanLike
from focuslens.util.checks import checked_number, is_range

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from focuslens.prompts.prompt import Span

__all__ = ["SplitSoftmax", "split_hooks", "split_softmax"]


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
    columns = SpanColumns(batch, span)

    def edit(layer: int) -> RowHook:
        rescaling = _Rescaling(columns, taus[:, layer])

        @row_wise
        def rescale(pattern: Float[Tensor, "batch head row key"], hook: Any) -> Tensor | None:
            first = first_row(model, layer, batch, "response", cursor, pattern)
            if first >= pattern.shape[-2] or columns.empty:
                return None
            edited = rescaling(pattern[:, :, first:].clone())
            return edited if first == 0 else torch.cat((pattern[:, :, :first], edited), dim=2)

        return RowHook(rescale, rescaling)

    return [(hook_name(layer, "hook_pattern"), edit(layer)) for layer in layers]


class SpanColumns:
    """Columns of a span in every prompt of a batch, as tensors on the device of the patterns.

    Attributes:
        index: Columns ``[batch n]`` of each prompt's span. Shorter spans repeat their first column.
        counted: 1 for the columns of the span, 0 for repeated ones.
    """

    def __init__(self, batch: PromptBatch, span: SpanLike) -> None:
        inside = batch.columns(span, batch.width)
        columns = [row.nonzero()[:, 0] for row in inside]
        n = max(len(row) for row in columns)
        filled = [torch.cat((row, row.new_full((n - len(row),), int(row[0]) if len(row) else 0))) for row in columns]
        self.index = torch.stack(filled)
        self.counted = torch.arange(n) < torch.tensor([[len(row)] for row in columns])
        first = self.index[0]
        # Copies of one prompt with one range: a slice is cheaper than an index.
        one_range = n > 0 and bool(self.counted.all()) and torch.equal(first, torch.arange(n) + first[0])
        is_same = one_range and torch.equal(self.index, first.expand_as(self.index))
        self._part = slice(int(first[0]), int(first[0]) + n) if is_same else None

    @property
    def empty(self) -> bool:
        """Whether the span is empty in every prompt."""
        return not self.index.shape[1]

    def taken(self, rows: Float[Tensor, "batch head row key"]) -> Float[Tensor, "batch head row n"]:
        """Attention to the columns of the span, in double precision, which is set to zero in ``rows``.

        Repeated columns occur again.
        """
        if self._part is not None:
            part = rows[..., self._part]
            weights = exactly(part)
            weights = weights.clone() if weights is part else weights
            part.zero_()
            return weights
        weights = exactly(rows.gather(-1, self._expanded(rows)))
        rows.scatter_(-1, self._expanded(rows), 0)
        return weights

    def mass(self, weights: Float[Tensor, "batch head row n"]) -> Float[Tensor, "batch head row 1"]:
        """Sum of weights. Repeated columns do not count."""
        if self._part is None:
            weights = weights * self.counted.to(weights)[:, None, None]
        return weights.sum(dim=-1, keepdim=True)

    def put(self, rows: Float[Tensor, "batch head row key"], weights: Float[Tensor, "batch head row n"]) -> None:
        """Replace the attention to the columns of the span, in place."""
        if self._part is not None:
            rows[..., self._part].copy_(weights)
        else:
            rows.scatter_(-1, self._expanded(rows), weights.to(rows.dtype))

    def _expanded(self, rows: Tensor) -> Tensor:
        if self.index.device != rows.device:
            self.index = self.index.to(rows.device)
        return self.index[:, None, None].expand(*rows.shape[:3], -1)


class _Rescaling:
    """Split-softmax of all rows of a pattern, which is edited, with an exponent for each prompt and head."""

    def __init__(self, columns: SpanColumns, tau: Float[Tensor, "#batch head"]) -> None:
        self._columns, self._tau = columns, tau[..., None, None]
        self._exponent = _Exponent.of(self._tau)
        self._may_overflow = bool(tau.max() > 1e30)  # the factor outside the span is at most 1 or tau

    def __call__(self, rows: Float[Tensor, "batch head row key"]) -> Float[Tensor, "batch head row key"]:
        columns = self._columns
        if columns.empty:
            return rows
        exact = rows if rows.dtype in (torch.float32, torch.float64) else rows.float()
        if self._tau.device != rows.device:
            self._tau = self._tau.to(rows.device, None if rows.device.type != "mps" else torch.float32)
            self._exponent = _Exponent.of(self._tau)
        # Weights on the span need double precision, because the factor for a tiny mass would overflow single precision.
        # The cost is low because the span is short.
        weights = columns.taken(exact)
        elsewhere = exact.sum(dim=-1, keepdim=True).to(weights.dtype)
        raised, lowered = _factors(columns.mass(weights), elsewhere, self._exponent)
        if self._may_overflow:
            lowered = lowered.clamp(max=torch.finfo(exact.dtype).max)
        exact.mul_(lowered.to(exact.dtype))
        columns.put(exact, weights * raised)
        return exact if exact.dtype == rows.dtype else exact.to(rows.dtype)
