"""A lost-in-the-middle file: its validation, and the samples of its lines."""

from __future__ import annotations

import hashlib
import random
from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from focuslens.data._distractors import (
    DistractorChoice,
    Draw,
    Passages,
    Query,
    checked_choice,
    draw_at_random,
    draw_similar,
    text_of,
)
from focuslens.data._jsonl import LineStore
from focuslens.data._records import Kind, Record, detect_kind, parse_object, parse_record
from focuslens.prompts.sample import Document, MultiDocSample
from focuslens.prompts.template import PromptTemplate
from focuslens.util.progress import track

__all__ = ["Layout", "Source"]

_CACHED_RECORDS: Mapping[Kind, int] = {"retrieval": 64, "placed": 64, "oracle": 4096}
"""Number of parsed records to keep. A record with distractors takes up to 100 kB, and one of an oracle file 2 kB."""


@dataclass(frozen=True)
class Layout:
    """Documents of each sample: arguments of ``load_multidoc``.

    Raises:
        ValueError: If a gold position occurs twice, or the choice of distractors is unknown.
    """

    num_documents: int
    gold_positions: tuple[int, ...] | None
    seed: int
    distractors: DistractorChoice = "random"

    def __post_init__(self) -> None:
        checked_choice(self.distractors)
        positions = self.gold_positions or ()
        if len(set(positions)) < len(positions):
            raise ValueError(f"gold_positions {positions} repeats a position; each gives one sample of every question")

    @property
    def slots(self) -> int:
        """Number of samples per question."""
        return 1 if self.gold_positions is None else len(self.gold_positions)


class Source:
    """Validated lost-in-the-middle file, whose lines are converted to samples on access."""

    def __init__(
        self, store: LineStore, layout: Layout, limit: int | None, template: PromptTemplate | None = None
    ) -> None:
        self.store, self.layout, self.limit, self.template = store, layout, limit, template
        self.needed = layout.num_documents - 1
        # For each line, the index of the first line with the same question. Concatenated files can repeat questions.
        self.first_lines = array("Q")
        self.dropped: list[tuple[int, str]] = []
        self._records: OrderedDict[int, Record] = OrderedDict()
        self.kind: Kind = "retrieval"
        self._scan()
        self.questions = len(store) if limit is None else min(limit, len(store))
        self.left_out: Counter[str] = Counter()
        self._draws = list(self._draw())

    def _scan(self) -> None:
        seen: dict[bytes, int] = {}
        for index, line in enumerate(self.store.scan()):
            if index == 0:
                self.kind = self._detect(line)
            record = self._parse(index, line)
            digest = hashlib.sha256(record.question.strip().lower().encode()).digest()[:16]
            self.first_lines.append(seen.setdefault(digest, index))
            if self.limit is None or index < self.limit:
                self.dropped += [(self.store.number(index), answer) for answer in record.dropped]
            # An oracle file is read to its end, because lines after the limit also provide distractors.
            if index + 1 == self.limit and self.kind != "oracle":
                break
        if not len(self.store):
            raise ValueError(f"{self.store.path} is empty; it must hold one JSON object per line")

    def _detect(self, line: bytes) -> Kind:
        try:
            kind = detect_kind(parse_object(line))
        except ValueError as error:
            raise self._refusal(0, error) from error
        if kind != "placed" and self.layout.gold_positions is None:
            raise ValueError(
                f"gold_positions is None, but {self.store.path} is of the kind {kind!r}, which does not place the "
                "gold document; give positions, such as (0, 4, 9, 14, 19)"
            )
        if kind != "oracle" and self.layout.distractors != "random":
            raise ValueError(
                f"distractors is {self.layout.distractors!r}, but {self.store.path} is of the kind {kind!r}, whose "
                "questions have distractors of their own; leave distractors out, name an oracle file, or replace the "
                "distractors with fl.with_distractors"
            )
        return kind

    def _parse(self, index: int, line: bytes) -> Record:
        try:
            record = parse_record(parse_object(line), self.kind)
            if self.kind != "oracle":
                self._check_room(record)
        except ValueError as error:
            raise self._refusal(index, error) from error
        return replace(record, distractors=record.distractors[: self.needed])

    def _check_room(self, record: Record) -> None:
        self._check_distractors(len(record.distractors))
        place, count = record.gold_index, self.layout.num_documents
        if self.layout.gold_positions is None and place >= count:
            raise ValueError(
                f"the gold passage is at {place}, which is not one of num_documents={count}; "
                f"ask for at least {place + 1} documents, or give gold_positions"
            )

    def _check_distractors(self, count: int) -> None:
        if count < self.needed:
            raise ValueError(
                f"there are {count} distractors, but num_documents={self.layout.num_documents} needs {self.needed}; "
                f"ask for at most {count + 1} documents"
            )

    def _draw(self) -> Iterator[array[int]]:
        if self.kind != "oracle":
            return
        for index, draw in enumerate(self._draws_of_file()):
            try:
                self._check_distractors(len(draw.passages))
            except ValueError as error:
                raise self._refusal(index, error) from error
            self.left_out.update(answers=draw.with_answer, near_duplicates=draw.near_duplicates)
            yield draw.passages

    def _draws_of_file(self) -> Iterator[Draw]:
        passages = Passages(lambda index: self.record(index).gold, len(self.store))
        lines = track(range(self.questions), "choosing distractors", unit="question")
        if self.layout.distractors == "random":
            return draw_at_random(passages, (self._query([line]) for line in lines), self.needed, self.layout.seed)
        return draw_similar(passages, map(self._query, self._repeats(lines)), self.needed)

    def _repeats(self, lines: Iterable[int]) -> Iterator[list[int]]:
        """For each line, all lines that ask the same question."""
        asking: dict[int, list[int]] = {}
        for line, first in enumerate(self.first_lines):
            asking.setdefault(first, []).append(line)
        return (asking[self.first_lines[line]] for line in lines)

    def _query(self, lines: Sequence[int]) -> Query:
        """Question of some lines, with all their answers and gold passages."""
        records = [self.record(line) for line in lines]
        answers = tuple(dict.fromkeys(answer for record in records for answer in record.answers))
        gold = tuple(text_of(record.gold) for record in records)
        return Query(records[0].question, answers, gold, frozenset(lines))

    def _refusal(self, index: int, error: ValueError) -> ValueError:
        return ValueError(f"{self.store.path}, line {self.store.number(index)}: {error}")

    def record(self, index: int) -> Record:
        """Return the record on line ``index``, counted from 0. A line is parsed again if its record is not cached."""
        record = self._records.pop(index, None) or self._parse(index, self.store[index])
        self._records[index] = record
        if len(self._records) > _CACHED_RECORDS[self.kind]:
            self._records.popitem(last=False)
        return record

    def sample(self, pick: int) -> MultiDocSample:
        """Return sample number ``pick``. The samples of one question have consecutive numbers."""
        index, slot = divmod(pick, self.layout.slots)
        record = self.record(index)
        positions = self.layout.gold_positions
        place = record.gold_index if positions is None else positions[slot]
        documents = self._distractors(index, record, place)
        documents.insert(place, record.gold)
        first = self.first_lines[index]
        name = "" if first == index else f"{place}/{index}"
        return MultiDocSample(
            record.question, record.answers, tuple(documents), place, str(first), name, template=self.template
        )

    def _distractors(self, index: int, record: Record, place: int) -> list[Document]:
        if self.kind == "placed":
            return list(record.distractors)
        oracle = self.kind == "oracle"
        distractors = [self.record(line).gold for line in self._draws[index]] if oracle else list(record.distractors)
        # ``random.Random`` hashes a string seed with SHA-512. Every machine therefore gives the same orders, and the
        # orders of different lines are unrelated.
        random.Random(f"{self.layout.seed}/{index}/{place}").shuffle(distractors)
        return distractors

    @cached_property
    def sha256(self) -> str:
        """SHA-256 digest of the file as stored on disk, before decompression."""
        digest = hashlib.sha256()
        with self.store.path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        return digest.hexdigest()
