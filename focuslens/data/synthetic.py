"""Synthetic corpus for multi-document question answering, on which the embedded demo model is trained.

Every context describes a small world of people and places. Each document is about one person or place (an entity). The
document states some facts about its entity, in varied wording and order, between filler sentences. Three properties
make wrong answers look plausible. First, names share parts across documents ("Alden Marsh", "Edith Marsh", "Alden
Stark"). Second, most attributes are stated for several entities. Third, some documents mention the entity of another
document. If no document answers a question, the expected response is a refusal.

One rule assigns names, values and wordings to splits. Each name, value or wording is a pair of parts: a first name and
a surname, two words such as "Port" and "Ashby", or the opening and the core of a sentence. The sum of the two parts'
indices modulo 5 determines the split. Every part occurs in the training split. A pair of the validation or test split
does not occur in the training split.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import ceil, sqrt
from random import Random
from typing import Literal, TypeAlias

from focuslens.data.positions import checked_positions, spread_positions
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
from focuslens.prompts.sample import Document, MultiDocSample
from focuslens.util.checks import checked_integer

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
"""Number of failed draws after which the word lists count as exhausted. If one of fifty values is still free, the
probability that this many draws all miss the free value is 2e-88."""
_STATEMENT = "the {noun} of {s} was {v}"
_PARTS = {"person": (FIRST_NAMES, SURNAMES), "place": (PLACE_NAMES, PLACE_KINDS)}


@dataclass(frozen=True)
class CorpusSettings:
    """Settings that determine the difficulty of a context. :func:`load_synthetic` uses the defaults.

    Args:
        facts: Minimum and maximum number of facts per document.
        fillers: Minimum and maximum number of filler sentences per document.
        lookalikes: Degree to which names share parts, from 0 to 1. At 0, names share a part only if there are more
            entities of a kind than parts. This happens from about 10 documents on for places, and from about 25
            documents on for persons. At 1, all names are built from few parts, so that most names share both parts
            with other names.
        mentions: Probability that a document mentions the entity of another document.
        plain: Probability that a fact has the wording of responses, and that a title is reduced to the entity's name.
            A high probability suits the beginning of a training curriculum. The plain wording belongs to the train
            split. For any other split, the probability must therefore be 0.

    Raises:
        ValueError: If a range is not a minimum followed by a maximum, or if a probability or degree is not from 0 to 1.
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
    """A question about a context, with its answer and the expected response.

    Args:
        question: The text of the question.
        answer: The value that the question asks for; ``"not recorded"`` if no document states this value.
        response: The expected response: a sentence that contains the answer.
        gold_index: Index of the document that states the answer; ``None`` if no document states it.
    """

    question: str
    answer: str
    response: str
    gold_index: int | None


@dataclass(frozen=True)
class SyntheticContext:
    """Documents of one context, with answerable and unanswerable questions.

    Args:
        documents: The documents, in prompt order.
        answerable: One question per fact in the documents.
        unanswerable: Questions about entities without a document, and about attributes that a document does not state.
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
    """Shared state of the documents of one context during generation."""

    rng: Random
    split: Split
    settings: CorpusSettings
    names: set[str] = field(default_factory=set[str])
    values: set[str] = field(default_factory=set[str])

    def pair(self, first_count: int, second_count: int) -> tuple[int, int]:
        """Draw a pair of parts that belongs to the split, and return the indices of the two parts."""
        while True:
            first, second = self.rng.randrange(first_count), self.rng.randrange(second_count)
            if (first + second) % _MODULUS in _RESIDUES[self.split]:
                return first, second

    def value(self, kind: str) -> str:
        """Draw a new value of a kind, such as a town or a person.

        The last part of the value is new among the values of its kind. For a person, only the whole name is new.
        """
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
    """Generate one random context of documents and questions.

    Args:
        rng: Random number generator for all choices.
        num_documents: Number of documents, from 1 to 60.
        split: Split that the names, values and wordings belong to.
        settings: Difficulty of the context; ``None`` for the default settings.

    Raises:
        ValueError: If the number of documents is out of range, the split is unknown, ``settings.plain`` is above 0 for
            a split other than train, or the word lists contain too few values for the number of facts.
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
    """Generate samples of the synthetic corpus. Equal arguments give equal samples on any machine.

    Each answerable question gives one sample per gold position. All samples of a question have the same
    ``question_id`` and the same distractors in the same order. Each unanswerable question gives one sample, whose
    ``gold_index`` is ``None``.

    Args:
        num_samples: Number of samples. The last question may have fewer samples than the other questions.
        num_documents: Number of documents per sample.
        gold_positions: Positions of the gold document, counted from 0. ``None`` means five positions from first to
            last (0, 4, 9, 14 and 19 for 20 documents).
        split: Split of the corpus. Each name, value and wording belongs to only one split.
        answerable: Probability that a question is answerable, from 0 to 1.
        seed: Random seed.

    Raises:
        ValueError: If an argument is out of range.
    """
    for name, value in (("num_samples", num_samples), ("num_documents", num_documents)):
        if checked_integer(value, name) < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    positions = spread_positions(num_documents) if gold_positions is None else gold_positions
    positions = checked_positions(positions, num_documents)
    if not 0.0 <= answerable <= 1.0:
        raise ValueError(f"answerable is {answerable}; it is a share, from 0 to 1")
    rng = Random(f"{split}/{num_documents}/{seed}")
    samples: list[MultiDocSample] = []
    while len(samples) < num_samples:
        context = generate_context(rng, num_documents, split)
        # Always draw all three values, so that the contexts of a seed do not depend on ``answerable``.
        known, unknown, draw = rng.choice(context.answerable), rng.choice(context.unanswerable), rng.random()
        question_id = f"synthetic-{split}-{num_documents}-{seed}-{draw:.9f}"
        if draw < answerable:
            samples += [_sample(context, known, position, question_id) for position in positions]
        else:
            samples.append(_sample(context, unknown, None, question_id))
    return samples[:num_samples]


def _sample(
    context: SyntheticContext, question: SyntheticQuestion, position: int | None, question_id: str
) -> MultiDocSample:
    documents = list(context.documents)
    if position is not None and question.gold_index is not None:
        documents.insert(position, documents.pop(question.gold_index))
    return MultiDocSample(question.question, (question.answer,), tuple(documents), position, question_id)


def _entities(world: _World, count: int) -> tuple[list[_Entity], list[_Entity]]:
    """Draw ``count`` entities that get a document, in random order, and further entities that do not get a document.

    Names share parts within each list and between the two lists.
    """
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
    """Draw ``count`` distinct pairs of name parts, and return the indices of the parts.

    The setting ``lookalikes`` determines how many different parts are used. All parts that are used occur about equally
    often.
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
    # The steps follow shifted diagonals of the grid. No pair repeats within len(rows) * len(columns) steps.
    steps = ((step % len(rows), step // len(rows)) for step in range(count))
    return [(rows[row], columns[(row + shift) % len(columns)]) for row, shift in steps]


def _facts(world: _World, entity: _Entity) -> dict[str, str]:
    """Draw facts about an entity: the value of each attribute, in the order in which the document states the facts."""
    attributes = ATTRIBUTES[entity.kind]
    keys = world.rng.sample(list(attributes), min(len(attributes), world.rng.randint(*world.settings.facts)))
    return {key: world.value(attributes[key].value) for key in keys}


def _document(world: _World, entity: _Entity, facts: dict[str, str], present: list[_Entity]) -> Document:
    rng, settings = world.rng, world.settings
    # The plan contains the kind of each sentence: the attribute of a fact, "filler", or "mention" (of another entity).
    # The first sentence is always a fact, so that the document begins by introducing the entity by its full name.
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
    """Sentence that states a fact. ``before`` is the kind of the previous sentence, or empty for the first sentence."""
    cores = (_STATEMENT.replace("{noun}", attribute.noun), *attribute.facts)
    subject = entity.name
    if world.rng.random() < world.settings.plain:
        lead, core = LEADS.index(""), 0
    else:
        lead, core = world.pair(len(LEADS), len(cores))
        draw = world.rng.random()
        # After a mention, a short name could refer to the mentioned entity. A pronoun must follow a fact about its
        # own entity. In core 0, a pronoun is ungrammatical ("the birthplace of she").
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
