"""``focuslens rerank``: documents ordered by the attention that they receive from the question."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from focuslens.cli import cluster, options
from focuslens.cli.command import Command
from focuslens.cli.common import RunSettings, open_executor, open_samples, print_table, run_description
from focuslens.cli.output import document
from focuslens.cli.rankings import count_heads

if TYPE_CHECKING:
    from focuslens.heads import Head
    from focuslens.model.execution import Executor
    from focuslens.prompts.sample import MultiDocSample
    from focuslens.scores.document_scores import Attribution
    from focuslens.scores.question_scores import QuestionScores

__all__ = ["COMMAND"]

_LOG = logging.getLogger(__name__)

_TOP_K = 16
"""Number of heads, as in QRHead."""


def _add_options(parser: argparse.ArgumentParser) -> None:
    options.add_model(parser)
    options.add_samples(parser)
    options.add_run(parser)
    options.add_ranking(parser)
    parser.add_argument(
        "--select",
        choices=("attention", "ndcg", "contrast"),
        default="contrast",
        help="how training samples choose the heads, without --heads: by attention to the gold document, by NDCG@10 "
        "(QRHead), or by contrast with the other documents (CoRe, default)",
    )
    parser.add_argument("--top-k", type=options.positive, help=f"number of heads to rank by (default {_TOP_K})")
    parser.add_argument(
        "--train-samples", type=options.positive, default=50, help="samples that choose the heads (default 50)"
    )
    parser.add_argument(
        "--rows",
        choices=("question", "tail", "last"),
        default="tail",
        help="rows to read: the question's, those from the question to the prompt's end (default), or the last one",
    )
    cluster.add_options(parser)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Rank the documents of each sample, print how well the gold document is found, and with ``--out`` write all."""
    settings = RunSettings.of(args)
    with open_executor(args, settings.model) as model:
        return _rank(args, settings.fitted(model), model)


def _rank(args: argparse.Namespace, settings: RunSettings, model: Executor) -> dict[str, Any]:
    import pandas as pd

    from focuslens.scores.question_scores import question_scores
    from focuslens.util.files import write_json

    n_heads = model.shape.n_layers * model.shape.n_heads
    k = count_heads("--top-k", args.top_k, n_heads, default=_TOP_K)
    ranking, source = _heads(args, settings, model)
    heads = ranking[:k]
    data = open_samples(settings.samples, "test")
    scores = question_scores(model, data.samples, heads, rows=args.rows, batch_tokens=settings.batch_tokens)
    known = any(sample.gold_index is not None for sample in data.samples)
    ranks = _ranks(scores, data.samples, settings.seed) if known else {}
    rows = [
        {"ranked by": name, **{key: _shown(getattr(rank, key)) for key in ("accuracy", "mrr", "ndcg")}}
        for name, rank in ranks.items()
    ]
    print(f"{model.name}: {len(data.samples)} samples, {len(heads)} heads {source['text']}\n")
    if known:
        print_table(pd.DataFrame(rows))
    else:
        print("no relevant document is known, so the order is not judged; --out writes it")
    result = {
        **run_description(settings, model, data),
        "rows": args.rows,
        "heads": [list(head) for head in heads],
        "heads_from": source,
        "ranks": {name: _entry(rank) for name, rank in ranks.items()},
        "samples": [
            {"id": name, "order": values.argsort(descending=True, stable=True).tolist(), "scores": values.tolist()}
            for name, values in zip(scores.sample_ids, scores.of(scoring="filtered"), strict=True)
        ],
    }
    if settings.out is None:
        return document(result)
    path = settings.out / "rerank.json"
    write_json(path, result)
    print(f"\nwrote {path}")
    return document(result, path)


def _heads(args: argparse.Namespace, settings: RunSettings, model: Executor) -> tuple[list[Head], dict[str, Any]]:
    """All heads, the best first, and where their order is from."""
    from focuslens.heads import load_ranking
    from focuslens.scores.question_scores import question_scores

    if args.heads is not None:
        return list(load_ranking(args.heads)), {"file": args.heads, "text": f"of {args.heads}"}
    training = open_samples(settings.samples, "train", args.train_samples)
    _LOG.info("choosing heads by %s on %d training samples", args.select, len(training.samples))
    scores = question_scores(model, training.samples, rows=args.rows, batch_tokens=settings.batch_tokens)
    text = f"chosen by {args.select} on {len(training.samples)} training samples"
    return [head for head, _ in scores.select(by=args.select)], {
        "criterion": args.select,
        "samples": list(scores.sample_ids),
        "text": text,
    }


def _ranks(scores: QuestionScores, samples: Sequence[MultiDocSample], seed: int) -> dict[str, Attribution]:
    """Ranks of the gold documents by each scoring, and by BM25."""
    from focuslens.data.similarity import bm25_scores
    from focuslens.heads import Head
    from focuslens.scores.document_scores import rank_documents

    n_layers, n_heads = scores.attention[0].shape[:2]
    every = [Head(layer, head) for layer in range(n_layers) for head in range(n_heads)]
    bm25 = rank_documents(bm25_scores(samples), scores.gold, scores.question_ids, seed=seed)
    return {
        "BM25": bm25,
        "attention": scores.attribution(seed=seed),
        "calibrated": scores.attribution(scoring="calibrated", seed=seed),
        "filtered (QRHead, CoRe)": scores.attribution(scoring="filtered", seed=seed),
        "filtered, all heads (ICR)": scores.attribution(every, "filtered", seed=seed),
    }


def _shown(value: Any) -> str:
    return f"{value.mean:.3f} [{value.low:.3f}, {value.high:.3f}]"


def _entry(rank: Attribution) -> dict[str, Any]:
    values = {name: getattr(rank, name) for name in ("accuracy", "mrr", "ndcg")}
    intervals = {name: {"mean": one.mean, "low": one.low, "high": one.high} for name, one in values.items()}
    return {**intervals, "rank": list(rank.rank)}


COMMAND = Command(
    name="rerank",
    help="order documents by the attention from the question",
    description="Order the documents of each sample by the attention that they receive from the question, before\n"
    "anything is generated, and say how well this finds the gold document, beside BM25. Heads come from a\n"
    "file (--heads), or training samples choose them (--select).",
    example="focuslens rerank --model smollm2-135m-instruct --data nq-open-oracle.jsonl.gz --distractors bm25",
    add_options=_add_options,
    run=run,
)
