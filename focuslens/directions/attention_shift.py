"""Change of the attention of heads by the two parts of their directions: the constant part, and ``U V^T q``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from focuslens.directions.activations import LayerHeads, RowActivations, sample_rows
from focuslens.directions.gold_responses import gold_responses, response_limits
from focuslens.directions.objective import direction_losses
from focuslens.directions.training_state import TrainedVectors
from focuslens.hooks import hook_name
from focuslens.interventions import FocusSteering
from focuslens.interventions.directions import FocusDirections
from focuslens.interventions.low_rank import LowRank
from focuslens.model.batching import RunOptions
from focuslens.model.focus_model import FocusModel
from focuslens.prompts.answers import list_samples
from focuslens.prompts.batch import EncodedPrompt
from focuslens.prompts.sample import MultiDocSample
from focuslens.prompts.spans import require_spans
from focuslens.scores.base import SINK
from focuslens.util.progress import track

__all__ = ["attention_shift"]


@torch.no_grad()
def attention_shift(
    model: FocusModel,
    samples: Iterable[MultiDocSample],
    directions: FocusDirections,
    alpha: float = 1.0,
    *,
    max_new_tokens: int = 100,
    progress: bool | None = None,
) -> pd.DataFrame:
    """Attention of response rows to parts of the long prompt, and its changes by both parts of a head's direction.

    Each head is steered alone, on activations of the unmodified model, as in training. The response is that of the
    model to the gold prompt. All numbers are means over response tokens and then over samples.

    Args:
        model: The model.
        samples: Samples with a gold document. Samples without one, or with an empty response, are left out.
        directions: Directions of any rank at either site.
        alpha: Strength of the steering.
        max_new_tokens: Maximum length of a response, in tokens.
        progress: Whether to show a progress bar; :mod:`focuslens.util.progress` describes the default.

    Returns:
        Table with one row per head and part. A part is the ``sink`` (the first two tokens), the ``relevant`` document,
        all ``irrelevant`` documents, or all ``other`` tokens. The columns are ``layer``, ``head``, ``part``, ``before``
        (attention without steering), ``constant`` (change by the constant vectors alone) and ``question`` (further
        change if ``alpha U V^T q`` is added as well). The steered attention is the sum of the three.

    Raises:
        ValueError: If the directions do not fit the model, or if no sample has a gold document and a response.
    """
    options = RunOptions(max_new_tokens, progress=progress)
    limited = response_limits(model, list_samples(samples), "long", options)
    usable, responses = gold_responses(model, limited, "long", options, None)
    if not usable:
        raise ValueError("no sample has a gold document and a response to its gold prompt")
    groups = LayerHeads.group(directions.heads, model.shape)
    steps = _steps(model, directions, groups, alpha)
    shares: list[Tensor] = []
    pairs = list(zip(usable, responses, strict=True))
    for sample, response in track(pairs, "attention of heads", unit="sample", show=progress):
        rows = sample_rows(model, sample, response, groups, "long", directions.site)
        prompt = model.encode(sample.prompt("long"))
        require_spans([sample], [prompt], ("relevant", "irrelevant"))
        masks = _masks(prompt, rows)
        shares.append(torch.stack([_shares(model, vectors, groups, rows, masks, directions) for vectors in steps]))
    before, constant, both = torch.stack(shares).double().mean(dim=0).cpu()
    values = torch.stack((before, constant - before, both - constant), dim=-1)
    table: list[dict[str, Any]] = [
        {**head._asdict(), "part": part, **dict(zip(("before", "constant", "question"), numbers, strict=True))}
        for head, by_part in zip(directions.heads, values.tolist(), strict=True)
        for part, numbers in zip(_PARTS, by_part, strict=True)
    ]
    return pd.DataFrame(table)


_PARTS = ("sink", "relevant", "irrelevant", "other")


def _steps(
    model: FocusModel, directions: FocusDirections, groups: Sequence[LayerHeads], alpha: float
) -> list[TrainedVectors]:
    """No vectors, the constant vectors, and both parts, times ``alpha``."""
    device, steering = model.device, FocusSteering(directions, alpha)
    additions = steering.additions(model.shape)
    query, key, product = alpha * directions.query.to(device), None, None
    if directions.site == "projection":
        zeros = torch.zeros(model.shape.n_key_value_heads, directions.d_head)
        by_layer = [additions.get(hook_name(group.layer, "hook_k"), zeros) for group in groups]
        chosen = zip(by_layer, groups, strict=True)
        key = torch.cat([vectors[list(group.key_value_heads)] for vectors, group in chosen]).to(device)
    if directions.u is not None and directions.v is not None:
        product = LowRank(alpha * directions.u, directions.v).to(device, query.dtype)
    nothing = TrainedVectors(torch.zeros_like(query), None if key is None else torch.zeros_like(key))
    return [nothing, TrainedVectors(query, key), TrainedVectors(query, key, product)]


def _masks(prompt: EncodedPrompt, rows: RowActivations) -> Mapping[str, Bool[Tensor, "key"]]:
    """Keys of each part of a prompt."""
    masks = {part: torch.zeros_like(rows.relevant) for part in _PARTS}
    masks["sink"][:SINK] = True
    for part in ("relevant", "irrelevant"):
        for first, last in prompt.spans.get(part, ()):
            masks[part][first:last] = True
    masks["other"] = ~(masks["sink"] | masks["relevant"] | masks["irrelevant"])
    return masks


def _shares(
    model: FocusModel,
    vectors: TrainedVectors,
    groups: Sequence[LayerHeads],
    rows: RowActivations,
    masks: Mapping[str, Bool[Tensor, "key"]],
    directions: FocusDirections,
) -> Float[Tensor, "n part"]:
    """Attention of each head to each part, which is the training score with this part as the relevant document."""
    scores = [
        -direction_losses(
            model.backend,
            vectors.query,
            vectors.key,
            groups,
            replace(rows, relevant=masks[part]),
            directions.site,
            vectors.product,
        )
        for part in _PARTS
    ]
    return torch.stack(scores, dim=-1)
