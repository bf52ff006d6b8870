"""What the commands share: opening models, samples and rankings, and showing tables."""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import pandas as pd

from focuslens.data.multidoc import load_multidoc
from focuslens.data.synthetic import Split, load_synthetic, spread_positions
from focuslens.directions import FocusDirections
from focuslens.files import versions
from focuslens.heads import Head, load_ranking
from focuslens.model import FocusModel
from focuslens.prompts import MultiDocSample
from focuslens.scoring import ContextualScores, contextual_scores

if TYPE_CHECKING:
    from focuslens.evaluation import Sweep

__all__ = [
    "Samples",
    "get_ranking",
    "open_directions",
    "open_model",
    "open_samples",
    "print_table",
    "require_figures",
    "run_description",
    "synthetic_samples",
]

Side = Literal["train", "test", "all"]

_DOCUMENT_COUNTS = (20, 15, 10, 7, 5, 4, 3, 2, 1)


@dataclass(frozen=True)
class Samples:
    """Samples, and what result files say of them."""

    samples: Sequence[MultiDocSample]
    description: dict[str, Any]


def require_figures(args: argparse.Namespace) -> None:
    """With ``--out`` figures will be drawn: say now, not after the work, if what draws them is not installed.

    Raises:
        ImportError: If it is not.
    """
    if args.out is not None:
        import focuslens.viz  # noqa: F401  # pyright: ignore[reportUnusedImport]


def open_model(args: argparse.Namespace) -> FocusModel:
    """The model that the options name."""
    settings: dict[str, Any] = {
        "device": args.device,
        "dtype": args.dtype,
        "backend": args.backend,
        "n_ctx": args.n_ctx,
        "revision": args.revision,
        "chat": args.chat,
        "chat_template_kwargs": dict(args.chat_template_arg),
    }
    return FocusModel.demo(**settings) if args.model == "demo" else FocusModel.from_pretrained(args.model, **settings)


def open_samples(args: argparse.Namespace, model: FocusModel, side: Side, n: int | None = None) -> Samples:
    """Samples of different questions from one side of the split that the options name.

    Where the number of documents is left open, it is 20, or as many as the model's context has room for.

    Args:
        args: The options.
        model: The model that will read them.
        side: The half to use where ``--split`` does not say.
        n: Overrides ``--samples``.

    Raises:
        ValueError: If not even one document fits.
    """
    side, n = args.split or side, int(args.samples if n is None else n)
    if args.documents is not None:
        return _samples_of(args, side, n, args.documents)
    room = model.shape.n_ctx - args.max_new_tokens
    longest = 0
    for documents in _DOCUMENT_COUNTS:
        data = _samples_of(args, side, n, documents)
        longest = max(len(model.encode(sample.prompt("long")).tokens) for sample in data.samples)
        if longest <= room:
            if documents < _DOCUMENT_COUNTS[0]:
                print(
                    f"{documents} documents a prompt: more do not fit the model's context of {model.shape.n_ctx} tokens"
                )
            return data
    raise ValueError(
        f"prompts of one document have up to {longest} tokens, and with {args.max_new_tokens} new ones do not fit the "
        f"model's context of {model.shape.n_ctx}; lower --max-new-tokens, or raise --n-ctx"
    )


def _samples_of(args: argparse.Namespace, side: Side, n: int, documents: int) -> Samples:
    if args.data == "synthetic":
        return synthetic_samples(args, "test" if side == "all" else side, n, documents)
    positions = args.gold_positions or spread_positions(documents)
    data = load_multidoc(args.data, num_documents=documents, gold_positions=positions, seed=args.seed)
    if side != "all":
        data = data.split(seed=args.seed)[side == "test"]
    chosen = data.sample(min(n, data.questions), args.seed)
    return Samples(chosen, cast("dict[str, Any]", chosen.description))


def synthetic_samples(args: argparse.Namespace, split: Split, n: int, documents: int = 20) -> Samples:
    """One sample for each of ``n`` questions of the synthetic corpus, the gold positions in turn."""
    positions: Sequence[int] = args.gold_positions or spread_positions(documents)
    many = load_synthetic(
        n * len(positions), num_documents=documents, gold_positions=positions, split=split, seed=args.seed
    )
    samples = [many[i * len(positions) + i % len(positions)] for i in range(n)]
    description = {"file": "synthetic", "split": split, "num_documents": documents, "gold_positions": list(positions)}
    return Samples(samples, {**description, "seed": args.seed})


def score_samples(args: argparse.Namespace, model: FocusModel, data: Samples, case: Any = "long") -> ContextualScores:
    """Contextual scores under the options."""
    return contextual_scores(
        model,
        data.samples,
        case,
        max_new_tokens=args.max_new_tokens,
        batch_tokens=args.batch_tokens,
        progress=True,
    )


def get_ranking(
    args: argparse.Namespace, model: FocusModel, *, evaluated: bool = True
) -> tuple[list[Head], dict[str, Any]]:
    """The ranking in ``--heads FILE``, or one made by scoring training samples; and, for results, where it is from.

    Raises:
        ValueError: If heads would be ranked on samples that are then ``evaluated``.
    """
    if args.heads:
        content = Path(args.heads).read_bytes()
        source = {"file": Path(args.heads).name, "sha256": hashlib.sha256(content).hexdigest()}
        return load_ranking(args.heads), source
    if evaluated and args.split in ("train", "all"):
        raise ValueError(
            f"--split {args.split} evaluates training samples, on which heads would be ranked too; name a ranking made "
            "on other samples with --heads, or leave --split away"
        )
    # Whatever --split says of the samples to evaluate, heads are ranked on the training half.
    train = open_samples(argparse.Namespace(**{**vars(args), "split": None}), model, "train")
    return score_samples(args, model, train).ranking(), {"scored_on": train.description}


def open_directions(source: str) -> FocusDirections:
    """Directions saved by this package or published by the paper's authors, from a directory or the hub."""
    if any(Path(source).glob("head_q_directions_*.pth")):
        return FocusDirections.from_published(source)
    if not Path(source).is_dir() and (source.count("/") != 1 or source.startswith((".", "/", "~"))):
        raise FileNotFoundError(f"there is no directory {source!r}; directions are a directory or USER/NAME on the hub")
    return FocusDirections.load(source)


def print_table(frame: pd.DataFrame, *, most: int | None = None) -> None:
    """Print a table with three decimals."""
    shown = frame if most is None else frame.head(most)
    print(shown.to_string(index=False, float_format="{:.3f}".format, na_rep="-"))


def sweep_table(sweep: Sweep) -> pd.DataFrame:
    """A sweep as a table without the columns that are for machines."""
    return sweep.to_frame().drop(columns=["case"])


def run_description(args: argparse.Namespace, model: FocusModel, data: dict[str, Any]) -> dict[str, Any]:
    """What made a result."""
    return {
        "command": args.command,
        "model": model.description,
        "data": data,
        "seed": args.seed,
        "max_new_tokens": args.max_new_tokens,
        "versions": versions(),
    }
