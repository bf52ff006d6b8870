"""Heads that choose a document for self-focus: found on training questions, compared on validation questions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from focuslens.heads import Head
from focuslens.interventions import HeadVotes
from focuslens.prompts.gold import Gold, gold_documents
from focuslens.prompts.sample import MultiDocSample
from focuslens.scores.question_scores import QuestionScores, question_scores
from focuslens.studies.paper.chunks import Measured, chunk_size, measure_in_chunks
from focuslens.studies.paper.scored import documents_in_chunks
from focuslens.studies.paper.study import Part, Study
from focuslens.util.html import Cell
from focuslens.viz.report import Table

__all__ = ["Chooser", "Choosers", "choosers"]


@dataclass(frozen=True)
class Chooser:
    """Heads or votes that choose a document, and how well they do on validation questions.

    Attributes:
        by: The heads, or the votes.
        name: Name of the chooser in tables.
        rows: Rows that choose, as in :class:`SelfFocus`.
        accuracy: Share of validation samples whose gold document is chosen.
        likelihood: Mean log share of the gold document; only votes have one.
    """

    by: tuple[Head, ...] | HeadVotes
    name: str
    rows: str
    accuracy: float
    likelihood: float | None = None


@dataclass(frozen=True)
class Choosers:
    """The best choosers on validation questions, and the table of all of them.

    Attributes:
        heads: Heads whose summed attention from the question chooses.
        votes: Votes on the attention from the question.
        answer: Votes on the attention from a first answer.
        table: All choosers that were compared.
    """

    heads: Chooser
    votes: Chooser
    answer: Chooser
    table: Table


def choosers(study: Study) -> Choosers:
    """Find heads and fit votes on training questions, and compare them on validation questions."""
    settings = study.settings.focus
    train, validation = (_question_attention(study, part) for part in ("train", "validation"))
    ranked = [head for head, _ in train.select(max(settings.choosing), by="contrast")]
    sums = [
        _compared(tuple(ranked[:k]), f"{k} heads", "tail", validation.attention, validation.gold)
        for k in settings.choosing
        if k <= len(ranked)
    ]
    fitted = [
        _compared(
            HeadVotes.fit(train.attention, train.gold, penalty=penalty),
            f"votes, penalty {penalty:g}",
            "tail",
            validation.attention,
            validation.gold,
        )
        for penalty in settings.penalties
    ]
    before, after = (_answer_attention(study, part) for part in ("train", "validation"))
    answers = [
        _compared(
            HeadVotes.fit(*before, rows="response", penalty=penalty), f"votes, penalty {penalty:g}", "response", *after
        )
        for penalty in settings.penalties
    ]
    rows = [_row(one) for one in (*sums, *fitted, *answers)]
    table = Table(
        "Choice of the document on validation questions: share of samples whose gold document is chosen, and mean log "
        "share of the gold document. Heads are ranked, and votes fitted, on training questions.",
        ("rows that choose", "chosen by", "gold document", "log share"),
        tuple(rows),
    )
    return Choosers(_best(sums), _best(fitted), _best(answers), table)


def _row(chooser: Chooser) -> tuple[Cell, ...]:
    rows = "the question" if chooser.rows == "tail" else "a first answer"
    return rows, chooser.name, chooser.accuracy, "-" if chooser.likelihood is None else chooser.likelihood


def _best(found: Sequence[Chooser]) -> Chooser:
    """The chooser with the highest likelihood, or without likelihoods the highest accuracy. The first of equals."""
    return max(found, key=lambda one: one.accuracy if one.likelihood is None else one.likelihood)


def _compared(
    by: tuple[Head, ...] | HeadVotes,
    name: str,
    rows: str,
    attention: Sequence[Float[Tensor, "layer head _"]],
    gold: Sequence[Gold],
) -> Chooser:
    heads = by.heads if isinstance(by, HeadVotes) else by
    right, logs = list[bool](), list[float]()
    for values, gold_places in zip(attention, gold, strict=True):
        places = list(gold_documents(gold_places))
        if not places or bool(values.isnan().any()):
            continue
        own = torch.stack([values[layer, head] for layer, head in heads])
        shares = by.shares(own) if isinstance(by, HeadVotes) else own.sum(dim=0)
        right.append(int(shares.argmax()) in places)
        if isinstance(by, HeadVotes):
            logs.append(float(shares[places].log().mean()))
    return Chooser(by, name, rows, sum(right) / len(right), sum(logs) / len(logs) if logs else None)


def _question_attention(study: Study, part: Part) -> QuestionScores:
    """Attention from the questions of one part to the documents, stored in chunks."""

    def measure(chunk: Sequence[MultiDocSample]) -> Measured:
        scores = question_scores(study.executor, chunk, null=None, batch_tokens=options.batch_tokens, progress=False)
        documents = [rearrange(one, "layer head document -> document layer head") for one in scores.attention]
        return Measured({"attention": torch.cat(documents)}, {"sample_ids": list(scores.sample_ids)})

    options, samples = study.run_options(), _samples(study, part)
    measured = _in_chunks(study, part, samples, measure)
    by_sample = measured.tensors["attention"].split([len(sample.documents) for sample in samples])
    attention = tuple(rearrange(one, "document layer head -> layer head document") for one in by_sample)
    gold = tuple(sample.gold for sample in samples)
    ids, questions = tuple(one.id for one in samples), tuple(one.question_id for one in samples)
    return QuestionScores(attention, (), (), (), (), (), gold, ids, questions)


def _answer_attention(study: Study, part: Part) -> tuple[Sequence[Tensor], Sequence[Gold]]:
    """Attention from plain answers to the documents, and the gold documents."""
    samples = _samples(study, part)
    folder = study.kept(f"{part}-documents", part=part, **_questions(study, part))
    scores = documents_in_chunks(study.executor, samples, folder, study.run_options())
    return scores.scores, scores.gold


def _samples(study: Study, part: Part) -> Sequence[MultiDocSample]:
    return study.training_samples(study.settings.focus.train) if part == "train" else study.samples(part)


def _questions(study: Study, part: Part) -> dict[str, int]:
    """The number of questions, where it is not that of the part."""
    return {"questions": study.settings.focus.train} if part == "train" and study.settings.focus.train else {}


def _in_chunks(
    study: Study,
    part: Part,
    samples: Sequence[MultiDocSample],
    measure: Callable[[Sequence[MultiDocSample]], Measured],
) -> Measured:
    size = chunk_size(study.executor, samples[0])
    folder = study.kept(f"{part}-question", **_questions(study, part))
    return measure_in_chunks(
        samples, folder, measure, label="attention of questions", chunk=size, progress=study.progress
    )
