"""From heads to questions: is the document with the highest contextual score the one the answer came from?"""

from __future__ import annotations

from collections.abc import Sequence

from focuslens.evaluation import Attribution, DocumentScores
from focuslens.heads import Head
from focuslens.studies.paper.artefact import Artefact, Finding, keep_curves
from focuslens.studies.paper.choosing import possible, random_order
from focuslens.studies.paper.scored import documents_in_chunks
from focuslens.studies.paper.study import Study
from focuslens.util.html import Cell
from focuslens.viz import Curve, sweep_curves
from focuslens.viz.report import Table

__all__ = ["KEY", "SECTIONS", "run"]

KEY = "attribution"
SECTIONS = ("split_softmax",)
_MOST = 20


def run(study: Study) -> Artefact:
    """Ranks documents of test questions by the scores of contextual heads, of random ones and of all heads."""
    ranking, settings = study.ranking, study.settings
    scores = documents_in_chunks(
        study.executor, study.samples("test"), study.kept("test-documents", part="test"), study.run_options()
    )
    ks = [k for k in possible(settings.split_softmax.ks, len(ranking)) if k <= _MOST] or [min(_MOST, len(ranking))]
    others = random_order(ranking, min(settings.split_softmax.exclude, len(ranking) // 2), settings.seed)
    sets: list[tuple[str, int, Sequence[Head]]] = [("contextual", k, ranking[:k]) for k in ks]
    sets += [("random", k, others[:k]) for k in ks]
    sets.append(("all", len(ranking), ranking))
    found = {(name, k): scores.attribution(heads, seed=settings.seed) for name, k, heads in sets}
    _draw(study, found, ks)
    return Artefact(
        KEY,
        "Which document did the answer come from?",
        "beyond the paper",
        tuple(_findings(study, scores, found, ks)),
        (
            (
                "Share of test questions whose gold document has the highest contextual score, by the heads whose "
                "scores are averaged, with 95 % bootstrap intervals.",
                "attribution.png",
            ),
        ),
        (_table(study, scores, sets),),
    )


def _draw(study: Study, found: dict[tuple[str, int], Attribution], ks: Sequence[int]) -> None:
    lines = [
        Curve.from_intervals(f"{name} heads", [(k, found[name, k].accuracy) for k in ks])
        for name in ("contextual", "random")
    ]
    chance = 1 / study.settings.data.documents
    levels = {"all heads": found["all", len(study.ranking)].accuracy}
    axes = sweep_curves(
        lines,
        levels,
        x_label="heads (top k)",
        y_label="gold document ranked first (share of samples)",
        title=f"Attribution (chance: {chance:.2f})",
    )
    keep_curves(axes, study.folder(KEY) / "attribution.png", lines, levels)


def _attribution(scores: DocumentScores, heads: Sequence[Head], correct: bool | None, seed: int) -> Attribution | None:
    """Of all answers, right ones or wrong ones; ``None`` where there are none with anything said."""
    try:
        return scores.attribution(heads, correct=correct, seed=seed)
    except ValueError:
        return None


def _table(study: Study, scores: DocumentScores, sets: Sequence[tuple[str, int, Sequence[Head]]]) -> Table:
    rows: list[tuple[Cell, ...]] = []
    for name, k, heads in sets:
        for of, correct in (("all", None), ("right", True), ("wrong", False)):
            one = _attribution(scores, heads, correct, study.settings.seed)
            if one is None:
                continue
            measures = (
                part for of_all in (one.accuracy, one.mrr, one.ndcg) for part in (of_all.mean, of_all.low, of_all.high)
            )
            rows.append((name, k, of, len(one.rank), *measures))
    return Table(
        "Rank of the gold document by contextual score, held-out questions: share that stands first, mean reciprocal "
        "rank, NDCG, each with its 95 % interval",
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
    study: Study, scores: DocumentScores, found: dict[tuple[str, int], Attribution], ks: Sequence[int]
) -> list[Finding]:
    k = max(ks, key=lambda k: found["contextual", k].accuracy.mean)
    best, same, everything = found["contextual", k], found["random", k], found["all", len(study.ranking)]
    sentences = [
        Finding(
            f"The top {k} heads together give the gold document the highest score in {best.accuracy} of test "
            f"questions, as many random other heads in {same.accuracy}, all heads in {everything.accuracy}; the best "
            "k is chosen on these questions."
        )
    ]
    right, wrong = (_attribution(scores, study.ranking[:k], one, study.settings.seed) for one in (True, False))
    if right is not None and wrong is not None:
        sentences.append(
            Finding(
                f"Where the answer is right it stands first in {right.accuracy}, where it is wrong in {wrong.accuracy}."
            )
        )
    return sentences
