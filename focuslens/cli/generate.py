"""``focuslens generate``: the response to one prompt, with and without an intervention."""

from __future__ import annotations

import argparse
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from focuslens.cli import options, paths
from focuslens.cli.command import Command
from focuslens.cli.common import RunSettings, Samples, open_samples, run_description
from focuslens.cli.output import document
from focuslens.cli.rankings import count_heads, get_ranking, remove_scores

if TYPE_CHECKING:
    from focuslens.hooks import Intervention
    from focuslens.interventions.directions import FocusDirections
    from focuslens.model.focus_model import FocusModel
    from focuslens.prompts.sample import MultiDocSample

__all__ = ["COMMAND"]

_LOG = logging.getLogger(__name__)

_ALPHA = 0.2


def _add_options(parser: argparse.ArgumentParser) -> None:
    options.add_model(parser)
    options.add_samples(parser)
    options.add_run(parser)
    source = parser.add_mutually_exclusive_group(required=True)
    question = source.add_argument("--prompt", help="the text, or @FILE")
    paths.remember(source, question, paths.prompt)
    source.add_argument("--sample", type=int, help="index of a sample of the data, from 0")
    parser.add_argument("--case", choices=("long", "gold", "negative"), default="long", help="prompt of the sample")
    parser.add_argument("--tau", type=float, help="exponent of split-softmax toward the relevant document")
    options.add_directions(parser)
    parser.add_argument("--alpha", type=float, help="strength of the directions (default 0.2)")
    parser.add_argument(
        "--top-k", type=options.positive, help="number of heads to change; default: 20, or all if there are fewer"
    )
    options.add_positions(parser)
    options.add_ranking(parser)


@dataclass(frozen=True)
class _Variant:
    """One way to generate the response: the interventions, and the source of the ranking of their heads."""

    name: str
    interventions: tuple[Intervention, ...] = ()
    ranking: dict[str, Any] | None = None


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Print the response to a prompt or to one sample, without and with the requested interventions."""
    from focuslens.util.files import write_json

    _check_options(args)
    settings = RunSettings.of(args)
    directions = _open_directions(args)
    model = settings.model.open()
    data, sample = None, None
    if args.prompt is not None:
        prompt = Path(args.prompt[1:]).read_text(encoding="utf-8-sig") if args.prompt.startswith("@") else args.prompt
        asked: dict[str, Any] = {"prompt": prompt}
    else:
        settings = settings.fitted(model, n=args.sample + 1)
        data, sample = _open_sample(settings, args.sample)
        prompt = sample.prompt(args.case)
        asked = {"sample": sample.id, "case": args.case, "question": sample.question, "answers": list(sample.answers)}
        asked["relevant"] = list(sample.gold_indices)
        print(f"question: {sample.question}\nanswers: {', '.join(sample.answers) or '-'}")
    variants = [_Variant("baseline"), *_variants(args, settings, model, directions)]
    responses = [_answer(model, prompt, sample, variant, settings.max_new_tokens) for variant in variants]
    result = {**run_description(settings, model, data), **asked, "responses": responses}
    if settings.out is None:
        return document(result)
    path = settings.out / "generate.json"
    write_json(path, result)
    remove_scores(settings)
    print(f"\nwrote {path}")
    return document(result, path)


def _check_options(args: argparse.Namespace) -> None:
    """Check, before any model or file is opened, that every option can take effect.

    Raises:
        ValueError: If an option cannot take effect, such as ``--alpha`` without ``--directions``.
    """
    if args.alpha is not None and args.directions is None:
        raise ValueError(f"--alpha {args.alpha:g} is the strength of directions; name the directions with --directions")
    if args.top_k is not None and args.tau is None and args.directions is None:
        raise ValueError(
            f"--top-k {args.top_k} chooses heads for an intervention, and no intervention is given; name --tau or "
            "--directions"
        )
    if args.tau is not None and (args.prompt is not None or args.case == "negative"):
        where = "the text of --prompt" if args.prompt is not None else "a prompt of --case negative"
        raise ValueError(
            f"--tau {args.tau:g} turns attention to the relevant document, and {where} has none; give --sample with "
            "--case long or gold, or in Python fl.Prompt(text, spans={'relevant': [(start, end)]})"
        )


def _open_sample(settings: RunSettings, number: int) -> tuple[Samples, MultiDocSample]:
    """Open the data up to the sample with the index ``number``, and return the data and this sample."""
    data = open_samples(settings.samples, "test", max(number, 0) + 1)
    if not 0 <= number < len(data.samples):
        raise ValueError(f"there is no sample {number}: samples are counted from 0, here to {len(data.samples) - 1}")
    return data, data.samples[number]


def _open_directions(args: argparse.Namespace) -> FocusDirections | None:
    if args.directions is None:
        return None
    from focuslens.interventions.directions import open_directions

    return open_directions(args.directions)


def _variants(
    args: argparse.Namespace, settings: RunSettings, model: FocusModel, directions: FocusDirections | None
) -> list[_Variant]:
    if args.tau is None and args.directions is None:
        return []
    from focuslens.interventions import FocusSteering, SplitSoftmax

    if directions is not None:
        directions.require_shape(model.shape)
    count_heads(
        "--top-k", args.top_k, model.shape.n_layers * model.shape.n_heads
    )  # rejects an invalid number before the heads are scored
    ranking, source = get_ranking(args.heads, settings, model)
    variants: list[_Variant] = []
    if args.tau is not None:
        k = count_heads("--top-k", args.top_k, len(ranking))
        split = SplitSoftmax(ranking[:k], args.tau)
        variants.append(_Variant(f"split-softmax tau={args.tau:g} k={k}", (split,), source))
    if directions is not None:
        alpha = _ALPHA if args.alpha is None else args.alpha
        heads = [head for head in ranking if head in set(directions.heads)]
        k = count_heads("--top-k", args.top_k, len(heads))
        focus = FocusSteering(directions, alpha, heads[:k], args.positions)
        variants.append(_Variant(f"steering alpha={alpha:g} k={k}", (focus,), source))
    return variants


def _answer(
    model: FocusModel, prompt: str, sample: MultiDocSample | None, variant: _Variant, max_new_tokens: int
) -> dict[str, Any]:
    """Generate and print the response under one variant, and return the response's entry in the result file."""
    from focuslens.prompts.answers import sub_exact_match

    _LOG.info("answering: %s", variant.name)
    text = model.generate(prompt, variant.interventions, max_new_tokens=max_new_tokens).text
    correct = None if sample is None or not sample.answers else sub_exact_match(text, sample.answers)
    verdict = {None: "", True: " [right]", False: " [wrong]"}[correct]
    print(f"{variant.name}{verdict}: {text}")
    return {
        "name": variant.name,
        "response": text,
        "correct": correct,
        "interventions": [intervention.describe() for intervention in variant.interventions],
        "ranking": variant.ranking,
    }


COMMAND = Command(
    name="generate",
    help="one response, with and without an intervention",
    description="Answer a prompt, or a sample of the data, without and with split-softmax (--tau) or\n"
    "steering (--directions). With --out, generate.json holds the responses and their settings.",
    example="focuslens generate --sample 3 --tau 0.3 --top-k 4",
    add_options=_add_options,
    run=run,
)
