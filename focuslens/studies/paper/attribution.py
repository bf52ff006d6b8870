"""Attribution of answers to documents: rank of the gold document by contextual score."""

from __future__ import annotations

from collections.abc import Sequence

from focuslens.evaluation import Attribution, DocumentScores
from focuslens.heads import Head
from focuslens.scores.chance import Measure
from focuslens.studies.paper.artefact import Artefact, Finding, keep_curves
from focuslens.studies.paper.chosen_settings import possible, random_order
from focuslens.studies.paper.scored import documents_in_chunks
from focuslens.studies.paper.study import Study
from focuslens.util.html import Cell
from focuslens.viz import Curve, sweep_curves
from focuslens.viz.report import Table

__all__ = ["KEY", "SECTIONS", "run"]

KEY = "attribution"
SECTIONS = ("split_softmax",)
_MOST = 20
_CAPTION = (
    "Rank of the gold document by contextual score on held-out questions: share of first ranks, mean reciprocal rank, "
    "NDCG, each with its 95 % interval"
)
_BY_EXCESS = (
    "The same by the excess over chance, which favours no long document. Even attention ranks by chance alone, the "
    "longest document first"
)


def run(study: Study) -> Artefact:
    """Rank the documents of test questions by the scores of contextual heads, random heads and all heads."""
    ranking, settings = study.ranking, study.settings
    samples = study.samples("test")
    scores = documents_in_chunks(
        study.executor, samples, study.kept("test-documents", part="test"), study.run_options()
    ).with_chance(study.executor, samples)
    ks = [k for k in possible(settings.split_softmax.ks, len(ranking)) if k <= _MOST] or [min(_MOST, len(ranking))]
    others = random_order(ranking, min(settings.split_softmax.exclude, len(ranking) // 2), settings.seed)
    sets: list[tuple[str, int, Sequence[Head]]] = [("contextual", k, ranking[:k]) for k in ks]
    sets += [("random", k, others[:k]) for k in ks]
    sets.append(("all", len(ranking), ranking))
    attributions = {(name, k): scores.attribution(heads, seed=settings.seed) for name, k, heads in sets}
    _draw(study, attributions, ks)
    return Artefact(
        KEY,
        "Which document did the answer come from?",
        "beyond the paper",
        tuple(_findings(study, scores, attributions, ks)),
        (
            (
                "Share of test questions whose gold document has the highest mean contextual score over the top k "
                "heads, with 95 % bootstrap intervals.",
                "attribution.png",
            ),
        ),
        (_table(_CAPTION, _rows(study, scores, sets)), _table(_BY_EXCESS, _rows_above_chance(study, scores, sets))),
    )


def _draw(study: Study, attributions: dict[tuple[str, int], Attribution], ks: Sequence[int]) -> None:
    lines = [
        Curve.from_intervals(f"{name} heads", [(k, attributions[name, k].accuracy) for k in ks])
        for name in ("contextual", "random")
    ]
    chance = 1 / study.settings.data.documents
    levels = {"all heads": attributions["all", len(study.ranking)].accuracy}
    axes = sweep_curves(
        lines,
        levels,
        x_label="heads (top k)",
        y_label="gold document ranked first (share of samples)",
        title=f"Attribution (chance: {chance:.2f})",
    )
    keep_curves(axes, study.folder(KEY) / "attribution.png", lines, levels)


def _attribution(
    scores: DocumentScores, heads: Sequence[Head], correct: bool | None, seed: int, by: Measure = "score"
) -> Attribution | None:
    """Attribution of right, wrong or (``correct=None``) all answers; ``None`` if no answer of the kind has a token."""
    try:
        return scores.attribution(heads, by=by, correct=correct, seed=seed)
    except ValueError:
        return None


def _rows(
    study: Study, scores: DocumentScores, sets: Sequence[tuple[str, int, Sequence[Head]]], by: Measure = "score"
) -> list[tuple[Cell, ...]]:
    """Rows of a table of ranks: one per set of heads and kind of answer."""
    rows: list[tuple[Cell, ...]] = []
    for name, k, heads in sets:
        for answers, correct in (("all", None), ("right", True), ("wrong", False)):
            attribution = _attribution(scores, heads, correct, study.settings.seed, by)
            if attribution is None:
                continue
            measures = (attribution.accuracy, attribution.mrr, attribution.ndcg)
            numbers = (number for measure in measures for number in (measure.mean, measure.low, measure.high))
            rows.append((name, k, answers, len(attribution.rank), *numbers))
    return rows


def _rows_above_chance(
    study: Study, scores: DocumentScores, sets: Sequence[tuple[str, int, Sequence[Head]]]
) -> list[tuple[Cell, ...]]:
    """Rows of ranks by the excess over chance, and of ranks by chance alone."""
    rows = _rows(study, scores, sets, "excess")
    return rows + _rows(study, scores, [("even attention", 0, study.ranking[:1])], "chance")


def _table(caption: str, rows: Sequence[tuple[Cell, ...]]) -> Table:
    return Table(
        caption,
        (
            "heads",
            "k",
            "answers",
            "samples",
            *(f"{name}{end}" for name in ("first", "MRR", "NDCG") for end in ("", " low", " high")),
        ),
        tuple(rows),
    )


def _findings(
    study: Study, scores: DocumentScores, attributions: dict[tuple[str, int], Attribution], ks: Sequence[int]
) -> list[Finding]:
    k = max(ks, key=lambda k: attributions["contextual", k].accuracy.mean)
    best, random = attributions["contextual", k], attributions["random", k]
    all_heads = attributions["all", len(study.ranking)]
    findings = [
        Finding(
            f"The gold document has the highest score by the top {k} heads together in {best.accuracy} of test "
            f"questions, by {k} random other heads in {random.accuracy}, and by all heads in {all_heads.accuracy}. "
            "This k is the best on the same questions."
        )
    ]
    right, wrong = (_attribution(scores, study.ranking[:k], correct, study.settings.seed) for correct in (True, False))
    if right is not None and wrong is not None:
        findings.append(
            Finding(
                f"The gold document ranks first in {right.accuracy} of right answers and in {wrong.accuracy} of wrong "
                "answers."
            )
        )
    return findings
