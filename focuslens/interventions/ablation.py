"""Ablations: replacement of head outputs, and knockout of attention to a span."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import torch
import torch.nn.functional as F
from einops import reduce
from jaxtyping import Float
from torch import Tensor

from focuslens.heads import Head, as_heads, check_heads, heads_by_layer
from focuslens.hooks import Cursor, Hook, HookTarget, PromptLike, RowHook, hook_name, row_wise
from focuslens.interventions.base import (
    Placed,
    Positions,
    check_positions,
    checked_span,
    exactly,
    first_query_row,
    first_row,
    require_prompt,
    rows_of,
)
from focuslens.prompts.batch import PromptBatch, SpanLike
from focuslens.util.progress import track

if TYPE_CHECKING:
    from focuslens.model.focus_model import FocusModel

__all__ = ["AblationMode", "HeadAblation", "mean_head_outputs"]

AblationMode: TypeAlias = Literal["zero", "mean", "knockout"]
"""Kind of ablation: set a head's output to zero, set it to its mean, or block the head's attention to a span."""


@torch.no_grad()
def mean_head_outputs(
    model: FocusModel,
    prompts: Iterable[str],
    heads: Iterable[tuple[int, int]],
    *,
    progress: bool | None = None,
) -> Float[Tensor, "n d_head"]:
    """Mean of ``hook_z`` over all tokens of all prompts, one vector per head, for ``HeadAblation(mode="mean")``.

    Args:
        model: The model.
        prompts: Prompts, run one at a time.
        heads: ``(layer, head)`` pairs.
        progress: Whether to show a progress bar; :mod:`focuslens.util.progress` describes the default.

    Raises:
        ValueError: If there are no prompts.
        TypeError: If ``prompts`` is a single string.
    """
    if isinstance(prompts, str):
        raise TypeError("prompts is one string; give a list of prompts, such as [prompt]")
    chosen = check_heads(heads, model.shape.n_layers, model.shape.n_heads)
    sums = torch.zeros(model.shape.n_layers, model.shape.n_heads, model.shape.d_head, dtype=torch.double)
    count = 0

    def add(layer: int) -> Any:
        def observe(z: Float[Tensor, "batch row head d_head"], hook: Any) -> None:
            sums[layer] += reduce(exactly(z), "batch row head d_head -> head d_head", "sum").cpu()

        return observe

    observers = [(hook_name(layer, "hook_z"), add(layer)) for layer in heads_by_layer(chosen)]
    for prompt in track(list(prompts), "mean outputs of heads", unit="prompt", show=progress):
        tokens = model.encode(prompt).tokens
        model.observe(tokens, observers)
        count += len(tokens)
    if count == 0:
        raise ValueError("prompts is empty; the mean needs at least one prompt")
    return torch.stack([sums[layer, head] / count for layer, head in chosen]).float()


@dataclass(frozen=True, eq=False)
class HeadAblation:
    """Ablation of attention heads.

    ``zero`` and ``mean`` replace a head's output before the output projection (``hook_z``). ``knockout`` sets a head's
    attention scores on a span to minus infinity before the softmax (``hook_attn_scores``; Geva et al., 2023). The
    head's attention then moves to tokens outside the span. A row that sees keys only inside the span does not change.

    Args:
        heads: ``(layer, head)`` pairs.
        mode: ``zero``, ``mean`` or ``knockout``.
        mean: Mean output of each head, for the mode ``mean``; see :func:`mean_head_outputs`.
        span: Span of the prompt, for the mode ``knockout``: a name, or a half-open range of token positions.
        positions: Rows to change: ``all`` rows (the default for ``zero`` and ``mean``), or the rows that produce the
            ``response`` (the default for ``knockout``).

    Raises:
        ValueError: If an argument that the mode needs is missing, or an argument that the mode does not use is given.
    """

    heads: tuple[Head, ...]
    mode: AblationMode
    mean: Float[Tensor, "n d_head"] | None
    span: SpanLike | None
    positions: Positions

    def __init__(
        self,
        heads: Iterable[tuple[int, int]],
        mode: AblationMode = "zero",
        *,
        mean: Float[Tensor, "n d_head"] | None = None,
        span: SpanLike | None = None,
        positions: Positions | None = None,
    ) -> None:
        chosen = as_heads(heads)
        if mode not in get_args(AblationMode):
            raise ValueError(f"mode is {mode!r}; it must be one of {', '.join(get_args(AblationMode))}")
        for name, value, needed_by in (("mean", mean, "mean"), ("span", span, "knockout")):
            if (value is not None) != (mode == needed_by):
                raise ValueError(f"{name} {'is needed' if mode == needed_by else 'has no use'} with mode={mode!r}")
        if not isinstance(mean, Tensor | None):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"mean is a {type(mean).__name__}; it must be a tensor, as fl.mean_head_outputs returns it")
        if mean is not None and (mean.ndim != 2 or len(mean) != len(chosen)):
            raise ValueError(
                f"mean has shape {tuple(mean.shape)}; for {len(chosen)} heads it must be ({len(chosen)}, d_head)"
            )
        span = None if span is None else checked_span(span)
        mean = None if mean is None else mean.detach().clone()
        positions = positions or ("response" if mode == "knockout" else "all")
        check_positions(positions)
        fields = {"heads": chosen, "mode": mode, "mean": mean, "span": span, "positions": positions}
        for name, value in fields.items():
            object.__setattr__(self, name, value)

    @property
    def changes_prompt(self) -> bool:
        """Whether rows before the last prompt token also change."""
        return self.positions == "all"

    def describe(self) -> dict[str, Any]:
        """Kind and settings of the intervention as JSON values, with a digest in place of the mean vectors."""
        mean = None if self.mean is None else self.mean.detach().float().cpu().contiguous().numpy().tobytes()
        return {
            "kind": "head_ablation",
            "mode": self.mode,
            "span": self.span,
            "positions": self.positions,
            "mean_sha256": None if mean is None else hashlib.sha256(mean).hexdigest(),
            "heads": [list(head) for head in self.heads],
        }

    def hooks(self, model: HookTarget, prompt: PromptLike | None = None, *, cursor: Cursor | None = None) -> list[Hook]:
        """TransformerLens hooks of this intervention. ``knockout`` and ``positions="response"`` need the prompt.

        Raises:
            ValueError: If a head does not exist, if the mean vectors have the wrong size, or if the prompt is needed
                but missing.
            KeyError: If ``span`` is a name and the prompt has no span with this name.
        """
        heads = check_heads(self.heads, model.shape.n_layers, model.shape.n_heads)
        if self.mean is not None and self.mean.shape[1] != model.shape.d_head:
            raise ValueError(
                f"mean has vectors of {self.mean.shape[1]} numbers, the model has d_head = {model.shape.d_head}"
            )
        needs_prompt = self.mode == "knockout" or self.positions == "response"
        batch = require_prompt(model, prompt, "this ablation") if needs_prompt else None
        if batch is not None and self.span is not None:
            batch.columns(self.span, batch.width)  # raises KeyError for an unknown span before any forward pass
            hooks = [
                (hook_name(layer, "hook_attn_scores"), self._cut(model, layer, cursor, chosen, batch, self.span))
                for layer, chosen in heads_by_layer(heads).items()
            ]
        else:
            hooks = self._output_hooks(model, heads, batch, cursor)
        model.require_acting(name for name, _ in hooks)
        return hooks

    def _output_hooks(
        self, model: HookTarget, heads: Sequence[Head], batch: PromptBatch | None, cursor: Cursor | None
    ) -> list[Hook]:
        vectors = torch.zeros(len(heads), model.shape.d_head) if self.mean is None else self.mean
        place = {head: i for i, head in enumerate(heads)}
        return [
            (
                hook_name(layer, "hook_z"),
                self._replace(
                    model, chosen, torch.stack([vectors[place[Head(layer, head)]] for head in chosen]), batch, cursor
                ),
            )
            for layer, chosen in heads_by_layer(heads).items()
        ]

    def _replace(
        self,
        model: HookTarget,
        heads: Sequence[int],
        vectors: Float[Tensor, "n d_head"],
        batch: PromptBatch | None,
        cursor: Cursor | None,
    ) -> Any:
        index, means = Placed(torch.as_tensor(heads)), Placed(vectors)

        def replace_all(z: Float[Tensor, "batch row head d_head"]) -> Tensor:
            result = z.clone()
            result[:, :, index.on(z.device)] = means.on(z.device, z.dtype)
            return result

        def replace(z: Float[Tensor, "batch row head d_head"], hook: Any) -> Tensor:
            first = first_query_row(model, batch, self.positions, cursor, z)
            return torch.cat((z[:, :first], replace_all(z[:, first:])), dim=1)

        return RowHook(replace, replace_all, every_row=self.positions == "all")

    def _cut(
        self,
        model: HookTarget,
        layer: int,
        cursor: Cursor | None,
        heads: Sequence[int],
        batch: PromptBatch,
        span: SpanLike,
    ) -> Any:
        index, columns = Placed(torch.as_tensor(heads)), Placed(batch.columns(span, batch.width)[:, None, None])

        def cut_all(scores: Float[Tensor, "batch head row key"]) -> Tensor:
            n_keys, inside = scores.shape[-1], columns.on(scores.device)
            inside = F.pad(inside[..., :n_keys], (0, max(0, n_keys - inside.shape[-1])))
            rows = scores[:, index.on(scores.device)]
            # Masked scores are minus infinity in TransformerLens, and the dtype's most negative number in Hugging Face.
            visible = rows > torch.finfo(rows.dtype).min / 2
            has_other_key = (visible & ~inside).any(dim=-1, keepdim=True)
            edited = rows.masked_fill(inside & has_other_key, -torch.inf)
            return rows_of(scores, index.on(scores.device), edited)

        @row_wise
        def cut(scores: Float[Tensor, "batch head row key"], hook: Any) -> Tensor | None:
            first = first_row(model, layer, batch, self.positions, cursor, scores)
            if first >= scores.shape[-2]:
                return None
            edited = cut_all(scores[:, :, first:])
            return edited if first == 0 else torch.cat((scores[:, :, :first], edited), dim=2)

        return RowHook(cut, cut_all)
