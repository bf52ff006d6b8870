"""Activations for training: queries of the response rows and all keys, without any matrix of size T x T."""

from __future__ import annotations

import warnings
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from einops import einsum
from jaxtyping import Bool, Float, Int
from torch import Tensor

from focuslens.heads import heads_by_layer
from focuslens.hooks import Hook, hook_name
from focuslens.interventions.directions import Site
from focuslens.prompts.batch import EncodedPrompt
from focuslens.prompts.prompt import Case, MultiDocSample

if TYPE_CHECKING:
    from focuslens.heads import ModelShape
    from focuslens.model.execution import Executor
    from focuslens.model.focus_model import FocusModel

__all__ = [
    "ActivationStore",
    "LayerHeads",
    "RowActivations",
    "capture_rows",
    "measured_scores",
    "row_scores",
    "sample_rows",
]


@dataclass(frozen=True)
class LayerHeads:
    """The chosen heads of one layer.

    Attributes:
        layer: The layer.
        heads: Chosen query heads, in the order of the choice.
        places: Index of each of these heads in the list of all chosen heads.
        key_value_heads: Distinct key-value heads that these heads read, in ascending order.
        reads: Index into ``key_value_heads`` for each query head.
    """

    layer: int
    heads: tuple[int, ...]
    places: tuple[int, ...]
    key_value_heads: tuple[int, ...]
    reads: tuple[int, ...]

    @classmethod
    def group(cls, heads: Sequence[tuple[int, int]], shape: ModelShape) -> list[LayerHeads]:
        """Group the chosen heads by layer."""
        place = {tuple(head): i for i, head in enumerate(heads)}
        groups: list[LayerHeads] = []
        for layer, chosen in heads_by_layer(heads).items():
            keys = [shape.key_value_head(head) for head in chosen]
            distinct = sorted(set(keys))
            places = tuple(place[layer, head] for head in chosen)
            groups.append(cls(layer, tuple(chosen), places, tuple(distinct), tuple(distinct.index(k) for k in keys)))
        return groups


@dataclass(frozen=True, eq=False)
class RowActivations:
    """Training data of one sample: queries of the response rows and all keys, for each layer with chosen heads.

    Attributes:
        queries: Queries of the chosen heads by layer, at the site of the training.
        keys: Keys of the key-value heads that the chosen heads read, by layer, at the same site.
        relevant: Mask of the keys that belong to the relevant document.
        rows: Positions of the response tokens.
    """

    queries: dict[int, Float[Tensor, "row head d_head"]]
    keys: dict[int, Float[Tensor, "key kv_head d_head"]]
    relevant: Bool[Tensor, "key"]
    rows: Int[Tensor, "row"]

    @property
    def nbytes(self) -> int:
        """Size of the queries and keys, in bytes."""
        return sum(t.numel() * t.element_size() for t in (*self.queries.values(), *self.keys.values()))


def row_scores(
    queries: Float[Tensor, "row head d_head"],
    keys: Float[Tensor, "key head d_head"],
    rows: Int[Tensor, "row"],
    relevant: Bool[Tensor, "key"],
    scale: float,
    window: int | None = None,
) -> Float[Tensor, "head"]:
    """Contextual scores ``S_C`` (equation 1), computed from the rotated queries of some rows and all rotated keys.

    Row ``i`` attends to key ``j`` if ``j <= i`` and, with a sliding window, ``j > i - window``.
    """
    logits = einsum(queries, keys, "row head d_head, key head d_head -> head row key") * scale
    columns = torch.arange(keys.shape[0], device=keys.device)
    visible = columns <= rows[:, None]
    if window is not None:
        visible &= columns > rows[:, None] - window
    pattern = logits.masked_fill(~visible, -torch.inf).softmax(dim=-1)
    return pattern[..., relevant].sum(dim=-1).mean(dim=-1)


@torch.no_grad()
def measured_scores(
    model: FocusModel, prompt: EncodedPrompt, response: Int[Tensor, "response"], groups: Sequence[LayerHeads]
) -> dict[int, Float[Tensor, "head"]]:
    """Contextual scores of the chosen heads by layer, computed from the model's own attention patterns."""
    scores: dict[int, Tensor] = {}
    relevant = torch.zeros(len(prompt.tokens) + len(response))
    for first, last in prompt.resolve("relevant"):
        relevant[first:last] = 1

    def read(group: LayerHeads) -> Any:
        def observe(pattern: Float[Tensor, "batch head row key"], hook: Any) -> None:
            rows = pattern[0, list(group.heads)].float()
            scores[group.layer] = (rows @ relevant.to(rows.device)).mean(dim=-1)

        return observe

    observers = [(hook_name(group.layer, "hook_pattern"), read(group)) for group in groups]
    model.extend(model.prefill(prompt), response[None], observers=observers)
    return scores


@torch.no_grad()
def capture_rows(
    model: FocusModel,
    prompt: EncodedPrompt,
    response: Int[Tensor, "response"],
    groups: Sequence[LayerHeads],
    site: Site,
) -> RowActivations:
    """Run an unmodified model once on a prompt and its response, and record the activations for training.

    Raises:
        ValueError: If the response is empty, or prompt and response do not fit into the context.
    """
    if len(response) == 0:
        raise ValueError("the response has no tokens, so there are no rows to train on")
    queries: dict[int, Tensor] = {}
    keys: dict[int, Tensor] = {}

    def keep(store: dict[int, Tensor], layer: int, heads: tuple[int, ...], first: int) -> Any:
        def observe(activation: Float[Tensor, "batch pos head d_head"], hook: Any) -> None:
            # The copies are on one device, because layers may lie on several devices.
            store[layer] = activation[0, first:, list(heads)].clone().to(model.backend.device)

        return observe

    infix = "rot_" if site == "rotary" else ""
    observers: list[Hook] = []
    for group in groups:
        observers.append(
            (hook_name(group.layer, f"hook_{infix}q"), keep(queries, group.layer, group.heads, len(prompt.tokens)))
        )
        observers.append((hook_name(group.layer, f"hook_{infix}k"), keep(keys, group.layer, group.key_value_heads, 0)))
    model.observe(torch.cat((prompt.tokens, response)), observers)
    n_keys, device = len(prompt.tokens) + len(response), model.backend.device
    relevant = torch.zeros(n_keys, dtype=torch.bool, device=device)
    for first, last in prompt.resolve("relevant"):
        relevant[first:last] = True
    return RowActivations(queries, keys, relevant, torch.arange(len(prompt.tokens), n_keys, device=device))


def sample_rows(
    model: FocusModel,
    sample: MultiDocSample,
    response: Int[Tensor, "response"],
    groups: Sequence[LayerHeads],
    case: Case,
    site: Site,
) -> RowActivations:
    """Training data of one sample: the result of :func:`capture_rows` on the sample's prompt of the given case."""
    return capture_rows(model, model.encode(sample.prompt(case)), response, groups, site)


class ActivationStore:
    """Training data of all samples. Data beyond a budget of bytes is not stored, but recomputed when it is needed.

    Args:
        executor: Executor of the forward passes.
        samples: The training samples.
        responses: Response tokens of each sample.
        groups: The chosen heads, grouped by layer.
        case: Case of the prompts.
        site: Site of the queries and keys.
        budget: Maximum number of bytes to store.
    """

    def __init__(
        self,
        executor: Executor,
        samples: Sequence[MultiDocSample],
        responses: Sequence[Tensor],
        groups: Sequence[LayerHeads],
        case: Case,
        site: Site,
        budget: int,
    ) -> None:
        self._executor, self._samples, self._responses, self._budget = executor, samples, responses, budget
        self._compute = partial(sample_rows, groups=groups, case=case, site=site)
        self._stored: dict[int, RowActivations] = {}
        self._bytes = 0
        self._full = False

    def __len__(self) -> int:
        return len(self._samples)

    def follow(self, order: Sequence[int]) -> Generator[RowActivations]:
        """Yield the data of samples in the given order. Missing data is recomputed, possibly ahead of time."""
        missing = [index for index in order if index not in self._stored]
        recomputed = self._executor.map(self._compute, ((self._samples[i], self._responses[i]) for i in missing))
        for index in order:
            yield self._stored[index] if index in self._stored else self.keep(index, next(recomputed))

    def keep(self, index: int, rows: RowActivations) -> RowActivations:
        """Store the data of a sample if there is room, and return the data."""
        # A full store evicts nothing. Eviction would gain nothing, because all samples are used equally often.
        if self._bytes + rows.nbytes <= self._budget:
            self._stored[index] = rows
            self._bytes += rows.nbytes
        elif not self._full:
            self._full = True
            warnings.warn(
                f"activations of {len(self._stored)} of {len(self)} samples fill {self._budget / 2**30:.3g} GB; those "
                "of the others are recomputed in every epoch (a larger memory_gb or fewer heads would avoid this)",
                stacklevel=2,
            )
        return rows
