"""Attention budget of steered heads: shares of attention to the sink, documents, question, template and response."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from focuslens.evaluation import BUDGET_PARTS, Interval
from focuslens.heads import Head
from focuslens.interventions import FocusSteering
from focuslens.prompts.sample import MultiDocSample
from focuslens.studies.paper.artefact import Finding, Piece, keep_curves, signed
from focuslens.studies.paper.scored import budget_in_chunks
from focuslens.studies.paper.study import Study
from focuslens.viz import Curve, Table, sweep_curves

__all__ = ["piece"]


def piece(study: Study, heads: Sequence[Head], folder: Path) -> Piece:
    """Measure the attention budget of the steered heads at each strength, on validation prompts.

    Args:
        study: The model and its validation questions.
        heads: Heads with directions, best first.
        folder: Folder of the figure.
    """
    steered = list(heads[: study.settings.anatomy.k])
    shares = _shares(study, steered)
    means = {alpha: by_part for alpha, values in shares.items() if (by_part := _intervals(study, values))}
    lines = [
        Curve.from_intervals(part, [(alpha, by_part[part]) for alpha, by_part in means.items()])
        for part in BUDGET_PARTS
    ]
    title = f"Attention of the top {len(steered)} heads"
    axes = sweep_curves(lines, x_label="strength alpha", y_label="share of attention", title=title)
    keep_curves(axes, folder / "budget.png", lines)
    table = Table(
        f"Shares of the response tokens' attention by part of the prompt, mean of the {len(steered)} steered heads on "
        f"{len(_samples(study))} validation prompts; each row sums to 1",
        ("alpha", *BUDGET_PARTS),
        tuple((f"{alpha:g}", *(by_part[part].mean for part in BUDGET_PARTS)) for alpha, by_part in means.items()),
    )
    caption = "Shares of the steered heads' attention by part and strength, with 95 % bootstrap intervals."
    largest = max(means)
    changes = _intervals(study, shares[largest] - shares[0.0])
    return Piece((_finding(largest, changes),), ((caption, "budget.png"),), (table,))


def _samples(study: Study) -> Sequence[MultiDocSample]:
    return study.samples("validation")[: study.settings.anatomy.samples]


def _shares(study: Study, steered: Sequence[Head]) -> dict[float, Float[Tensor, "sample part"]]:
    """Attention shares by strength, averaged over the steered heads. Strength 0 is the model without steering."""
    samples, shares = _samples(study), {}
    for alpha in sorted({0.0, *study.settings.anatomy.alphas}):
        focus = [FocusSteering(study.directions, alpha, steered)] if alpha else []
        descriptions = [steering.describe() for steering in focus]
        folder = study.kept("validation-budget", samples=len(samples), interventions=descriptions)
        budget = budget_in_chunks(study.executor, samples, folder, study.run_options(), focus)
        shares[alpha] = torch.stack([budget.shares[:, head.layer, head.head] for head in steered]).mean(dim=0)
    return shares


def _intervals(study: Study, shares: Float[Tensor, "sample part"]) -> dict[str, Interval]:
    """Mean share of each part with its interval over questions; empty if all responses are empty."""
    ids = [sample.id for sample in _samples(study)]
    intervals = {part: study.interval("validation", shares[:, i], ids) for i, part in enumerate(BUDGET_PARTS)}
    return {part: interval for part, interval in intervals.items() if interval is not None}


def _finding(alpha: float, changes: Mapping[str, Interval]) -> Finding:
    if not changes:
        return Finding(f"The budget at alpha = {alpha:g} is unknown, because no prompt has a response.")
    gain, loss = max(changes, key=lambda part: changes[part]), min(changes, key=lambda part: changes[part])
    return Finding(
        f"At alpha = {alpha:g} most attention moves from {loss} ({signed(changes[loss])}) to {gain} "
        f"({signed(changes[gain])}). The share of the relevant document changes by {signed(changes['relevant'])}."
    )
