"""What the commands share: opening models, samples and rankings, and showing tables."""

from __future__ import annotations

import argparse
import hashlib
import logging
import math
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pandas as pd

from focuslens.cli.cluster import open_pool
from focuslens.data.multidoc import MultiDocData
from focuslens.data.selection import SYNTHETIC, Part, SampleSelection, open_selections
from focuslens.data.synthetic import Split, spread_positions
from focuslens.heads import Head, load_ranking
from focuslens.model.execution import Executor
from focuslens.model.focus_model import FocusModel
from focuslens.prompts.prompt import MultiDocSample, prompts_digest
from focuslens.scores.contextual import ContextualScores, contextual_scores
from focuslens.util.files import versions
from focuslens.util.progress import track

if TYPE_CHECKING:
    from focuslens.evaluation import Sweep

__all__ = [
    "Samples",
    "count_heads",
    "get_ranking",
    "open_executor",
    "open_model",
    "open_samples",
    "print_table",
    "require_figures",
    "run_description",
    "samples_of",
    "score_intervals",
    "synthetic_samples",
]

Side = Literal["train", "test", "all"]

_LOG = logging.getLogger(__name__)

_DOCUMENT_COUNTS = (20, 15, 10, 7, 5, 4, 3, 2, 1)


@dataclass(frozen=True)
class Samples:
    """Samples, and what result files say of them."""

    samples: Sequence[MultiDocSample]
    description: dict[str, Any]

    def identify(self) -> dict[str, Any]:
        """The description, with how many samples there are and a digest of their prompts."""
        return {**self.description, "samples": len(self.samples), "prompts_sha256": prompts_digest(self.samples)}


def require_figures(args: argparse.Namespace) -> None:
    """With ``--out`` figures will be drawn: say now, not after the work, if what draws them is not installed.

    Raises:
        ImportError: If it is not.
    """
    if args.out is not None:
        import focuslens.viz  # noqa: F401  # pyright: ignore[reportUnusedImport]


def open_model(args: argparse.Namespace) -> FocusModel:
    """The model that the options name, in this process."""
    return FocusModel.from_pretrained(args.model, **_model_settings(args))


def _model_settings(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "device": args.device,
        "device_map": args.device_map,
        "dtype": args.dtype,
        "backend": args.backend,
        "n_ctx": args.n_ctx,
        "revision": args.revision,
        "chat": args.chat,
        "chat_template_kwargs": dict(args.chat_template_arg),
    }


@contextmanager
def open_executor(args: argparse.Namespace) -> Generator[Executor]:
    """What runs the model that the options name: this process or, with ``--ray``, the workers of a cluster."""
    with open_pool(args, args.model, _model_settings(args)) as pool:
        yield open_model(args) if pool is None else pool


def open_samples(args: argparse.Namespace, model: FocusModel | Executor, side: Side, n: int | None = None) -> Samples:
    """Samples of different questions from one side of the split that the options name.

    Where ``--documents`` is left open it is settled here, for all samples that are opened with these options.

    Args:
        args: The options.
        model: The model that will read them.
        side: The half to use where ``--split`` does not say.
        n: Overrides ``--samples``.

    Raises:
        ValueError: If not even one document fits, or the data have no such side.
    """
    n = int(args.samples if n is None else n)
    if args.documents is None:
        args.documents = _fitting_documents(args, model, max(n, args.samples))
    return samples_of(args, side, n)


def samples_of(args: argparse.Namespace, side: Side, n: int | None = None) -> Samples:
    """Samples of different questions, of as many documents as ``--documents`` says."""
    return _sides_of(args, [args.split or side], int(args.samples if n is None else n), args.documents)[0]


def _fitting_documents(args: argparse.Namespace, model: FocusModel | Executor, n: int) -> int:
    """20, or as many documents as the model's context has room for in every half that the command may read.

    One number for all: heads that are ranked on short prompts are not trained and evaluated on long ones.
    """
    room = model.shape.n_ctx - args.max_new_tokens
    longest = 0
    for documents in _DOCUMENT_COUNTS:
        halves = _sides_of(args, _sides_read(args), n, documents)
        samples = [sample for half in halves for sample in half.samples]
        counted = track(samples, f"counting tokens of {documents} documents")
        longest = max(len(model.encode(sample.prompt("long")).tokens) for sample in counted)
        if longest <= room:
            if documents < _DOCUMENT_COUNTS[0]:
                _LOG.warning(
                    "%d documents a prompt: more do not fit the model's context of %d tokens",
                    documents,
                    model.shape.n_ctx,
                )
            return documents
    raise ValueError(
        f"prompts of one document have up to {longest} tokens, and with {args.max_new_tokens} new ones do not fit the "
        f"model's context of {model.shape.n_ctx}; lower --max-new-tokens, or raise --n-ctx"
    )


def _sides_read(args: argparse.Namespace) -> list[Side]:
    """What a command may read: both halves, or with ``--split all`` everything and what heads are ranked on."""
    if args.split != "all":
        return ["train", "test"]
    return ["all", "train"] if args.command == "train" and not args.heads else ["all"]


def _sides_of(args: argparse.Namespace, sides: Sequence[Side], n: int, documents: int) -> list[Samples]:
    """Samples of each side; a file is read once for all."""
    return _opened([_selection(args, side, n, documents) for side in sides])


def _selection(args: argparse.Namespace, part: Part, n: int, documents: int) -> SampleSelection:
    if args.data == SYNTHETIC and part == "all":
        raise ValueError(
            "--split all is for data files; the synthetic corpus has train, validation and test, which share no "
            "names and values: choose --split train or --split test"
        )
    return SampleSelection(
        Path(args.data).name,
        num_documents=documents,
        gold_positions=tuple(args.gold_positions or spread_positions(documents)),
        part=part,
        questions=n,
        seed=args.seed,
        path=Path(args.data),
    )


def synthetic_samples(args: argparse.Namespace, split: Split, n: int, documents: int = 20) -> Samples:
    """One sample for each of ``n`` questions of the synthetic corpus, the gold positions in turn."""
    return _opened([_selection(args, split, n, documents)])[0]


def _opened(selections: Sequence[SampleSelection]) -> list[Samples]:
    opened = zip(selections, open_selections(selections), strict=True)
    return [Samples(samples, {**selection.describe(), **_facts(samples)}) for selection, samples in opened]


def _facts(samples: Sequence[MultiDocSample]) -> dict[str, Any]:
    """Facts of the file that samples come from."""
    if not isinstance(samples, MultiDocData):
        return {}
    return {name: samples.description[name] for name in ("sha256", "kind", "dropped_answers", "questions")}


def score_samples(
    args: argparse.Namespace, model: FocusModel | Executor, data: Samples, case: Any = "long"
) -> ContextualScores:
    """Contextual scores under the options."""
    return contextual_scores(
        model,
        data.samples,
        case,
        max_new_tokens=args.max_new_tokens,
        batch_tokens=args.batch_tokens,
    )


def score_intervals(
    scores: ContextualScores, samples: Sequence[MultiDocSample], heads: Sequence[Head], seed: int, most: int = 20
) -> dict[str, list[float]]:
    """95 % bootstrap intervals, over questions, of the first heads' relevant score: ``layer/head`` to two ends."""
    from focuslens.evaluation import bootstrap_mean

    questions = {sample.id: sample.question_id for sample in samples}
    intervals: dict[str, list[float]] = {}
    for layer, head in heads[:most]:
        values = scores.relevant[:, layer, head]
        kept = [i for i, value in enumerate(values.tolist()) if not math.isnan(value)]
        groups = [questions[scores.sample_ids[i]] for i in kept]
        found = bootstrap_mean(values[kept].tolist(), groups=groups, seed=seed)
        intervals[f"{layer}/{head}"] = [found.low, found.high]
    return intervals


def get_ranking(
    args: argparse.Namespace, model: FocusModel | Executor, *, evaluated: bool = True
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
    return score_samples(args, model, train).ranking(), {"scored_on": train.identify()}


def count_heads(option: str, given: int | None, n: int, default: int = 20) -> int:
    """How many heads an option asks for, out of ``n``; the default, or all where there are fewer, if it is not given.

    Raises:
        ValueError: If there are not so many, or none is asked for.
    """
    if n < 1:
        raise ValueError("there are no heads to choose from: the ranking is empty, or no head of it has a direction")
    if given is None:
        return min(default, n)
    if not 1 <= given <= n:
        raise ValueError(f"{option} {given}: there are {n} heads to choose from; give a number from 1 to {n}")
    return given


def print_table(frame: pd.DataFrame, *, most: int | None = None) -> None:
    """Print a table with three decimals."""
    shown = frame if most is None else frame.head(most)
    print(shown.to_string(index=False, float_format="{:.3f}".format, na_rep="-"))


def sweep_table(sweep: Sweep) -> pd.DataFrame:
    """A sweep as a table without the columns that are for machines."""
    return sweep.to_frame().drop(columns=["case"])


def run_description(args: argparse.Namespace, model: FocusModel | Executor, data: Samples | None) -> dict[str, Any]:
    """What made a result; ``data`` is ``None`` where it is not of samples."""
    return {
        "command": args.command,
        "model": model.description,
        "data": None if data is None else data.identify(),
        "seed": args.seed,
        "max_new_tokens": args.max_new_tokens,
        "versions": versions(),
    }
