"""Synthetic multi-document question answering: the corpus of the embedded demo model.

Every context is a small world of people and places. Each entity has a document with some facts in varied wording and
order, between filler sentences. Three properties give every question competitors that look like its answer. Names
share parts across documents ("Alden Marsh", "Edith Marsh", "Alden Stark"). Most attributes are recorded for several
entities. Documents mention each other's subjects. The response to a question that no document answers is a refusal.

Names, values and wordings are held out for validation and for test by one rule. Each of them is a pair of parts (first
name and surname, "Port" and "Ashby", sentence opening and sentence core). The parts have indices, and the sum of the
two indices modulo 5 determines the pair's split. Every part occurs in the training split, but no held-out pair does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import ceil, sqrt
from random import Random
from typing import Literal, TypeAlias

from focuslens.data.synthetic_tokenizer import build_tokenizer
from focuslens.data.synthetic_words import (
    ATTRIBUTES,
    FILLER_ENDS,
    FILLER_STARTS,
    FIRST_NAMES,
    LEADS,
    MENTIONS,
    PLACE_KINDS,
    PLACE_NAMES,
    PRONOUNS,
    QUESTION_FRAMES,
    SURNAMES,
    TITLES,
    UNKNOWN,
    VALUES,
    Attribute,
)
from focuslens.prompts.prompt import Document, MultiDocSample

__all__ = [
    "CorpusSettings",
    "Split",
    "SyntheticContext",
    "SyntheticQuestion",
    "build_tokenizer",
    "generate_context",
    "load_synthetic",
    "spread_positions",
]

Split: TypeAlias = Literal["train", "validation", "test"]

_MODULUS = 5
_RESIDUES: dict[str, tuple[int, ...]] = {"test": (0,), "validation": (1,), "train": (2, 3, 4)}
_TRIES = 10_000
"""Number of draws after which a kind of value counts as used up. The probability that so many draws miss a given one
of fifty values is 2e-88."""
_STATEMENT = "the {noun} of {s} was {v}"
_PARTS = {"person": (FIRST_NAMES, SURNAMES), "place": (PLACE_NAMES, PLACE_KINDS)}


@dataclass(frozen=True)
class CorpusSettings:
    """Difficulty of a context. The default settings are those of the corpus of :func:`load_synthetic`.

    Args:
        facts: Minimum and maximum number of facts per document.
        fillers: Minimum and maximum number of filler sentences per document.
        lookalikes: Degree to which names share parts. At 0, names share a part only if there are more entities than
            parts (from about 20 documents on). At 1, parts are shared as widely as distinct names allow.
        mentions: Probability that a document mentions the subject of another document.
        plain: Share of facts that have the wording of responses, and share of titles that are only a name. A high share
            suits the first lessons of a curriculum. The plain wording belongs to the train split, so the share must be
            0 for other splits.

    Raises:
        ValueError: If a range is not a minimum and a maximum, or a share or probability is not from 0 to 1.
    """

    facts: tuple[int, int] = (2, 3)
    fillers: tuple[int, int] = (0, 1)
    lookalikes: float = 1.0
    mentions: float = 0.2
    plain: float = 0.0

    def __post_init__(self) -> None:
        for name, least in (("facts", 1), ("fillers", 0)):
            fewest, most = getattr(self, name)
            if not least <= fewest <= most:
                raise ValueError(f"{name} is {(fewest, most)}; it must be a minimum, {least} or more, and a maximum")
        for name in ("lookalikes", "mentions", "plain"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be from 0 to 1")


@dataclass(frozen=True)
class SyntheticQuestion:
    """A question about a context, with the sentence that answers it.

    Args:
        question: The question's text.
        answer: The value that the question asks for; ``"not recorded"`` if no document has this value.
        response: The sentence that a model should generate, with the answer in it.
        gold_index: Index of the document with the answer, or ``None``.
    """

    question: str
    answer: str
    response: str
    gold_index: int | None


@dataclass(frozen=True)
class SyntheticContext:
    """Documents, and all questions about these documents.

    Args:
        documents: The documents, in prompt order.
        answerable: One question for every fact.
        unanswerable: Questions about an entity or an attribute that no document records.
    """

    documents: tuple[Document, ...]
    answerable: tuple[SyntheticQuestion, ...]
    unanswerable: tuple[SyntheticQuestion, ...]


@dataclass(frozen=True)
class _Entity:
    kind: str  # "person" or "place"
    first: int
    second: int

    @property
    def name(self) -> str:
        firsts, seconds = _PARTS[self.kind]
        return f"{firsts[self.first]} {seconds[self.second]}"

    @property
    def short_name(self) -> str:
        return SURNAMES[self.second] if self.kind == "person" else f"the {PLACE_KINDS[self.second].lower()}"

    @property
    def pronoun(self) -> str:
        return PRONOUNS[self.first % 2] if self.kind == "person" else PRONOUNS[2]


@dataclass
class _World:
    """State that the documents of one context share while they are written."""

    rng: Random
    split: Split
    settings: CorpusSettings
    names: set[str] = field(default_factory=set[str])
    values: set[str] = field(default_factory=set[str])

    def pair(self, first_count: int, second_count: int) -> tuple[int, int]:
        """Draw a pair of parts that belongs to the split, and return the indices of the parts."""
        while True:
            first, second = self.rng.randrange(first_count), self.rng.randrange(second_count)
            if (first + second) % _MODULUS in _RESIDUES[self.split]:
                return first, second

    def value(self, kind: str) -> str:
        """Draw a value whose last word is new among values of its kind. For a person, the whole name must be new."""
        firsts, seconds = (FIRST_NAMES, SURNAMES) if kind == "person" else VALUES[kind]
        for _ in range(_TRIES):
            first, second = self.pair(len(firsts), len(seconds))
            joint = "" if kind == "year" else " "
            value = f"{firsts[first]}{joint}{seconds[second]}".strip()
            mark = value if kind == "person" else f"{kind} {seconds[second]}"
            if mark not in self.values and value not in self.names:
                self.values.add(mark)
                return value
        raise ValueError(
            f"the word lists have no further {kind} that differs from those in the context; "
            f"ask for fewer documents or fewer facts than {self.settings.facts} per document"
        )


def generate_context(
    rng: Random, num_documents: int, split: Split = "train", settings: CorpusSettings | None = None
) -> SyntheticContext:
    """One random context of documents and questions.

    Args:
        rng: Source of every random choice.
        num_documents: Number of documents, 1 to 60.
        split: Split that the names, values and wordings belong to.
        settings: Difficulty of the context; ``None`` for the default settings.

    Raises:
        ValueError: If the number of documents is out of range, the split is unknown or has no plain wording, or the
            word lists have too few values for the number of facts.
    """
    if not 1 <= num_documents <= 60:
        raise ValueError(f"num_documents is {num_documents}; the word lists allow 1 to 60")
    if split not in _RESIDUES:
        raise ValueError(f"split is {split!r}; it must be one of {', '.join(_RESIDUES)}")
    settings = settings or CorpusSettings()
    if settings.plain and split != "train":
        raise ValueError(f"plain is {settings.plain}, but the plain wording belongs to the split train, not to {split}")
    world = _World(rng, split, settings)
    present, absent = _entities(world, num_documents)
    world.names.update(entity.name for entity in (*present, *absent))
    documents: list[Document] = []
    answerable: list[SyntheticQuestion] = []
    unanswerable: list[SyntheticQuestion] = []
    for index, entity in enumerate(present):
        facts = _facts(world, entity)
        documents.append(_document(world, entity, facts, present))
        for key, attribute in ATTRIBUTES[entity.kind].items():
            value = facts.get(key)
            question = _question(world, entity, attribute, value, None if value is None else index)
            (unanswerable if value is None else answerable).append(question)
    unanswerable += [
        _question(world, entity, attribute, None, None)
        for entity in absent
        for attribute in ATTRIBUTES[entity.kind].values()
    ]
    return SyntheticContext(tuple(documents), tuple(answerable), tuple(unanswerable))


def load_synthetic(
    num_samples: int = 200,
    *,
    num_documents: int = 20,
    gold_positions: Sequence[int] | None = None,
    split: Split = "test",
    answerable: float = 1.0,
    seed: int = 42,
) -> list[MultiDocSample]:
    """Samples of the synthetic corpus. Equal arguments give equal samples on any machine.

    Each answerable question gives one sample per gold position. These samples have the distractors in the same order
    and share a ``question_id``. An unanswerable question gives a single sample, with ``gold_index`` ``None``.

    Args:
        num_samples: Number of samples. The last question may have fewer positions than the others.
        num_documents: Number of documents per sample.
        gold_positions: Positions of the gold document, from 0. ``None`` gives five positions from first to last (0, 4,
            9, 14 and 19 for 20 documents).
        split: Split of the corpus. Names, values and wordings of ``validation`` and ``test`` occur in no other split.
        answerable: Share of questions that a document answers, 0 to 1.
        seed: Seed of all random choices.

    Raises:
        ValueError: If an argument is out of its range.
    """
    if num_samples < 1:
        raise ValueError(f"num_samples is {num_samples}; it must be at least 1")
    if gold_positions is None:
        gold_positions = spread_positions(num_documents)
    if not gold_positions or not all(0 <= position < num_documents for position in gold_positions):
        raise ValueError(
            f"gold_positions is {tuple(gold_positions)}, but there are {num_documents} documents: "
            f"give at least one position, each from 0 to {num_documents - 1}"
        )
    if not 0.0 <= answerable <= 1.0:
        raise ValueError(f"answerable is {answerable}; it is a share, from 0 to 1")
    rng = Random(f"{split}/{num_documents}/{seed}")
    samples: list[MultiDocSample] = []
    while len(samples) < num_samples:
        context = generate_context(rng, num_documents, split)
        # All three values are always drawn, so that the contexts of a seed do not depend on ``answerable``.
        known, unknown, draw = rng.choice(context.answerable), rng.choice(context.unanswerable), rng.random()
        question_id = f"synthetic-{split}-{num_documents}-{seed}-{draw:.9f}"
        if draw < answerable:
            samples += [_sample(context, known, position, question_id) for position in gold_positions]
        else:
            samples.append(_sample(context, unknown, None, question_id))
    return samples[:num_samples]


def spread_positions(num_documents: int) -> tuple[int, ...]:
    """Five gold positions spread over the documents: 0, 4, 9, 14 and 19 for 20 documents, as in the paper."""
    return tuple(sorted({place * (num_documents - 1) // 4 for place in range(5)}))


def _sample(
    context: SyntheticContext, question: SyntheticQuestion, position: int | None, question_id: str
) -> MultiDocSample:
    documents = list(context.documents)
    if position is not None and question.gold_index is not None:
        documents.insert(position, documents.pop(question.gold_index))
    return MultiDocSample(question.question, (question.answer,), tuple(documents), position, question_id)


def _entities(world: _World, count: int) -> tuple[list[_Entity], list[_Entity]]:
    """Draw entities with a document, in random order, and entities without one. All of them share parts of names."""
    places = round(count * world.rng.uniform(0.2, 0.4))
    present: list[_Entity] = []
    absent: list[_Entity] = []
    for kind, number in (("person", count - places), ("place", places)):
        cells = _grid(world, kind, number + max(1, number // 3)) if number else []
        present += [_Entity(kind, *cell) for cell in cells[:number]]
        absent += [_Entity(kind, *cell) for cell in cells[number:]]
    world.rng.shuffle(present)
    return present, absent


def _grid(world: _World, kind: str, count: int) -> list[tuple[int, int]]:
    """Distinct pairs of name parts.

    ``lookalikes`` determines how many parts the pairs use. Each part occurs about equally often.
    """
    firsts, seconds = _PARTS[kind]
    residue = world.rng.choice(_RESIDUES[world.split])
    first_class = world.rng.randrange(_MODULUS)
    second_class = (residue - first_class) % _MODULUS
    rows = list(range(first_class, len(firsts), _MODULUS))
    columns = list(range(second_class, len(seconds), _MODULUS))
    world.rng.shuffle(rows)
    world.rng.shuffle(columns)
    side = round(count - world.settings.lookalikes * (count - ceil(sqrt(1.3 * count))))
    while side < max(len(rows), len(columns)) and len(rows[:side]) * len(columns[:side]) < count:
        side += 1
    rows, columns = rows[:side], columns[:side]
    # The steps follow shifted diagonals, so a pair comes back only after len(rows) * len(columns) steps.
    steps = ((step % len(rows), step // len(rows)) for step in range(count))
    return [(rows[row], columns[(row + shift) % len(columns)]) for row, shift in steps]


def _facts(world: _World, entity: _Entity) -> dict[str, str]:
    """Values of the entity's facts by attribute, in the order of the document's sentences."""
    attributes = ATTRIBUTES[entity.kind]
    keys = world.rng.sample(list(attributes), min(len(attributes), world.rng.randint(*world.settings.facts)))
    return {key: world.value(attributes[key].value) for key in keys}


def _document(world: _World, entity: _Entity, facts: dict[str, str], present: list[_Entity]) -> Document:
    rng, settings = world.rng, world.settings
    # The plan names the kind of each sentence: the attribute of a fact, a filler, or a mention of another entity. The
    # first sentence is always a fact, with the entity's full name.
    plan: list[str] = list(facts)
    for _ in range(rng.randint(*settings.fillers)):
        plan.insert(rng.randint(1, len(plan)), "filler")
    others = [other for other in present if other.kind == entity.kind and other != entity]
    if others and rng.random() < settings.mentions:
        plan.insert(rng.randint(1, len(plan)), "mention")
    sentences: list[str] = []
    for before, kind in zip(["", *plan], plan, strict=False):
        if kind == "filler":
            sentences.append(f"{rng.choice(FILLER_STARTS)} {rng.choice(FILLER_ENDS)}.")
        elif kind == "mention":
            sentences.append(rng.choice(MENTIONS).format(s=entity.name, o=rng.choice(others).name))
        else:
            sentences.append(_fact(world, entity, ATTRIBUTES[entity.kind][kind], facts[kind], before))
    title = TITLES[0] if rng.random() < settings.plain else rng.choice(TITLES)
    return Document(title.format(s=entity.name), " ".join(sentences))


def _fact(world: _World, entity: _Entity, attribute: Attribute, value: str, before: str) -> str:
    """Sentence that states a fact. ``before`` is the kind of the sentence before it, empty for the first sentence."""
    cores = (_STATEMENT.replace("{noun}", attribute.noun), *attribute.facts)
    subject = entity.name
    if world.rng.random() < world.settings.plain:
        lead, core = LEADS.index(""), 0
    else:
        lead, core = world.pair(len(LEADS), len(cores))
        draw = world.rng.random()
        # After a mention, a short name could mean the other entity. A pronoun must follow a sentence about its entity.
        if before not in ("", "mention") and draw < 0.5:
            pronoun = draw < 0.25 and core != 0 and before != "filler"
            subject = entity.pronoun if pronoun else entity.short_name
    sentence = f"{LEADS[lead]} {cores[core].format(s=subject, v=value)}.".strip()
    return sentence[0].upper() + sentence[1:]


def _question(
    world: _World, entity: _Entity, attribute: Attribute, value: str | None, gold_index: int | None
) -> SyntheticQuestion:
    frame, core = world.pair(len(QUESTION_FRAMES), len(attribute.questions))
    question = QUESTION_FRAMES[frame].format(q=attribute.questions[core].format(s=entity.name))
    answer = UNKNOWN if value is None else value
    response = _STATEMENT.format(noun=attribute.noun, s=entity.name, v=answer)
    return SyntheticQuestion(
        question[0].upper() + question[1:], answer, f"{response[0].upper()}{response[1:]}.", gold_index
    )
