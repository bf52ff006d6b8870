"""Selections of samples. A selection can be saved as a description in a result file, and rebuilt from it later."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

from focuslens.data._columns import Columns, Names
from focuslens.data._distractors import DistractorChoice, checked_choice
from focuslens.data._forms import checked_form
from focuslens.data._jsonl import LineStore
from focuslens.data._records import Kind, detect_kind, parse_object, parse_record
from focuslens.data._rows import is_table
from focuslens.data._views import KnownPart, SampleViews, checked_parts, counted_parts
from focuslens.data.multidoc import load_multidoc
from focuslens.data.own_samples import OwnForm, open_own
from focuslens.data.passages import PASSAGES, data_path
from focuslens.data.positions import spread_positions
from focuslens.data.synthetic import load_synthetic
from focuslens.prompts.sample import MultiDocSample
from focuslens.prompts.template import PromptTemplate, described_template

__all__ = [
    "SYNTHETIC",
    "DistractorChoice",
    "Part",
    "SampleSelection",
    "check_first_line",
    "open_selections",
    "own_form",
]

Part: TypeAlias = Literal["train", "validation", "test", "all"]
"""Part of the data. ``train``, ``validation`` and ``test`` do not share any questions."""

SYNTHETIC = "synthetic"
"""Name that selects the corpus of the embedded demo model in place of a file."""

_SYNTHETIC_QUESTIONS = 100
_WHOLE: dict[str, Any] = {"part": "all", "questions": None, "every_position": True, "validation": 0}
_CHOICE = tuple(_WHOLE)
_STEPS = {
    "split": ("fraction", "seed", "side"),
    "sample": ("n", "seed"),
    "slice": ("start", "stop", "by"),
    "order": (),
    "having": ("parts",),
}
"""Field names of a selection step, by kind of step. A draw of all samples of its questions has one more."""


@dataclass(frozen=True)
class SampleSelection:
    """Selection of samples from one part of a lost-in-the-middle file, of the synthetic corpus, or of a user's table.

    Attributes:
        file: Name of the file, or ``synthetic`` for the synthetic corpus.
        num_documents: Number of documents per sample.
        gold_positions: Positions of the gold document, counted from 0. For the synthetic corpus, ``None`` means five
            positions from first to last. For a placed file, ``None`` means the position in the file.
        part: Part of the file, or split of the corpus. In a file, ``train`` and ``validation`` together are one half of
            the questions (the training half), ``test`` is the other half, and ``all`` is the whole file.
        questions: Maximum number of questions. For a file, ``None`` means all questions in the part. For the corpus,
            ``None`` means 100 questions.
        every_position: Whether each question gives one sample per gold position. If false, each question gives one
            sample, and the gold positions are balanced over the questions. A user's table has no gold positions to
            choose: every row is a sample, and ``questions`` counts rows.
        validation: Size of the part ``validation`` of a file. A value below 1 is a share of the training half. A value
            of 1 or more is a number of questions, limited to half of the training half. 0 means no validation part.
        seed: Random seed of the corpus or of the file's distractors. It is also the seed of splits and draws.
        limit: Maximum number of questions to read from the start of the file; ``None`` for no limit.
        distractors: Choice of the distractors from an oracle file, as in :func:`load_multidoc`. Other files and the
            synthetic corpus have distractors of their own, and allow only ``random``.
        steps: Slices, splits and draws to apply to the file before the part and the questions are selected, in the
            format of ``selection`` in :attr:`MultiDocData.description`.
        template: Wording of the prompts; ``None`` for that of the benchmark.
        own: Form of a user's table; ``None`` for other data. The numbers and positions of documents, and the choice of
            distractors, have no effect on a table.
        in_order: Whether samples that are drawn from a user's table keep its order.
        having: Parts that the samples of a user's table must have; samples without them are left out of ``part``.
        path: Path to the file; ``None`` if ``file`` is the path. The path is not part of the description.

    Raises:
        ValueError: If ``part``, ``distractors`` or a part of ``having`` is unknown.
    """

    file: str = SYNTHETIC
    num_documents: int = 20
    gold_positions: tuple[int, ...] | None = None
    part: Part = "test"
    questions: int | None = None
    every_position: bool = False
    validation: float = 0
    seed: int = 42
    limit: int | None = None
    steps: tuple[Mapping[str, Any], ...] = ()
    distractors: DistractorChoice = "random"
    template: PromptTemplate | None = None
    own: OwnForm | None = None
    in_order: bool = False
    having: tuple[KnownPart, ...] = ()
    path: Path | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if self.part not in get_args(Part):
            raise ValueError(f"part is {self.part!r}; it must be one of {', '.join(get_args(Part))}")
        checked_choice(self.distractors)
        checked_parts(self.having)

    @classmethod
    def reopen(cls, description: Mapping[str, Any], file: Path | None = None) -> SampleSelection:
        """Rebuild a selection from a description that :meth:`describe` or :attr:`MultiDocData.description` returned.

        Args:
            description: The description, as loaded from JSON.
            file: Path to the data file; ``None`` if the file name in the description is the path.

        Raises:
            ValueError: If the description does not have the format that this version of the package writes.
        """
        # Of a plain list of samples, result files describe no more than its prompts.
        if description.get("in_memory") or ("prompts_sha256" in description and "file" not in description):
            raise ValueError(
                f"the samples were given in Python, as {description.get('file', 'a list')}, and not in a file; write "
                "them to a file, and load that"
            )
        try:
            template = description.get("template")
            return cls(
                file=str(description["file"]),
                seed=int(description["seed"]),
                limit=description["limit"],
                steps=tuple(map(_known_step, description["selection"])),
                template=None if template is None else PromptTemplate.of(template),
                in_order=bool(description.get("in_order", False)),
                having=tuple(description.get("having", ())),
                path=file,
                **_documents_of(description),
                # A description by ``MultiDocData`` has no part, because its steps define the whole selection.
                **({name: description[name] for name in _CHOICE} if "part" in description else _WHOLE),
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"the description is not in the form that this version writes ({error!r})") from error

    def describe(self) -> dict[str, Any]:
        """JSON-serialisable description, from which :meth:`reopen` rebuilds the selection."""
        documents: dict[str, Any] = {
            "num_documents": self.num_documents,
            "gold_positions": None if self.gold_positions is None else list(self.gold_positions),
        }
        return {
            "file": self.file,
            **(documents if self.own is None else self.own.describe()),
            **{name: getattr(self, name) for name in _CHOICE},
            "seed": self.seed,
            "limit": self.limit,
            **({"distractors": self.distractors} if self.own is None else {}),
            **({"in_order": True} if self.in_order else {}),
            **({"having": list(self.having)} if self.having else {}),
            **described_template(self.template),
            "selection": [dict(step) for step in self.steps],
        }

    def open(self) -> Sequence[MultiDocSample]:
        """Load the selected samples.

        Raises:
            FileNotFoundError: If the file does not exist.
            ValueError: If the file or the corpus does not have the part, if no sample has the parts of ``having``, or
                if the file is invalid.
        """
        return open_selections([self])[0]

    def _samples(
        self, read: Callable[..., SampleViews], read_own: Callable[..., SampleViews]
    ) -> Sequence[MultiDocSample]:
        if self.own is not None:
            own = read_own(self.path or Path(self.file), replace(self.own, seed=self.seed), self.template, self.limit)
            return self._drawn(self._complete(self._part_of(_follow(own, self.steps))))
        if self.file == SYNTHETIC:
            samples = self._of_corpus()
            return samples if self.template is None else [sample.with_template(self.template) for sample in samples]
        whole = read(
            self.path or self.file,
            num_documents=self.num_documents,
            gold_positions=self.gold_positions,
            seed=self.seed,
            limit=self.limit,
            distractors=self.distractors,
            template=self.template,
        )
        return self._drawn(self._part_of(_follow(whole, self.steps)))

    def _of_corpus(self) -> list[MultiDocSample]:
        if self.distractors != "random":
            raise ValueError(
                f"distractors is {self.distractors!r}, but the synthetic corpus has distractors of its own; leave "
                "distractors out, or name an oracle file"
            )
        if self.part == "all":
            raise ValueError("the synthetic corpus has the parts train, validation and test; choose one of them")
        positions = spread_positions(self.num_documents) if self.gold_positions is None else self.gold_positions
        n, each = _SYNTHETIC_QUESTIONS if self.questions is None else self.questions, len(positions)
        samples = load_synthetic(
            n * each, num_documents=self.num_documents, gold_positions=positions, split=self.part, seed=self.seed
        )
        return samples if self.every_position else [samples[i * each + i % each] for i in range(n)]

    def _part_of(self, data: SampleViews) -> SampleViews:
        if self.part == "all":
            return data
        train, test = data.split(seed=self.seed)
        if self.part == "test":
            return test
        if self.validation:
            share = self.validation if self.validation < 1 else min(0.5, self.validation / train.questions)
            train, validation = train.split(1 - share, seed=self.seed)
            return train if self.part == "train" else validation
        if self.part == "validation":
            raise ValueError("part is 'validation', but validation is 0; set it to the number of validation questions")
        return train

    def _complete(self, data: SampleViews) -> SampleViews:
        """The samples that have the parts of ``having``."""
        if not self.having:
            return data
        complete = data.having(*self.having)
        if not complete:
            has = counted_parts(data, self.having)
            raise ValueError(
                f"none of the {len(data)} samples in the part {self.part!r} of {self.file} has {has}; measure "
                "attention alone, as focuslens attribute does, or say where they are: in the shell, with --columns"
            )
        return complete

    def _drawn(self, data: SampleViews) -> Sequence[MultiDocSample]:
        if self.every_position and self.questions is None:
            return data
        if self.own is not None:
            n = len(data) if self.questions is None else min(self.questions, len(data))
            rows = data.sample(n, self.seed, per_question=False)
            return rows.in_order() if self.in_order else rows
        n = data.questions if self.questions is None else min(self.questions, data.questions)
        drawn = data.sample(n, self.seed)
        if not self.every_position:
            return drawn
        questions = {sample.question_id for sample in drawn}
        return [sample for sample in data if sample.question_id in questions]


def open_selections(selections: Iterable[SampleSelection]) -> list[Sequence[MultiDocSample]]:
    """Load the samples of each selection.

    A file is scanned only once for all selections that read it with equal settings.
    """
    read, read_own = cache(load_multidoc), _opened_once()
    return [selection._samples(read, read_own) for selection in selections]  # pyright: ignore[reportPrivateUsage]


def _opened_once() -> Callable[..., SampleViews]:
    """Function that opens tables of users, each only once with equal arguments."""
    opened: list[tuple[tuple[Any, ...], SampleViews]] = []

    def read(*arguments: Any) -> SampleViews:
        # Templates are not hashed by all their fields, so that arguments are compared.
        known = next((data for given, data in opened if given == arguments), None)
        if known is None:
            known = open_own(*arguments)
            opened.append((arguments, known))
        return known

    return read


def _documents_of(description: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a selection that describe the documents: of a user's table, or of a lost-in-the-middle file."""
    if "form" in description:
        return {"own": OwnForm.of(description, int(description["seed"]))}
    positions = description["gold_positions"]
    return {
        "num_documents": int(description["num_documents"]),
        "gold_positions": None if positions is None else tuple(map(int, positions)),
        # Descriptions of earlier versions have no such entry: distractors were always drawn at random.
        "distractors": description.get("distractors", "random"),
    }


def _known_step(step: Any) -> Mapping[str, Any]:
    if not isinstance(step, Mapping):
        raise TypeError(f"a step of the selection is {step!r}, not an object")
    if step["step"] == "having":
        checked_parts(step["parts"])
    more = {"per_question": False} if step.get("per_question") is False else {}
    return {"step": step["step"], **{name: step[name] for name in _STEPS[step["step"]]}, **more}


def _follow(data: SampleViews, steps: Iterable[Mapping[str, Any]]) -> SampleViews:
    """Apply the slices, splits and draws of a selection to the samples of a file, in order."""
    for step in steps:
        if step["step"] == "split":
            data = data.split(step["fraction"], step["seed"])[step["side"]]
        elif step["step"] == "sample":
            data = data.sample(step["n"], step["seed"], per_question=step.get("per_question", True))
        elif step["step"] == "order":
            data = data.in_order()
        elif step["step"] == "having":
            data = data.having(*step["parts"])
        else:
            data = data[step["start"] : step["stop"] : step["by"]]
    return data


def own_form(
    path: str | Path,
    columns: Names | None = None,
    form: str | None = None,
    num_documents: int | None = None,
) -> OwnForm | None:
    """Form of a user's table, or ``None`` for the synthetic corpus or a lost-in-the-middle file.

    The first row of the data is checked.

    Args:
        path: Path of the data, or a name of the package's own data.
        columns: Names of columns, by part, of a user's table.
        form: Form of a user's table.
        num_documents: Largest number of documents per sample of a user's table.

    Raises:
        FileNotFoundError: If the file does not exist.
        IsADirectoryError: If ``path`` is a directory.
        ValueError: If the first row is invalid, or columns or a form are named for the package's own data.
    """
    named = columns is not None or form is not None
    if str(path) in (SYNTHETIC, PASSAGES):
        if named:
            raise ValueError(
                f"columns and forms are those of a file of your own, and {str(path)!r} is none; leave them out"
            )
        if str(path) == PASSAGES:
            check_first_line(path)
        return None
    if not named and not is_table(path):
        check_first_line(path)
        return None
    own = OwnForm(checked_form(form), Columns.of(columns), num_documents)
    return open_own(path, own, limit=1).form


def check_first_line(path: str | Path) -> Kind:
    """Check the first line of a lost-in-the-middle file, and return the file's kind.

    :func:`load_multidoc` checks all lines.

    Raises:
        FileNotFoundError: If the file does not exist.
        IsADirectoryError: If ``path`` is a directory.
        ValueError: If the file is empty, or its first line is invalid.
    """
    path = data_path(path)
    store = LineStore(path)
    line = next(iter(store.scan()), None)
    if line is None:
        raise ValueError(f"{path} is empty; it must hold one JSON object per line")
    try:
        fields = parse_object(line)
        kind = detect_kind(fields)
        parse_record(fields, kind)
    except ValueError as error:
        raise ValueError(f"{path}, line {store.number(0)}: {error}") from error
    return kind
