"""``focuslens generate``: one response, with and without an intervention."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from focuslens.commands.common import get_ranking, open_directions, open_model, open_samples
from focuslens.hooks import Intervention
from focuslens.interventions import FocusSteering, SplitSoftmax
from focuslens.metrics import sub_exact_match
from focuslens.model import FocusModel

__all__ = ["run"]


def run(args: argparse.Namespace) -> None:
    """Print the response to a prompt, or to one sample, without and with the intervention that the options name."""
    model = open_model(args)
    sample = None
    if args.prompt is not None:
        prompt = Path(args.prompt[1:]).read_text() if args.prompt.startswith("@") else args.prompt
    else:
        samples = open_samples(args, model, "test", n=max(args.sample, 0) + 1).samples
        if not 0 <= args.sample < len(samples):
            raise ValueError(
                f"there is no sample {args.sample}: samples are counted from 0, here to {len(samples) - 1}"
            )
        sample = samples[args.sample]
        prompt = sample.prompt(args.case)
        print(f"question: {sample.question}\nanswers: {', '.join(sample.answers)}")
    variants: list[tuple[str, Sequence[Intervention]]] = [("baseline", ()), *_interventions(args, model)]
    for name, interventions in variants:
        text = model.generate(prompt, interventions, max_new_tokens=args.max_new_tokens).text
        verdict = "" if sample is None else f" [{'right' if sub_exact_match(text, sample.answers) else 'wrong'}]"
        print(f"{name}{verdict}: {text}")


def _interventions(args: argparse.Namespace, model: FocusModel) -> list[tuple[str, Sequence[Intervention]]]:
    chosen: list[tuple[str, Sequence[Intervention]]] = []
    if args.tau is not None:
        ranking, _ = get_ranking(args, model)
        chosen.append(
            (f"split-softmax tau={args.tau:g} k={args.top_k}", (SplitSoftmax(ranking[: args.top_k], args.tau),))
        )
    if args.directions is not None:
        directions = open_directions(args.directions)
        ranking = [head for head in get_ranking(args, model)[0] if head in set(directions.heads)]
        focus = FocusSteering(directions, args.alpha, ranking[: args.top_k], args.positions)
        chosen.append((f"steering alpha={args.alpha:g} k={args.top_k}", (focus,)))
    return chosen
