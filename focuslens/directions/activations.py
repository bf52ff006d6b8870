"""Activations for training: queries of the response rows, and keys of all positions.

No attention matrix of shape ``[T, T]`` is stored, where ``T`` is the sequence length.
"""

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
from focuslens.prompts.sample import Case, MultiDocSample
from focuslens.prompts.spans import require_spans

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
    """Selected query heads of one layer, and the key-value heads that they read.

    Attributes:
        layer: Index of the layer.
        heads: Indices of the selected query heads within the layer.
        places: Position of each query head in the list of selected heads of all layers.
        key_value_heads: Distinct key-value heads that the query heads read, in ascending order.
        reads: For each query head, the position of its key-value head in ``key_value_heads``.
    """

    layer: int
    heads: tuple[int, ...]
    places: tuple[int, ...]
    key_value_heads: tuple[int, ...]
    reads: tuple[int, ...]

    @classmethod
    def group(cls, heads: Sequence[tuple[int, int]], shape: ModelShape) -> list[LayerHeads]:
        """Combine the heads of each layer into one :class:`LayerHeads`. Layers are in ascending order."""
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
    """Activations of one training sample: queries of the response rows, and keys of all positions.

    Attributes:
        queries: Queries of the selected heads in the response rows, by layer, at the training site.
        keys: Keys of the key-value heads that the selected heads read, by layer, at the training site.
        relevant: Mask of the keys that belong to the relevant document.
        rows: Positions of the response tokens in the sequence.
    """

    queries: dict[int, Float[Tensor, "row head d_head"]]
    keys: dict[int, Float[Tensor, "key kv_head d_head"]]
    relevant: Bool[Tensor, "key"]
    rows: Int[Tensor, "row"]

    @property
    def nbytes(self) -> int:
        """Total size of the queries and keys, in bytes."""
        return sum(t.numel() * t.element_size() for t in (*self.queries.values(), *self.keys.values()))


def row_scores(
    queries: Float[Tensor, "row head d_head"],
    keys: Float[Tensor, "key head d_head"],
    rows: Int[Tensor, "row"],
    relevant: Bool[Tensor, "key"],
    scale: float,
    window: int | None = None,
) -> Float[Tensor, "head"]:
    """Contextual score ``S_C`` per head (equation 1), computed from rotated queries and rotated keys.

    The score is the attention to the relevant keys, averaged over ``rows``. The row at position ``i`` attends to the
    key at position ``j`` if ``j <= i``. With a sliding window, ``j > i - window`` is also required.
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
    """Contextual score of each head in ``groups``, by layer, computed from the model's attention patterns."""
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
    """Run the unmodified model once on a prompt and its response, and record the activations for training.

    Raises:
        ValueError: If the response is empty, or if the prompt and the response do not fit into the context.
    """
    if len(response) == 0:
        raise ValueError("the response has no tokens, so there are no rows to train on")
    queries: dict[int, Tensor] = {}
    keys: dict[int, Tensor] = {}

    def keep(store: dict[int, Tensor], layer: int, heads: tuple[int, ...], first: int) -> Any:
        def observe(activation: Float[Tensor, "batch pos head d_head"], hook: Any) -> None:
            # Layers may be on different devices. Training needs all activations on one device.
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
    """Activations of one sample, recorded by :func:`capture_rows` on the prompt ``sample.prompt(case)``."""
    prompt = model.encode(sample.prompt(case))
    require_spans([sample], [prompt], ("relevant",), case)
    return capture_rows(model, prompt, response, groups, site)


class ActivationStore:
    """Activations of all training samples, stored up to a memory budget.

    Activations that exceed the budget are recomputed whenever they are needed.

    Args:
        executor: Executor that runs the forward passes.
        samples: Training samples.
        responses: Response tokens of each sample.
        groups: Heads to train, grouped by layer.
        case: Case of the prompts: ``long``, ``gold`` or ``negative``.
        site: Site at which queries and keys are recorded.
        budget: Maximum size of the stored activations, in bytes.
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
        """Yield the activations of the samples with the indices ``order``, in this order.

        Activations that are not stored are recomputed. The executor may compute several samples ahead.
        """
        missing = [index for index in order if index not in self._stored]
        recomputed = self._executor.map(self._compute, ((self._samples[i], self._responses[i]) for i in missing))
        for index in order:
            yield self._stored[index] if index in self._stored else self.keep(index, next(recomputed))

    def keep(self, index: int, rows: RowActivations) -> RowActivations:
        """Store the activations of a sample if they fit into the budget. Return ``rows`` in either case."""
        # Stored samples are never evicted. Eviction would not help, because every epoch uses every sample once.
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
