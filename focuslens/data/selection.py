"""A choice of samples that can be opened, described as JSON in result files, and opened again from there."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

from focuslens.data.multidoc import MultiDocData, load_multidoc
from focuslens.data.synthetic import load_synthetic, spread_positions
from focuslens.prompts.prompt import MultiDocSample

__all__ = ["SYNTHETIC", "Part", "SampleSelection", "open_selections"]

Part: TypeAlias = Literal["train", "validation", "test", "all"]
"""Part of the data; parts other than ``all`` share no question."""

SYNTHETIC = "synthetic"
"""Name of the embedded model's corpus, in place of a file's."""

_SYNTHETIC_QUESTIONS = 100
_WHOLE: dict[str, Any] = {"part": "all", "questions": None, "every_position": True, "validation": 0}
_CHOICE = tuple(_WHOLE)
_STEPS = {"split": ("fraction", "seed", "side"), "sample": ("n", "seed"), "slice": ("start", "stop", "by")}
"""Fields of each kind of step."""


@dataclass(frozen=True)
class SampleSelection:
    """Samples of one part of a lost-in-the-middle file or of the synthetic corpus.

    Attributes:
        file: ``synthetic``, or the file's name.
        num_documents: Documents of a sample.
        gold_positions: Positions of the gold document, from 0; ``None`` spreads five over the synthetic corpus's
            documents, and leaves the gold document where a placed file has it.
        part: Half of the file, or split of the corpus. ``validation`` is taken out of a file's training half.
        questions: Number of questions, at most; ``None`` takes all of a file's part, and 100 of the corpus.
        every_position: One sample of a question for each gold position, or one sample with the positions in turn.
        validation: Size of ``validation`` in a file: a share of the training half if below 1, else a number of
            questions, at most half of them; 0 leaves the training half whole.
        seed: Of the corpus or of the file's distractors, and of splits and draws.
        limit: First questions of the file to read; ``None`` reads all.
        steps: Slices, splits and samplings that come before, as :attr:`MultiDocData.description` lists them.
        path: Place of the file, if not its name. It is no part of the description.

    Raises:
        ValueError: If the part is unknown.
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
    path: Path | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if self.part not in get_args(Part):
            raise ValueError(f"part is {self.part!r}; it must be one of {', '.join(get_args(Part))}")

    @classmethod
    def reopen(cls, description: Mapping[str, Any], file: Path | None = None) -> SampleSelection:
        """The selection that a result file describes, by :meth:`describe` or by :attr:`MultiDocData.description`.

        Args:
            description: The JSON.
            file: Place of the data file, if not the name in the description.

        Raises:
            ValueError: If the description is of another form.
        """
        try:
            positions = description["gold_positions"]
            return cls(
                file=str(description["file"]),
                num_documents=int(description["num_documents"]),
                gold_positions=None if positions is None else tuple(map(int, positions)),
                seed=int(description["seed"]),
                limit=description["limit"],
                steps=tuple(map(_known_step, description["selection"])),
                path=file,
                # A view of a file has no part: its steps are the whole choice.
                **({name: description[name] for name in _CHOICE} if "part" in description else _WHOLE),
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"their description is not in the form that this version writes ({error!r})") from error

    def describe(self) -> dict[str, Any]:
        """The selection as JSON, from which :meth:`reopen` makes it again."""
        return {
            "file": self.file,
            "num_documents": self.num_documents,
            "gold_positions": None if self.gold_positions is None else list(self.gold_positions),
            **{name: getattr(self, name) for name in _CHOICE},
            "seed": self.seed,
            "limit": self.limit,
            "selection": [dict(step) for step in self.steps],
        }

    def open(self) -> Sequence[MultiDocSample]:
        """The samples.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the data have no such part, or the file cannot be used.
        """
        return open_selections([self])[0]

    def _samples(self, read: Callable[..., MultiDocData]) -> Sequence[MultiDocSample]:
        if self.file == SYNTHETIC:
            return self._of_corpus()
        whole = read(
            self.path or self.file,
            num_documents=self.num_documents,
            gold_positions=self.gold_positions,
            seed=self.seed,
            limit=self.limit,
        )
        return self._drawn(self._part_of(_follow(whole, self.steps)))

    def _of_corpus(self) -> list[MultiDocSample]:
        if self.part == "all":
            raise ValueError("the synthetic corpus has the parts train, validation and test; choose one of them")
        positions = spread_positions(self.num_documents) if self.gold_positions is None else self.gold_positions
        n, each = _SYNTHETIC_QUESTIONS if self.questions is None else self.questions, len(positions)
        samples = load_synthetic(
            n * each, num_documents=self.num_documents, gold_positions=positions, split=self.part, seed=self.seed
        )
        return samples if self.every_position else [samples[i * each + i % each] for i in range(n)]

    def _part_of(self, data: MultiDocData) -> MultiDocData:
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
            raise ValueError("part is 'validation', and validation is 0: give the number of validation questions")
        return train

    def _drawn(self, data: MultiDocData) -> Sequence[MultiDocSample]:
        if self.every_position and self.questions is None:
            return data
        n = data.questions if self.questions is None else min(self.questions, data.questions)
        drawn = data.sample(n, self.seed)
        if not self.every_position:
            return drawn
        questions = {sample.question_id for sample in drawn}
        return [sample for sample in data if sample.question_id in questions]


def open_selections(selections: Iterable[SampleSelection]) -> list[Sequence[MultiDocSample]]:
    """The samples of each selection; a file that several share is scanned once."""
    read = cache(load_multidoc)
    return [selection._samples(read) for selection in selections]  # pyright: ignore[reportPrivateUsage]


def _known_step(step: Any) -> Mapping[str, Any]:
    if not isinstance(step, Mapping):
        raise TypeError(f"a step of the selection is {step!r}, not an object")
    return {"step": step["step"], **{name: step[name] for name in _STEPS[step["step"]]}}


def _follow(data: MultiDocData, steps: Iterable[Mapping[str, Any]]) -> MultiDocData:
    """The view of a file that slices, splits and samplings lead to."""
    for step in steps:
        if step["step"] == "split":
            data = data.split(step["fraction"], step["seed"])[step["side"]]
        elif step["step"] == "sample":
            data = data.sample(step["n"], step["seed"])
        else:
            data = data[step["start"] : step["stop"] : step["by"]]
    return data
