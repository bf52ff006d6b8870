"""Causal check of attribution: effect of the document that heads attribute an answer to, beside the other documents."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import fields, replace
from typing import Any, TypeVar

import torch

from focuslens.evaluation import DocumentEffects, DocumentScores, Faithfulness, document_effects
from focuslens.evaluation.effects_of_documents import EffectKind
from focuslens.heads import Head
from focuslens.prompts.sample import MultiDocSample
from focuslens.studies.paper.artefact import Artefact, Finding, signed, verdict_by
from focuslens.studies.paper.chosen_settings import random_order
from focuslens.studies.paper.chunks import Measured, chunk_size, measure_in_chunks
from focuslens.studies.paper.scored import documents_in_chunks
from focuslens.studies.paper.study import Study
from focuslens.util.html import Cell
from focuslens.util.statistics import Interval
from focuslens.viz.report import Table

__all__ = ["KEY", "SECTIONS", "run"]

KEY = "faithfulness"
SECTIONS = ("faithfulness",)
_ANSWERS: tuple[tuple[str, bool | None], ...] = (("all", None), ("right", True), ("wrong", False))
_WORDS: dict[EffectKind, str] = {"knockout": "Blocking attention to", "removal": "Removing"}

_Samples = TypeVar("_Samples", DocumentScores, DocumentEffects)


def run(study: Study) -> Artefact:
    """Compare the effects of documents on answers to test questions with the attribution by contextual heads."""
    settings = study.settings.faithfulness
    scores = documents_in_chunks(
        study.executor, study.samples("test"), study.kept("test-documents", part="test"), study.run_options()
    )
    knockout = _effects(study, scores, "knockout", settings.questions)
    removal = _effects(study, scores, "removal", settings.removal)
    heads = _heads(study)
    rows = [row for effects in (knockout, removal) for row in _rows(study, scores, effects, heads)]
    return Artefact(
        KEY,
        "Does the answer depend on the document that it is attributed to?",
        "beyond the paper",
        tuple(_findings(study, scores, (knockout, removal), heads)),
        (),
        (_table(rows), _table_of_gold(study, (knockout, removal))),
    )


def _heads(study: Study) -> dict[str, Sequence[Head]]:
    """Heads that attribute, by name. Random heads are from the lower half of the ranking."""
    ranking, k = study.ranking, min(study.settings.faithfulness.k, len(study.ranking))
    others = random_order(ranking, len(ranking) // 2, study.settings.seed)
    return {"contextual": ranking[:k], "random": others[:k], "all": ranking}


def _effects(study: Study, scores: DocumentScores, by: EffectKind, questions: int | None) -> DocumentEffects:
    """Effects on the scored responses to the first test questions, stored in chunks."""
    samples, options = study.samples("test", questions), study.run_options()
    responses = dict(zip(scores.sample_ids, scores.responses, strict=True))

    def measure(chunk: Sequence[MultiDocSample]) -> Measured:
        effects = document_effects(
            study.executor,
            chunk,
            responses=[responses[sample.id] for sample in chunk],
            by=by,
            max_new_tokens=options.max_new_tokens,
            batch_tokens=options.batch_tokens,
            progress=options.progress,
        )
        about = {name: getattr(effects, name) for name in ("sample_ids", "responses", "correct", "n_tokens")}
        log_probabilities = torch.tensor(effects.log_probabilities, dtype=torch.float64)
        return Measured({"effects": torch.cat(effects.effects), "log_probabilities": log_probabilities}, about)

    measured = measure_in_chunks(
        samples,
        study.kept(f"test-{by}", part="test", by=by, questions=questions),
        measure,
        label=f"effects ({by})",
        chunk=_chunk(study, samples[0], by),
        progress=study.progress,
    )
    return DocumentEffects(
        measured.tensors["effects"].split([len(sample.documents) for sample in samples]),
        tuple(measured.tensors["log_probabilities"].tolist()),
        by=by,
        gold=tuple(sample.gold for sample in samples),
        question_ids=tuple(sample.question_id for sample in samples),
        **{name: tuple(values) for name, values in measured.about.items()},
    )


def _chunk(study: Study, sample: MultiDocSample, by: EffectKind) -> int:
    """Number of samples per chunk. Each document takes a run of the prompt, or a run of the rows of the response."""
    passes = float(len(sample.documents))
    if by == "knockout":
        passes *= study.settings.max_new_tokens / len(study.executor.encode(sample.prompt()).tokens)
    return max(1, int(chunk_size(study.executor, sample) / (1 + passes)))


def _of(results: _Samples, sample_ids: Collection[str]) -> _Samples:
    """Scores or effects of some samples, in the order of ``sample_ids``."""
    places = {name: place for place, name in enumerate(results.sample_ids)}
    order = [places[name] for name in sample_ids]
    columns: dict[str, Any] = {
        field.name: tuple(values[place] for place in order)
        for field in fields(results)
        if isinstance(values := getattr(results, field.name), tuple) and values
    }
    return replace(results, **columns)


def _has_any(effects: DocumentEffects, correct: bool | None = None, *, gold: bool = False) -> bool:
    """Whether a sample has effects to compare: a response of the kind, and two documents or a gold document."""
    return any(
        n > 0 and correct in (None, is_right) and (place is not None if gold else len(values) > 1)
        for values, n, is_right, place in zip(
            effects.effects, effects.n_tokens, effects.correct, effects.gold, strict=True
        )
    )


def _compared(
    study: Study, scores: DocumentScores, effects: DocumentEffects, heads: Sequence[Head], correct: bool | None
) -> Faithfulness | None:
    if not _has_any(effects, correct):
        return None
    ranking = _of(scores, effects.sample_ids)
    return effects.faithfulness(ranking, heads, correct=correct, seed=study.settings.seed)


def _rows(
    study: Study, scores: DocumentScores, effects: DocumentEffects, sets: dict[str, Sequence[Head]]
) -> Iterator[tuple[Cell, ...]]:
    for name, heads in sets.items():
        for answers, correct in _ANSWERS:
            result = _compared(study, scores, effects, heads, correct)
            if result is None:
                continue
            means = (result.attributed_effect, result.other_effect, result.difference, result.larger, result.largest)
            numbers = (number for mean in (*means, result.correlation) for number in _cells(mean))
            yield (effects.by, name, len(heads), answers, len(result), *numbers, result.p_value)


def _cells(mean: Interval | None) -> tuple[Cell, ...]:
    return ("-", "-", "-") if mean is None else (mean.mean, mean.low, mean.high)


def _table(rows: Sequence[tuple[Cell, ...]]) -> Table:
    names = ("attributed", "others", "difference", "larger", "largest", "correlation")
    return Table(
        "Fall of the answer's log-probability (nats) when the document that heads attribute the answer to is ablated, "
        "when another document of the prompt is, and the difference. larger: probability that the attributed document "
        "has a larger effect than a random other one; largest: share of samples in which it has the largest; "
        "correlation: mean rank correlation between scores and effects. Each with its 95 % interval. p: exact "
        "sign-flip test over questions of larger against 1/2",
        (
            "ablation",
            "heads",
            "k",
            "answers",
            "samples",
            *(f"{name}{end}" for name in names for end in ("", " low", " high")),
            "p",
        ),
        tuple(rows),
    )


def _table_of_gold(study: Study, kinds: Sequence[DocumentEffects]) -> Table:
    rows: list[tuple[Cell, ...]] = []
    for effects in kinds:
        for answers, correct in _ANSWERS:
            if _has_any(effects, correct, gold=True):
                ranks = effects.attribution(correct=correct, seed=study.settings.seed)
                cells = (cell for mean in (ranks.accuracy, ranks.mrr) for cell in _cells(mean))
                rows.append((effects.by, answers, len(ranks.rank), *cells))
    return Table(
        "Rank of the gold document by effect: share of first ranks and mean reciprocal rank, each with its 95 % "
        "interval",
        (
            "ablation",
            "answers",
            "samples",
            *(f"{name}{end}" for name in ("first", "MRR") for end in ("", " low", " high")),
        ),
        tuple(rows),
    )


def _findings(
    study: Study,
    scores: DocumentScores,
    kinds: Sequence[DocumentEffects],
    sets: dict[str, Sequence[Head]],
) -> Iterator[Finding]:
    for effects in kinds:
        result = _compared(study, scores, effects, sets["contextual"], None)
        if result is None:
            yield Finding(f"No answer has a token, so {effects.by} has no effects to compare.")
            continue
        yield Finding(
            f"{_WORDS[effects.by]} the document that the top {len(sets['contextual'])} heads attribute the answer to "
            "changes the answer more than another document: its log-probability falls by "
            f"{result.attributed_effect} nats instead of {result.other_effect}, a difference of "
            f"{signed(result.difference)} (exact p = {result.p_value:.2g}, {len(result)} samples).",
            verdict_by(result.difference),
        )
        yield from _controls(study, scores, effects, sets)
    yield from _agreement(study, *kinds)


def _agreement(study: Study, knockout: DocumentEffects, removal: DocumentEffects) -> Iterator[Finding]:
    """Finding on the agreement of both ablations, on the samples that have both."""
    both = [name for name in removal.sample_ids if name in set(knockout.sample_ids)]
    first, second = _of(knockout, both), _of(removal, both)
    if _has_any(second):
        result = second.faithfulness(first, seed=study.settings.seed)
        correlation = "unknown" if result.correlation is None else str(result.correlation)
        yield Finding(
            f"Both ablations agree on the document with the largest effect in {result.largest} of {len(result)} "
            f"samples. The mean rank correlation of their effects is {correlation}."
        )


def _controls(
    study: Study, scores: DocumentScores, effects: DocumentEffects, sets: dict[str, Sequence[Head]]
) -> Iterator[Finding]:
    """Findings on right and wrong answers apart, and on other heads."""
    right, wrong = (_compared(study, scores, effects, sets["contextual"], correct) for correct in (True, False))
    if right is not None and wrong is not None:
        yield Finding(
            f"By {effects.by}, the difference is {signed(right.difference)} for {len(right)} right answers and "
            f"{signed(wrong.difference)} for {len(wrong)} wrong answers."
        )
    random, every = (_compared(study, scores, effects, sets[name], None) for name in ("random", "all"))
    n_random = len(sets["random"])
    if random is not None and every is not None:
        yield Finding(
            f"By {effects.by}, the difference is {signed(random.difference)} for {n_random} random heads and "
            f"{signed(every.difference)} for all heads."
        )
