"""``focuslens heads``: contextual scores, the ranking of heads, and how sparse it is."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from focuslens.cli.common import (
    count_heads,
    open_executor,
    open_samples,
    print_table,
    require_figures,
    run_description,
    score_intervals,
    score_samples,
)
from focuslens.cli.output import document
from focuslens.model.execution import Executor
from focuslens.util.files import write_json

__all__ = ["run"]


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Score, print and, with ``--out``, write ``heads.json`` and ``head_map.png``."""
    require_figures(args)
    with open_executor(args) as model:
        return _run(args, model)


def _run(args: argparse.Namespace, model: Executor) -> dict[str, Any]:
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
    if args.out is None:
        return document(result)
    out = Path(args.out)
    write_json(out / "heads.json", result)
    from focuslens.viz import head_map, save_figure

    save_figure(head_map(scores.mean().numpy(), heads=scores.top_heads(min(top, 10))), out / "head_map.png")
    print(f"\nwrote {out / 'heads.json'} and {out / 'head_map.png'}")
    return document(result, out / "heads.json", out / "head_map.png")
