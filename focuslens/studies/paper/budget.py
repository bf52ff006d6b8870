"""Where the attention of steered heads goes: sink, documents, question, template, response."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from focuslens.evaluation import BUDGET_PARTS, Interval
from focuslens.heads import Head
from focuslens.interventions import FocusSteering
from focuslens.prompts.prompt import MultiDocSample
from focuslens.studies.paper.artefact import Finding, Piece, keep_curves, signed
from focuslens.studies.paper.scored import budget_in_chunks
from focuslens.studies.paper.study import Study
from focuslens.viz import Curve, Table, sweep_curves

__all__ = ["piece"]


def piece(study: Study, heads: Sequence[Head], folder: Path) -> Piece:
    """Where the steered heads' attention goes at each strength, on validation prompts."""
    steered = list(heads[: study.settings.anatomy.k])
    shares = _shares(study, steered)
    means = {alpha: known for alpha, one in shares.items() if (known := _intervals(study, one))}
    lines = [Curve.from_intervals(part, [(alpha, one[part]) for alpha, one in means.items()]) for part in BUDGET_PARTS]
    title = f"Attention of the top {len(steered)} heads"
    axes = sweep_curves(lines, x_label="strength alpha", y_label="share of attention", title=title)
    keep_curves(axes, folder / "budget.png", lines)
    table = Table(
        f"Where the attention of response tokens goes (share of attention), mean of the {len(steered)} steered heads "
        f"on {len(_samples(study))} validation prompts; each line sums to 1",
        ("alpha", *BUDGET_PARTS),
        tuple((f"{alpha:g}", *(one[part].mean for part in BUDGET_PARTS)) for alpha, one in means.items()),
    )
    caption = "Where the steered heads' attention goes at each strength, with 95 % bootstrap intervals."
    largest = max(means)
    moved = _intervals(study, shares[largest] - shares[0.0])
    return Piece((_finding(largest, moved),), ((caption, "budget.png"),), (table,))


def _samples(study: Study) -> Sequence[MultiDocSample]:
    return study.samples("validation")[: study.settings.anatomy.samples]


def _shares(study: Study, steered: Sequence[Head]) -> dict[float, Float[Tensor, "sample part"]]:
    """The mean shares of the steered heads, by strength."""
    samples, shares = _samples(study), {}
    for alpha in sorted({0.0, *study.settings.anatomy.alphas}):
        focus = [FocusSteering(study.directions, alpha, steered)] if alpha else []
        described = [one.describe() for one in focus]
        folder = study.kept("validation-budget", samples=len(samples), interventions=described)
        found = budget_in_chunks(study.executor, samples, folder, study.run_options(), focus)
        shares[alpha] = torch.stack([found.shares[:, head.layer, head.head] for head in steered]).mean(dim=0)
    return shares


def _intervals(study: Study, shares: Float[Tensor, "sample part"]) -> dict[str, Interval]:
    """The mean of each part with its interval over questions; none where no prompt has a response."""
    ids = [sample.id for sample in _samples(study)]
    found = {part: study.interval("validation", shares[:, i], ids) for i, part in enumerate(BUDGET_PARTS)}
    return {part: one for part, one in found.items() if one is not None}


def _finding(alpha: float, moved: Mapping[str, Interval]) -> Finding:
    if not moved:
        return Finding(f"Nothing is said of alpha = {alpha:g}: no response to look at.")
    gains, losses = max(moved, key=lambda part: moved[part]), min(moved, key=lambda part: moved[part])
    return Finding(
        f"At alpha = {alpha:g} attention moves most from {losses} ({signed(moved[losses])}) to {gains} "
        f"({signed(moved[gains])}); the relevant document gets {signed(moved['relevant'])}."
    )
