"""Where the attention of steered heads goes: sink, documents, question, template, response."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from focuslens.evaluation import BUDGET_PARTS
from focuslens.heads import Head
from focuslens.interventions import FocusSteering
from focuslens.paper.artefact import Finding, Piece, keep_figure
from focuslens.paper.scored import budget_in_chunks
from focuslens.paper.study import Study
from focuslens.viz import Curve, Table, sweep_curves

__all__ = ["piece"]

_Shares = Mapping[float, Mapping[str, float]]
"""The share of each part, by strength."""


def piece(study: Study, heads: Sequence[Head], folder: Path) -> Piece:
    """Where the steered heads' attention goes at each strength, on validation prompts."""
    steered = list(heads[: study.settings.anatomy.k])
    shares = _shares(study, steered)
    lines = [
        Curve(part, tuple(shares), *(tuple(one[part] for one in shares.values()) for _ in range(3)))
        for part in BUDGET_PARTS
    ]
    title = f"Attention of the top {len(steered)} heads"
    keep_figure(sweep_curves(lines, x_label="alpha", y_label="share of attention", title=title), folder / "budget.png")
    n = len(study.samples("validation")[: study.settings.anatomy.samples])
    table = Table(
        f"Where the attention of response tokens goes, mean of the {len(steered)} steered heads on {n} validation "
        "prompts; each line sums to 1",
        ("alpha", *BUDGET_PARTS),
        tuple((f"{alpha:g}", *(one[part] for part in BUDGET_PARTS)) for alpha, one in shares.items()),
    )
    return Piece(
        (_finding(shares),), (("Where the steered heads' attention goes at each strength.", "budget.png"),), (table,)
    )


def _shares(study: Study, steered: Sequence[Head]) -> _Shares:
    wanted = study.settings.anatomy
    samples = study.samples("validation")[: wanted.samples]
    shares: dict[float, dict[str, float]] = {}
    for alpha in sorted({0.0, *wanted.alphas}):
        focus = [FocusSteering(study.directions, alpha, steered)] if alpha else []
        described = [one.describe() for one in focus]
        folder = study.kept("validation-budget", samples=len(samples), interventions=described)
        shares[alpha] = budget_in_chunks(study.model, samples, folder, study.how(), focus).mean(steered)
    return shares


def _finding(shares: _Shares) -> Finding:
    largest = max(shares)
    moved = {part: shares[largest][part] - shares[0.0][part] for part in BUDGET_PARTS}
    gains, losses = max(moved, key=lambda part: moved[part]), min(moved, key=lambda part: moved[part])
    return Finding(
        f"At alpha = {largest:g} attention moves most from {losses} ({moved[losses]:+.3f}) to {gains} "
        f"({moved[gains]:+.3f}); the relevant document gets {moved['relevant']:+.3f}."
    )
