"""``focuslens heads``: contextual scores, ranking and sparsity of all heads."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from focuslens.cli import cluster, options
from focuslens.cli.command import Command
from focuslens.cli.common import RunSettings, open_executor, open_samples, print_table, run_description
from focuslens.cli.figures import note_figures, save_drawn
from focuslens.cli.output import document
from focuslens.cli.rankings import (
    chance_entries,
    count_heads,
    remove_scores,
    score_intervals,
    score_samples,
    sparsity_entries,
)

if TYPE_CHECKING:
    from pathlib import Path

    import pandas as pd

    from focuslens.heads import Head, HeadKind, ModelShape
    from focuslens.model.execution import Executor
    from focuslens.model.focus_model import FocusModel
    from focuslens.prompts.sample import MultiDocSample
    from focuslens.scores.chance import Measure
    from focuslens.scores.contextual_scores import ContextualScores

__all__ = ["COMMAND"]


def _add_options(parser: argparse.ArgumentParser) -> None:
    options.add_model(parser)
    options.add_samples(parser)
    options.add_run(parser)
    parser.add_argument(
        "--case",
        choices=("long", "gold", "negative", "correct", "wrong"),
        default="long",
        help="prompts to score: all documents (long, default), the gold one, or the others; or long prompts that are "
        "answered correctly or wrongly",
    )
    parser.add_argument(
        "--top", type=options.positive, help="number of heads to print; default: 20, or all if there are fewer"
    )
    parser.add_argument(
        "--by",
        choices=("score", "excess", "document-excess"),
        default="score",
        help="what ranks the heads: the relevant score (default, as in the paper), its excess over the score of even "
        "attention, or its excess over an even spread of the head's attention over the documents",
    )
    parser.add_argument(
        "--whole-prompt",
        action="store_true",
        help="leave out heads that cannot see the whole of the longest prompt: heads with a shorter window or chunk",
    )
    parser.add_argument(
        "--ranking-form",
        choices=("qrhead", "duoattention"),
        help="also write the ranking in the form of this program to --out: the --top heads as qrheads.yaml, or every "
        "key-value head as the directory duoattention",
    )
    cluster.add_options(parser)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Score all heads, print the scores and, with ``--out``, write ``heads.json`` and ``head_map.png``."""
    settings = RunSettings.of(args)
    if args.ranking_form and settings.out is None:
        raise ValueError(f"--ranking-form {args.ranking_form} writes a file; give --out")
    note_figures(settings.out)
    with open_executor(args, settings.model) as model:
        top = count_heads("--top", args.top, model.shape.n_layers * model.shape.n_heads)
        ranked = _Ranked(top, args.by.replace("-", "_"), args.whole_prompt, args.ranking_form)
        return _score(settings, model, args.case, ranked)


@dataclass(frozen=True)
class _Ranked:
    """Options of a ranking: number of heads to print, measure, whether heads must see the prompt, and further form."""

    top: int
    by: Measure
    whole_prompt: bool
    form: str | None


def _score(settings: RunSettings, model: Executor, case: str, ranked: _Ranked) -> dict[str, Any]:
    from focuslens.heads import whole_prompt_heads
    from focuslens.util.files import write_json

    settings = settings.fitted(model)
    data = open_samples(settings.samples, "train")
    scores = score_samples(settings, model, data, case)
    top, by = ranked.top, ranked.by
    ranking, kinds = scores.ranking(by), _kinds(model)
    if ranked.whole_prompt:
        longest = max(len(model.encode(sample.prompt("long")).tokens) for sample in data.samples)
        ranking = whole_prompt_heads(ranking, kinds, longest + settings.max_new_tokens)
        if not ranking:
            raise ValueError(f"--whole-prompt leaves no head: no head sees all of {longest} tokens")
    frame = _ordered(scores.to_frame(), ranking)
    print(f"{model.name}: {len(scores)} {case} prompts{_answered(scores, data.samples)}")
    _print(scores, frame, top, by, kinds)
    result = {
        **run_description(settings, model, data),
        "case": case,
        "samples": list(scores.sample_ids),
        "correct": sum(scores.correct),
        **({} if by == "score" else {"ranked_by": by}),
        "heads": [list(head) for head in ranking],
        **({} if all(kind.plain for kind in kinds) else {"kinds": [str(kind) for kind in kinds]}),
        "intervals": score_intervals(scores, data.samples, ranking, settings.seed),
        "scores": _ordered(scores.to_frame(), scores.ranking(by)).to_dict(orient="records"),
        "sparsity": sparsity_entries(scores.sparsity()),
        **chance_entries(scores, data.samples, ranking, settings.seed),
    }
    if settings.out is None:
        return document(result)
    table = settings.out / "heads.json"
    write_json(table, result)
    figures = save_drawn(lambda: _head_map(scores, ranking[: min(top, 10)], kinds), settings.out / "head_map.png")
    others = [] if ranked.form is None else [_in_form(ranking, settings.out, ranked.form, model.shape, top)]
    remove_scores(settings)
    print(f"\nwrote {' and '.join(str(path) for path in (table, *figures, *others))}")
    return document(result, table, *figures, *others)


def _answered(scores: ContextualScores, samples: Sequence[MultiDocSample]) -> str:
    """How many responses are right, and how many prompts rank the heads if some have no relevant document."""
    answerable = sum(bool(sample.answers) for sample in samples)
    of = "" if answerable == len(samples) else f" of {answerable} with accepted answers"
    text = f", {sum(scores.correct)}{of} answered correctly" if answerable else " without accepted answers"
    known = int(scores.relevant[:, 0, 0].isfinite().sum())
    return text if known in (0, len(scores)) else f"{text}; {known} with a relevant document rank the heads"


def _in_form(ranking: Sequence[Head], out: Path, form: str, shape: ModelShape, top: int) -> Path:
    """Write the ranking in the form of another program. QRHead uses all heads of its file, so it gets the best."""
    from focuslens.heads import save_ranking

    path = out / {"qrhead": "qrheads.yaml", "duoattention": "duoattention"}[form]
    save_ranking(ranking[:top] if form == "qrhead" else ranking, path, form=form, shape=shape)
    return path


def _ordered(frame: pd.DataFrame, ranking: Sequence[Head]) -> pd.DataFrame:
    """The rows of ranked heads, in the order of the ranking."""
    return frame.set_index(["layer", "head"]).loc[[tuple(head) for head in ranking]].reset_index()


def _head_map(scores: ContextualScores, heads: Sequence[Head], kinds: Sequence[HeadKind]) -> Any:
    from focuslens.viz import head_map

    chance = None if scores.chance is None else scores.mean(by="chance").numpy()
    hatched = [layer for layer, kind in enumerate(kinds) if not kind.sees()]
    return head_map(scores.mean().numpy(), heads=heads, chance=chance, hatched=hatched)


def _kinds(model: Executor) -> tuple[HeadKind, ...]:
    """Kind of the heads of each layer."""
    (kinds,) = model.map(_kinds_of, [()])
    return kinds


def _kinds_of(model: FocusModel) -> tuple[HeadKind, ...]:
    return model.head_kinds


_RANKED_BY = {
    "score": "relevant contextual score",
    "excess": "excess of the relevant contextual score over even attention",
    "document_excess": "excess of the relevant contextual score over an even spread over the documents",
}


def _print(scores: ContextualScores, frame: pd.DataFrame, top: int, by: Measure, kinds: Sequence[HeadKind]) -> None:
    print(f"\nTop {min(top, len(frame))} heads by {_RANKED_BY[by]}")
    if not all(kind.plain for kind in kinds):
        frame = frame.assign(kind=[str(kinds[int(layer)]) for layer in frame["layer"]])
    print_table(frame, most=top)
    print("\nHeads with a relevant contextual score")
    for row in scores.sparsity():
        print(f"  {row}")
    share = scores.even_share()
    if share is None:
        return
    print(
        f"\nChance: even attention would give the relevant document {share['row']:.3f} of a row. The document has "
        f"{share['documents']:.3f} of the documents' tokens."
    )
    print("Heads with an excess over chance")
    for row in scores.sparsity(by="excess"):
        print(f"  {row}")
    print("Heads with a document excess")
    for row in scores.sparsity(by="document_excess"):
        print(f"  {row}")


COMMAND = Command(
    name="heads",
    help="find contextual heads",
    description="Score every head by the response's attention to the relevant document, to irrelevant documents and\n"
    "to the attention sink (equation 1 of arXiv 2503.23306). Rank the heads, and count those above thresholds.\n"
    "Chance is the score of even attention: the share of the tokens that are in the relevant document.\n"
    "A killed run with --out resumes.",
    example="focuslens heads --model meta-llama/Llama-3.2-3B-Instruct --dtype bfloat16 --data nq-open-oracle.jsonl.gz",
    add_options=_add_options,
    run=run,
    resumes="with --out",
)
