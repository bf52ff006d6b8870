"""Focus steering: addition of focus directions to queries and keys (equation 5 of the paper)."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from focuslens.heads import Head, check_heads, heads_by_layer
from focuslens.hooks import Cursor, Hook, HookTarget, PromptLike, RowHook, hook_name
from focuslens.interventions.base import Positions, check_positions, first_query_row, require_prompt
from focuslens.interventions.directions import FocusDirections
from focuslens.interventions.low_rank import LowRank
from focuslens.prompts.batch import PromptBatch
from focuslens.util.checks import checked_number

if TYPE_CHECKING:
    from focuslens.heads import ModelShape

__all__ = ["FocusSteering", "adding"]


@dataclass(frozen=True, eq=False)
class FocusSteering:
    """Steering of attention heads: ``softmax((Q + alpha d_Q)(K + alpha d_K)^T / sqrt(d_head))`` (equation 5).

    At the ``rotary`` site, ``d_Q`` is added to ``hook_rot_q``. ``d_K`` is not applied, because ``(q_i + d_Q) . d_K`` is
    the same for every key and does not affect the softmax. At the ``projection`` site, ``d_Q`` is added to ``hook_q``
    and ``d_K`` to ``hook_k``, which has one vector per key-value head. If several steered heads share a key-value head,
    the mean of their key vectors is added. (Training produces equal key vectors for such heads.)

    If the directions have a rank, ``d_Q`` is ``d_Q(q) = query + U V^T q``. Here, ``q`` is the head's own query in the
    steered row, at the site of the directions and before the addition.

    Args:
        directions: Focus directions, trained with this package or published by the paper's authors.
        alpha: Strength of the steering. 0 has no effect. Negative values lower the attention on relevant contexts.
        heads: Heads to steer; the default is all heads with a direction.
        positions: Rows to steer: ``all`` rows (the paper's method), or only the rows that produce the ``response``.
            With ``response``, keys and values of tokens before the last prompt token do not change.

    Raises:
        TypeError: If ``directions`` is no :class:`FocusDirections`, or ``alpha`` is no number.
        ValueError: If a head has no direction, or ``alpha`` is not finite.
    """

    directions: FocusDirections
    alpha: float
    heads: tuple[Head, ...]
    positions: Positions = "all"

    def __init__(
        self,
        directions: FocusDirections,
        alpha: float,
        heads: Iterable[tuple[int, int]] | None = None,
        positions: Positions = "all",
    ) -> None:
        check_positions(positions)
        if not isinstance(directions, FocusDirections):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(
                f"directions is a {type(directions).__name__}; it must be FocusDirections, such as "
                "fl.FocusDirections.load(path)"
            )
        if not math.isfinite(checked_number(alpha, "alpha")):
            raise ValueError(f"alpha is {alpha}; it must be a finite number")
        selected = directions.select(heads) if heads is not None else directions
        object.__setattr__(self, "directions", selected)
        object.__setattr__(self, "alpha", float(alpha))
        object.__setattr__(self, "heads", selected.heads)
        object.__setattr__(self, "positions", positions)

    @property
    def changes_prompt(self) -> bool:
        """Whether rows before the last prompt token are also steered."""
        return self.positions == "all"

    def describe(self) -> dict[str, Any]:
        """Kind and settings of the intervention as JSON values, with a digest in place of the directions."""
        return {
            "kind": "focus_steering",
            "alpha": self.alpha,
            "site": self.directions.site,
            "positions": self.positions,
            **({"rank": self.directions.rank} if self.directions.rank else {}),
            "directions_sha256": self.directions.digest,
            "heads": [list(head) for head in self.heads],
        }

    def hooks(self, model: HookTarget, prompt: PromptLike | None = None, *, cursor: Cursor | None = None) -> list[Hook]:
        """TransformerLens hooks of this intervention. The prompt is needed only if ``positions`` is ``response``.

        Raises:
            ValueError: If the directions do not fit the model, or if the prompt is needed but missing. The hooks raise
                it too, if the model's queries or keys do not have the layout that directions assume.
        """
        additions, products = self.additions(model.shape), self.products(model.shape)
        batch = require_prompt(model, prompt, 'positions="response"') if self.positions == "response" else None
        hooks = [
            (name, adding(name, model, vectors[None], batch, self.positions, cursor, products.get(name)))
            for name, vectors in additions.items()
        ]
        model.require_acting(name for name, _ in hooks)
        return hooks

    def additions(self, shape: ModelShape) -> dict[str, Float[Tensor, "head d_head"]]:
        """Vectors to add, times ``alpha``, by name of the hook point. They are zero for heads that are not steered.

        If the directions have a rank, these are the constant parts of the vectors.

        Raises:
            ValueError: If the directions do not fit the model.
        """
        self.directions.require_shape(shape)
        check_heads(self.heads, shape.n_layers, shape.n_heads)
        additions = {
            hook_name(layer, self._query_point): _placed(shape.n_heads, chosen, self.alpha * vectors)
            for layer, chosen, vectors in self._by_layer(self.directions.query)
        }
        if self.directions.site == "projection" and self.directions.key is not None:
            additions |= {
                hook_name(layer, "hook_k"): _placed(shape.n_key_value_heads, chosen, self.alpha * vectors)
                for layer, chosen, vectors in self._key_vectors(shape)
            }
        return additions

    def products(self, shape: ModelShape) -> dict[str, LowRank]:
        """Matrices ``alpha U`` and ``V`` by name of the hook point, zero for heads that are not steered.

        There are none if the directions have no rank.
        """
        if self.directions.u is None or self.directions.v is None:
            return {}
        by_layer = zip(self._by_layer(self.directions.u), self._by_layer(self.directions.v), strict=True)
        return {
            hook_name(layer, self._query_point): LowRank(
                _placed(shape.n_heads, chosen, self.alpha * u), _placed(shape.n_heads, chosen, v)
            )
            for (layer, chosen, u), (_, _, v) in by_layer
        }

    @property
    def _query_point(self) -> str:
        return "hook_rot_q" if self.directions.site == "rotary" else "hook_q"

    def _by_layer(self, tensor: Float[Tensor, "n ..."]) -> list[tuple[int, list[int], Float[Tensor, "chosen ..."]]]:
        """Layer, heads, and the entries of a tensor for these heads."""
        place = {head: i for i, head in enumerate(self.heads)}
        return [
            (layer, chosen, torch.stack([tensor[place[Head(layer, head)]] for head in chosen]))
            for layer, chosen in heads_by_layer(self.heads).items()
        ]

    def _key_vectors(self, shape: ModelShape) -> list[tuple[int, list[int], Float[Tensor, "n d_head"]]]:
        vectors_by_head = self.directions.key
        if vectors_by_head is None:
            return []
        shared: defaultdict[tuple[int, int], list[Tensor]] = defaultdict(list)
        for (layer, head), vector in zip(self.heads, vectors_by_head, strict=True):
            shared[layer, shape.key_value_head(head)].append(vector)
        means = {place: torch.stack(vectors).mean(dim=0) for place, vectors in shared.items()}
        return [
            (layer, chosen, torch.stack([means[layer, head] for head in chosen]))
            for layer, chosen in heads_by_layer(means).items()
        ]


def _placed(n_heads: int, heads: Sequence[int], values: Float[Tensor, "n ..."]) -> Float[Tensor, "head ..."]:
    """Values of all heads of a layer, which are zero except for ``heads``."""
    placed = torch.zeros(n_heads, *values.shape[1:])
    placed[heads] = values
    return placed


def adding(
    name: str,
    model: HookTarget,
    vectors: Float[Tensor, "#batch head d_head"],
    batch: PromptBatch | None,
    positions: Positions,
    cursor: Cursor | None,
    product: LowRank | None = None,
) -> RowHook:
    """Hook that adds vectors to the queries or keys of a layer, in the rows that ``positions`` selects.

    With ``product``, the hook also adds ``U V^T q`` to each query ``q``. In half precision, the sum of both additions
    is computed in float32 and rounded once.
    """
    placed = rearrange(vectors, "batch head d -> batch 1 head d")
    product = None if product is None else product.by_row()

    def add_to_all(activation: Float[Tensor, "batch row head d_head"]) -> Tensor:
        nonlocal placed, product
        dtype = activation.dtype
        if product is not None and dtype.itemsize < 4:
            dtype = torch.float32
        if placed.device != activation.device or placed.dtype != dtype:
            placed = placed.to(activation.device, dtype)
            product = None if product is None else product.to(activation.device, dtype)
        if product is None:
            return activation + placed
        return activation + (placed + product(activation.to(dtype))).to(activation.dtype)

    def add(activation: Float[Tensor, "batch row head d_head"], hook: Any) -> Tensor | None:
        _require_layout(activation, name, model.shape)
        first = first_query_row(model, batch, positions, cursor, activation)
        if first >= activation.shape[1]:
            return None
        steered = add_to_all(activation[:, first:])
        return steered if first == 0 else torch.cat((activation[:, :first], steered), dim=1)

    return RowHook(add, add_to_all, every_row=positions == "all")


def _require_layout(activation: Tensor, name: str, shape: ModelShape) -> None:
    """Check that a query or key tensor has the axes ``[batch row head d_head]``, to which directions are added.

    Raises:
        ValueError: If it has others, as in multi-head latent attention, whose queries and keys are wider than
            ``d_head``.
    """
    n_heads = shape.n_key_value_heads if name.endswith("hook_k") else shape.n_heads
    if tuple(activation.shape[2:]) != (n_heads, shape.d_head):
        raise ValueError(
            f"{name} has the shape {tuple(activation.shape)}, and directions need [batch, row, {n_heads} heads, "
            f"{shape.d_head} dimensions]; this attention, such as multi-head latent attention, cannot be steered there"
        )
