"""``focuslens heads``: contextual scores, the ranking of heads, and how sparse it is."""

from __future__ import annotations

import argparse
from pathlib import Path

from focuslens.commands.common import (
    count_heads,
    open_executor,
    open_samples,
    print_table,
    require_figures,
    run_description,
    score_intervals,
    score_samples,
)
from focuslens.execution import Executor
from focuslens.files import write_json

__all__ = ["run"]


def run(args: argparse.Namespace) -> None:
    """Score, print and, with ``--out``, write ``heads.json`` and ``head_map.png``."""
    require_figures(args)
    with open_executor(args) as model:
        _run(args, model)


def _run(args: argparse.Namespace, model: Executor) -> None:
    top = count_heads("--top", args.top, model.shape.n_layers * model.shape.n_heads)
    data = open_samples(args, model, "train")
    scores = score_samples(args, model, data, args.case)
    frame = scores.to_frame()
    print(f"{model.name}: {len(scores)} {args.case} prompts, {sum(scores.correct)} answered correctly")
    print(f"\nTop {top} heads by relevant contextual score")
    print_table(frame, most=top)
    print("\nHeads with a relevant contextual score")
    for row in scores.sparsity():
        print(f"  {row}")
    if args.out is None:
        return
    out = Path(args.out)
    result = {
        **run_description(args, model, data),
        "case": args.case,
        "samples": list(scores.sample_ids),
        "correct": sum(scores.correct),
        "heads": [list(head) for head in scores.ranking()],
        "intervals": score_intervals(scores, data.samples, scores.ranking(), args.seed),
        "scores": frame.to_dict(orient="records"),
        "sparsity": [{"threshold": s.threshold, "count": s.count, "fraction": s.fraction} for s in scores.sparsity()],
    }
    write_json(out / "heads.json", result)
    from focuslens.viz import head_map, save_figure

    save_figure(head_map(scores.mean().numpy(), heads=scores.top_heads(min(top, 10))), out / "head_map.png")
    print(f"\nwrote {out / 'heads.json'} and {out / 'head_map.png'}")
