"""``focuslens generate``: one response, with and without an intervention."""

from __future__ import annotations

import argparse
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from focuslens.cli.common import (
    Samples,
    count_heads,
    get_ranking,
    open_model,
    open_samples,
    run_description,
)
from focuslens.cli.output import document
from focuslens.hooks import Intervention
from focuslens.interventions import FocusSteering, SplitSoftmax
from focuslens.interventions.directions import open_directions
from focuslens.model.focus_model import FocusModel
from focuslens.prompts.answers import sub_exact_match
from focuslens.prompts.prompt import MultiDocSample
from focuslens.util.files import write_json

__all__ = ["run"]

_LOG = logging.getLogger(__name__)

_ALPHA = 0.2


@dataclass(frozen=True)
class _Variant:
    """One way to answer, and the heads' ranking it rests on."""

    name: str
    interventions: tuple[Intervention, ...] = ()
    ranking: dict[str, Any] | None = None


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Print the response to a prompt, or to one sample, without and with the intervention that the options name."""
    _check_options(args)
    model = open_model(args)
    data, sample = None, None
    if args.prompt is not None:
        prompt = Path(args.prompt[1:]).read_text() if args.prompt.startswith("@") else args.prompt
        asked: dict[str, Any] = {"prompt": prompt}
    else:
        data, sample = _open_sample(args, model)
        prompt = sample.prompt(args.case)
        asked = {"sample": sample.id, "case": args.case, "question": sample.question, "answers": list(sample.answers)}
        print(f"question: {sample.question}\nanswers: {', '.join(sample.answers)}")
    variants = [_Variant("baseline"), *_variants(args, model)]
    responses = [_answer(args, model, prompt, sample, variant) for variant in variants]
    result = {**run_description(args, model, data), **asked, "responses": responses}
    if args.out is None:
        return document(result)
    path = Path(args.out) / "generate.json"
    write_json(path, result)
    print(f"\nwrote {path}")
    return document(result, path)


def _check_options(args: argparse.Namespace) -> None:
    """Refuse, before anything is opened, what would be ignored.

    Raises:
        ValueError: If an option has nothing to act on.
    """
    if args.alpha is not None and args.directions is None:
        raise ValueError(f"--alpha {args.alpha:g} is the strength of directions, and there are none; name --directions")
    if args.top_k is not None and args.tau is None and args.directions is None:
        raise ValueError(f"--top-k {args.top_k} chooses heads to change, and nothing does; name --tau or --directions")
    if args.tau is not None and (args.prompt is not None or args.case == "negative"):
        where = "the text of --prompt" if args.prompt is not None else "a prompt of --case negative"
        raise ValueError(
            f"--tau {args.tau:g} turns attention to the relevant document, and {where} has none; give --sample with "
            "--case long or gold, or in Python fl.Prompt(text, spans={'relevant': [(start, end)]})"
        )


def _open_sample(args: argparse.Namespace, model: FocusModel) -> tuple[Samples, MultiDocSample]:
    """The sample that ``--sample`` counts to, and the samples up to it."""
    data = open_samples(args, model, "test", n=max(args.sample, 0) + 1)
    if not 0 <= args.sample < len(data.samples):
        raise ValueError(
            f"there is no sample {args.sample}: samples are counted from 0, here to {len(data.samples) - 1}"
        )
    return data, data.samples[args.sample]


def _variants(args: argparse.Namespace, model: FocusModel) -> list[_Variant]:
    if args.tau is None and args.directions is None:
        return []
    directions = None if args.directions is None else open_directions(args.directions)
    if directions is not None:
        directions.require_shape(model.shape)
    count_heads("--top-k", args.top_k, model.shape.n_layers * model.shape.n_heads)  # before any is scored
    ranking, source = get_ranking(args, model)
    chosen: list[_Variant] = []
    if args.tau is not None:
        k = count_heads("--top-k", args.top_k, len(ranking))
        split = SplitSoftmax(ranking[:k], args.tau)
        chosen.append(_Variant(f"split-softmax tau={args.tau:g} k={k}", (split,), source))
    if directions is not None:
        alpha = _ALPHA if args.alpha is None else args.alpha
        heads = [head for head in ranking if head in set(directions.heads)]
        k = count_heads("--top-k", args.top_k, len(heads))
        focus = FocusSteering(directions, alpha, heads[:k], args.positions)
        chosen.append(_Variant(f"steering alpha={alpha:g} k={k}", (focus,), source))
    return chosen


def _answer(
    args: argparse.Namespace, model: FocusModel, prompt: str, sample: MultiDocSample | None, variant: _Variant
) -> dict[str, Any]:
    """Answer in one way, print the response, and give what the result file says of it."""
    _LOG.info("answering: %s", variant.name)
    text = model.generate(prompt, variant.interventions, max_new_tokens=args.max_new_tokens).text
    correct = None if sample is None else sub_exact_match(text, sample.answers)
    verdict = {None: "", True: " [right]", False: " [wrong]"}[correct]
    print(f"{variant.name}{verdict}: {text}")
    return {
        "name": variant.name,
        "response": text,
        "correct": correct,
        "interventions": [one.describe() for one in variant.interventions],
        "ranking": variant.ranking,
    }
