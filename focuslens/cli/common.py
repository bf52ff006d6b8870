"""Code shared by commands that run a model on samples: parsed options, model, samples, head ranking and results.

``focuslens --help`` imports this module through the modules of the commands. Slow libraries, such as torch and pandas,
are therefore imported only inside functions.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from focuslens.cli.cluster import open_pool
from focuslens.cli.options import require_positions
from focuslens.cli.own_data import own_form_of, template_of

if TYPE_CHECKING:
    import pandas as pd

    from focuslens.data._views import KnownPart
    from focuslens.data.own_samples import OwnForm
    from focuslens.data.selection import DistractorChoice, Part, SampleSelection
    from focuslens.evaluation import Sweep
    from focuslens.model.execution import Executor
    from focuslens.model.focus_model import FocusModel
    from focuslens.prompts.sample import MultiDocSample
    from focuslens.prompts.template import PromptTemplate

__all__ = [
    "ModelOptions",
    "RunSettings",
    "SampleOptions",
    "Samples",
    "open_executor",
    "open_samples",
    "print_sweep",
    "print_table",
    "run_description",
]

Side: TypeAlias = Literal["train", "test", "all"]

_LOG = logging.getLogger(__name__)

_DOCUMENT_COUNTS = (20, 15, 10, 7, 5, 4, 3, 2, 1)


# Options


@dataclass(frozen=True)
class ModelOptions:
    """Name of a model, and the keyword arguments of ``FocusModel.from_pretrained``."""

    name: str = "demo"
    device: str | None = None
    device_map: str | None = None
    dtype: str = "float32"
    backend: str | None = None
    n_ctx: int | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    chat: bool | None = None
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict[str, Any])
    stop_strings: tuple[str, ...] | None = None
    stop_tokens: tuple[int | str, ...] | None = None
    gguf_file: str | None = None
    original: bool = False
    compile: bool = False

    @classmethod
    def of(cls, args: argparse.Namespace) -> ModelOptions:
        """Model options from parsed arguments. :func:`options.add_model` adds these options to a parser."""
        plain = ("device", "device_map", "dtype", "backend", "n_ctx", "revision", "trust_remote_code", "chat")
        values = {name: getattr(args, name) for name in (*plain, "gguf_file", "original", "compile")}
        values["chat_template_kwargs"] = dict(args.chat_template_arg)
        values["stop_strings"] = None if args.stop is None else tuple(args.stop)
        values["stop_tokens"] = None if args.stop_token is None else tuple(args.stop_token)
        return cls(args.model, **values)

    @property
    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of ``FocusModel.from_pretrained``, without the name."""
        return {entry.name: getattr(self, entry.name) for entry in fields(self) if entry.name != "name"}

    def open(self) -> FocusModel:
        """Open the model in this process."""
        from focuslens.model.focus_model import FocusModel

        return FocusModel.from_pretrained(self.name, **self.arguments)


@dataclass(frozen=True)
class SampleOptions:
    """Options that select samples.

    If ``split`` is ``None``, each step of a command uses the part of the data that suits the step. For example, heads
    are ranked on the training part, and accuracy is measured on the test part.

    In a user's table, every row is a sample. ``all_rows`` takes all of them instead of ``samples``, and ``in_order``
    keeps their order. ``chosen_by`` names the options that leave out rows. ``having`` are parts that the rows must
    have, and ``left_out`` counts the rows without them in the part that :meth:`requiring` has read.
    """

    file: str = "synthetic"
    gold_positions: tuple[int, ...] | None = None
    samples: int = 100
    split: Side | None = None
    documents: int | None = None
    seed: int = 42
    distractors: DistractorChoice = "random"
    template: PromptTemplate | None = None
    own: OwnForm | None = None
    all_rows: bool = False
    in_order: bool = False
    chosen_by: str = "--samples and --split choose"
    having: tuple[KnownPart, ...] = ()
    left_out: int = 0

    @classmethod
    def of(cls, args: argparse.Namespace) -> SampleOptions:
        """Sample options from parsed arguments. :func:`options.add_samples` adds these options to a parser."""
        positions = None if args.gold_positions is None else tuple(args.gold_positions)
        own = own_form_of(args)
        if own is None:
            require_positions(positions, args.documents or _DOCUMENT_COUNTS[0])
            _require_oracle(args.data, args.distractors)
        return cls(
            args.data,
            positions,
            cls.samples if args.samples is None else args.samples,
            args.split,
            args.documents,
            args.seed,
            args.distractors,
            template_of(args),
            own,
            all_rows=own is not None and args.samples is None,
        )

    def requiring(self, part: Part, *having: KnownPart) -> SampleOptions:
        """The options without those rows of a user's table that lack one of the parts, if there are any.

        Commands call this before they open a model. ``part`` is used if ``--split`` is not given.

        Raises:
            ValueError: If no row has all of the parts.
        """
        if self.own is None:
            return self
        every = replace(self, all_rows=True).selection(self.split or part)
        whole, complete = (len(one.open()) for one in (every, replace(every, having=having)))
        return self if whole == complete else replace(self, having=having, left_out=whole - complete)

    def selection(self, part: Part, n: int | None = None) -> SampleSelection:
        """Selection of one sample per question, with the gold positions spread evenly over the questions.

        Args:
            part: Part of the data.
            n: Number of questions; ``None`` for the value of ``samples``. In a user's table, it counts rows.

        Raises:
            ValueError: If the data do not have this part.
        """
        from focuslens.data.passages import PASSAGES
        from focuslens.data.selection import SYNTHETIC, SampleSelection
        from focuslens.data.synthetic import spread_positions

        if self.file == SYNTHETIC and part == "all":
            raise ValueError(
                "--split all is for data files; the synthetic corpus has train, validation and test, which share no "
                "names and values: choose --split train or --split test"
            )
        documents = _DOCUMENT_COUNTS[0] if self.documents is None else self.documents
        require_positions(self.gold_positions, documents)
        name = Path(self.file).name
        if self.own is not None:
            return SampleSelection(
                name,
                part=part,
                questions=n if n is not None else None if self.all_rows else self.samples,
                in_order=self.in_order,
                having=self.having,
                seed=self.seed,
                template=self.template,
                own=self.own,
                path=Path(self.file),
            )
        return SampleSelection(
            self.file if name == SYNTHETIC else name,  # without a folder, the names mean the package's own data
            num_documents=documents,
            gold_positions=self.gold_positions or spread_positions(documents),
            part=part,
            questions=self.samples if n is None else n,
            seed=self.seed,
            distractors=self.distractors,
            template=self.template,
            path=None if self.file == PASSAGES else Path(self.file),
        )


def _require_oracle(file: str, distractors: DistractorChoice) -> None:
    """Raise ``ValueError`` if the data have distractors of their own, and ``--distractors`` asks for others."""
    from focuslens.data.selection import SYNTHETIC, check_first_line

    kind = "" if distractors == "random" else SYNTHETIC if file == SYNTHETIC else check_first_line(file)
    if kind not in ("", "oracle"):
        whose = "the synthetic corpus has" if kind == SYNTHETIC else f"{file} is of the kind {kind!r}, and has"
        raise ValueError(
            f"--distractors {distractors} is for an oracle file, such as nq-open-oracle.jsonl.gz; {whose} distractors "
            "of its own: leave --distractors out, or give --data an oracle file"
        )


@dataclass(frozen=True)
class RunSettings:
    """Parsed options of a command that runs a model on samples."""

    command: str
    model: ModelOptions
    samples: SampleOptions
    seed: int
    out: Path | None
    max_new_tokens: int
    batch_tokens: int

    @classmethod
    def of(cls, args: argparse.Namespace) -> RunSettings:
        """Settings from the parsed options of ``add_model``, ``add_samples`` and ``add_run``."""
        out = None if args.out is None else Path(args.out)
        model, samples = ModelOptions.of(args), SampleOptions.of(args)
        return cls(args.command, model, samples, args.seed, out, args.max_new_tokens, args.batch_tokens)

    def fitted(self, model: FocusModel | Executor, *, n: int = 0, and_train: bool = False) -> RunSettings:
        """Settings with a fixed number of documents per prompt.

        The number is the value of ``--documents``. If ``--documents`` is not given, the number is 20, or fewer if the
        prompts and responses would not fit the model's context. Every part of the data gets the same number. With
        different numbers, heads could be ranked on short prompts, and directions trained or evaluated on long prompts.

        Args:
            model: Model that processes the samples.
            n: Number of questions that the command opens, if larger than the value of ``--samples``.
            and_train: Whether the command can rank heads on the training half. The prompts of this half must then fit,
                even with ``--split all``.

        Raises:
            ValueError: If prompts with one document do not fit the model's context.
        """
        if self.samples.documents is not None or self.samples.own is not None:
            return self
        halves: Sequence[Side] = ("train", "test")
        if self.samples.split == "all":
            halves = ("all", "train") if and_train else ("all",)
        documents = _fitting_documents(self, model, halves, max(n, self.samples.samples))
        return replace(self, samples=replace(self.samples, documents=documents))


def _fitting_documents(settings: RunSettings, model: FocusModel | Executor, halves: Sequence[Side], n: int) -> int:
    from focuslens.util.progress import track

    room = model.shape.n_ctx - settings.max_new_tokens
    longest = 0
    for documents in _DOCUMENT_COUNTS:
        options = replace(settings.samples, documents=documents)
        opened = _open([options.selection(half, n) for half in halves])
        samples = [sample for half in opened for sample in half.samples]
        counted = track(samples, f"counting tokens of {documents} documents")
        longest = max(len(model.encode(sample.prompt("long")).tokens) for sample in counted)
        if longest <= room:
            if documents < _DOCUMENT_COUNTS[0]:
                _LOG.warning(
                    "%d documents per prompt: more do not fit the model's context of %d tokens",
                    documents,
                    model.shape.n_ctx,
                )
            return documents
    raise ValueError(
        f"prompts of one document have up to {longest} tokens, and with {settings.max_new_tokens} response tokens do "
        f"not fit the model's context of {model.shape.n_ctx}; lower --max-new-tokens, or raise --n-ctx"
    )


# Models and samples


@dataclass(frozen=True)
class Samples:
    """Samples, and a description of their origin for result files."""

    samples: Sequence[MultiDocSample]
    description: Mapping[str, Any]

    @property
    def rows(self) -> int:
        """Number of rows of a user's table; 0 for other data."""
        return int(self.description.get("rows", 0))

    def identify(self) -> dict[str, Any]:
        """Description of the samples, with their number and a digest of their prompts."""
        from focuslens.prompts.sample import prompts_digest

        return {**self.description, "samples": len(self.samples), "prompts_sha256": prompts_digest(self.samples)}


@contextmanager
def open_executor(args: argparse.Namespace, options: ModelOptions) -> Generator[Executor]:
    """Context manager for the model's executor: this process or, with ``--ray``, the workers of a cluster."""
    with open_pool(args, options.name, options.arguments) as pool:
        yield options.open() if pool is None else pool


def open_samples(options: SampleOptions, part: Part, n: int | None = None) -> Samples:
    """Load samples from one part of the data: the part that ``--split`` names or, without ``--split``, ``part``.

    Args:
        options: Options that select samples.
        part: Part of the data to use if ``--split`` is not given.
        n: Number of questions; ``None`` for the value of ``--samples``.

    Raises:
        ValueError: If the data do not have this part.
    """
    from focuslens.data._views import listed_parts

    (opened,) = _open([options.selection(options.split or part, n)])
    if n is None and len(opened.samples) < opened.rows:
        counts, n_without = (len(opened.samples), opened.rows), options.left_out
        without = f"; {n_without} without {listed_parts(options.having)} left out" if n_without else ""
        _LOG.info("%d of %d samples of %s; %s them%s", *counts, options.file, options.chosen_by, without)
    return opened


def _open(selections: Sequence[SampleSelection]) -> list[Samples]:
    from focuslens.data.selection import open_selections

    opened = zip(selections, open_selections(selections), strict=True)
    return [Samples(samples, {**selection.describe(), **_facts(samples)}) for selection, samples in opened]


def _facts(samples: Sequence[MultiDocSample]) -> dict[str, Any]:
    """Facts about the data file of the samples; empty for the synthetic corpus."""
    description: Mapping[str, Any] = getattr(samples, "description", {})
    names = ["sha256", "kind", "left_out", "dropped_answers", "rows"]
    if "rows" not in description:  # of a user's table, ``questions`` in the selection is a number of rows
        names.append("questions")
    facts = {name: description[name] for name in names if name in description}
    return {**facts, **(_lacking(samples) if "rows" in description else {})}


def _lacking(samples: Sequence[MultiDocSample]) -> dict[str, int]:
    """Numbers of samples without a known relevant document, and without accepted answers, if there are any."""
    without = {"without_relevant": 0, "without_answers": 0}
    for sample in samples:
        without["without_relevant"] += sample.gold_index is None
        without["without_answers"] += not sample.answers
    return {name: n for name, n in without.items() if n}


# Results


def print_table(frame: pd.DataFrame, *, most: int | None = None) -> None:
    """Print a table with three decimals: the first ``most`` rows, or all rows if ``most`` is ``None``."""
    shown = frame if most is None else frame.head(most)
    print(shown.to_string(index=False, float_format="{:.3f}".format, na_rep="-"))


def print_sweep(sweep: Sweep) -> None:
    """Print the settings of a sweep and the accuracy under each setting."""
    print_table(sweep.to_frame().drop(columns=["case"]))


def run_description(settings: RunSettings, model: FocusModel | Executor, data: Samples | None) -> dict[str, Any]:
    """Description of a run for result files. If the results do not come from samples, ``data`` is ``None``."""
    from focuslens.util.files import versions

    return {
        "command": settings.command,
        "model": model.description,
        "data": None if data is None else data.identify(),
        "seed": settings.seed,
        "max_new_tokens": settings.max_new_tokens,
        "versions": versions(),
    }
