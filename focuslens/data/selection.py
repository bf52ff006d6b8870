"""A selection of samples that can be opened, described in a result file, and opened again from that description."""

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
"""Part of the data. ``train``, ``validation`` and ``test`` have no question in common."""

SYNTHETIC = "synthetic"
"""Name of the embedded model's corpus, used in place of a file's name."""

_SYNTHETIC_QUESTIONS = 100
_WHOLE: dict[str, Any] = {"part": "all", "questions": None, "every_position": True, "validation": 0}
_CHOICE = tuple(_WHOLE)
_STEPS = {"split": ("fraction", "seed", "side"), "sample": ("n", "seed"), "slice": ("start", "stop", "by")}
"""Fields of a step, by the kind of step."""


@dataclass(frozen=True)
class SampleSelection:
    """Samples of one part of a lost-in-the-middle file or of the synthetic corpus.

    Attributes:
        file: Name of the file, or ``synthetic`` for the corpus.
        num_documents: Number of documents per sample.
        gold_positions: Positions of the gold document, from 0. ``None`` means five positions spread over the documents
            of the synthetic corpus, and the file's own position in a placed file.
        part: Part of the file, or split of the corpus. In a file, ``train`` and ``test`` are halves, and ``validation``
            is taken out of the training half.
        questions: Maximum number of questions; ``None`` means all questions of a file's part, or 100 of the corpus.
        every_position: Whether each question gives one sample per gold position. Otherwise each question gives one
            sample, and the gold positions are spread evenly over the questions.
        validation: Size of the part ``validation`` of a file: a share of the training half if below 1, otherwise a
            number of questions, which is limited to half of the training half. 0 leaves the training half whole.
        seed: Seed of the corpus or of the file's distractors, and of splits and draws.
        limit: Number of questions to read, from the start of the file; ``None`` for all.
        steps: Slices, splits and samplings to apply to the file before the part and the questions are chosen, as
            :attr:`MultiDocData.description` lists them.
        path: Path of the file, if it differs from ``file``. The path is not part of the description.

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
        """Rebuild a selection from its description by :meth:`describe` or :attr:`MultiDocData.description`.

        Args:
            description: The description, as JSON values.
            file: Path of the data file, if it differs from the name in the description.

        Raises:
            ValueError: If the description is not in the form that this version writes.
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
                # The description of a file's view has no part, because its steps are the whole selection.
                **({name: description[name] for name in _CHOICE} if "part" in description else _WHOLE),
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"their description is not in the form that this version writes ({error!r})") from error

    def describe(self) -> dict[str, Any]:
        """Description of the selection as JSON values, from which :meth:`reopen` rebuilds the selection."""
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
        """Open the selected samples.

        Raises:
            FileNotFoundError: If the file does not exist.
            ValueError: If the file or corpus does not have the part, or the file cannot be used.
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
    """Open the samples of each selection. A file that several selections have in common is scanned once."""
    read = cache(load_multidoc)
    return [selection._samples(read) for selection in selections]  # pyright: ignore[reportPrivateUsage]


def _known_step(step: Any) -> Mapping[str, Any]:
    if not isinstance(step, Mapping):
        raise TypeError(f"a step of the selection is {step!r}, not an object")
    return {"step": step["step"], **{name: step[name] for name in _STEPS[step["step"]]}}


def _follow(data: MultiDocData, steps: Iterable[Mapping[str, Any]]) -> MultiDocData:
    """Apply slices, splits and samplings to the samples of a file, in order."""
    for step in steps:
        if step["step"] == "split":
            data = data.split(step["fraction"], step["seed"])[step["side"]]
        elif step["step"] == "sample":
            data = data.sample(step["n"], step["seed"])
        else:
            data = data[step["start"] : step["stop"] : step["by"]]
    return data
