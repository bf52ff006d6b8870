"""Recall sets of any length for any tokenizer, in the format of HELMET's loaders.

The four sets have HELMET's names: ``ruler_niah_mk_2`` (a needle among other needles, with words as keys),
``ruler_niah_mk_3`` (the same with UUIDs), ``ruler_niah_mv`` (several values of one key in a text) and ``json_kv``
(JSON pairs). This module generates the contexts, keys and values. HELMET adds the instructions and questions.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import yaml

from focuslens.data.synthetic_words import FILLER_ENDS, FILLER_STARTS, PLACE_NAMES, VALUES
from focuslens.util.files import versions, without_folders, write_atomically, write_json
from focuslens.util.progress import track

__all__ = ["NEEDLE", "Recall", "Rows", "make_recall", "wording_tokens", "write_sets"]

NEEDLE = "For {key} the special magic {kind} is {value}."
"""Template of a needle's sentence; ``kind`` is ``number`` or ``uuid``."""

_VALUES_A_KEY = 4
_DEPTHS = 6
_DEMOS = 2
_COMMA = ",\n "
_TEMPLATE = 64
"""Number of tokens reserved for a chat template."""

_WORDING = (
    "Whatever a benchmark writes around a context, from the task it sets in front of it to the request behind it, "
    "takes room too, and how many tokens that is differs between tokenizers. This passage is about as long as such "
    "wording, a little longer to be safe, and in ordinary English, so that counting its own tokens says how much room "
    "must be left for that by any context which fills a given length to the end, and still is not cut anywhere."
)

Rows = list[dict[str, Any]]
"""Samples in the format of HELMET's loaders, one JSON object per sample."""


@dataclass(frozen=True)
class Recall:
    """Result of :func:`write_sets`.

    Attributes:
        config: Path of the HELMET configuration that runs the sets. File names in the configuration are relative to the
            output folder.
        files: Number of tokens in the longest context of a file, by file name relative to the output folder.
    """

    config: Path
    files: Mapping[str, int]


def make_recall(
    tokenizer: Any,
    out: str | Path,
    lengths: Sequence[int],
    *,
    samples: int = 100,
    seed: int = 42,
    haystack: str | None = None,
    needle: str = NEEDLE,
    reserve: int | None = None,
) -> Recall:
    """Write the four recall sets at every length, and a configuration that runs them.

    Args:
        tokenizer: The model's tokenizer, with which all lengths are measured.
        out: Folder for ``data/ruler``, ``data/json_kv``, ``configs/recall.yaml`` and ``recall.json``.
        lengths: Maximum lengths of a prompt and its response together, in tokens. HELMET counts lengths in this way.
        samples: Number of samples per set and length.
        seed: Seed of all random choices.
        haystack: Text around the needles of ``ruler_niah_mv``, repeated if it is too short; by default synthetic
            sentences.
        needle: Template of a needle's sentence, with ``{key}``, ``{kind}`` and ``{value}``.
        reserve: Number of tokens reserved for HELMET's wording around a context and for a chat template; by default an
            estimate for the tokenizer.

    Raises:
        ValueError: If a length has no room for a context, two lengths are too close, or an argument is out of range.
    """
    if samples < 1:
        raise ValueError(f"samples is {samples}; it must be at least 1")
    if not lengths or len(set(lengths)) < len(lengths):
        raise ValueError(f"lengths are {list(lengths)}; give at least one, each once")
    lacking = [name for name in ("{key}", "{kind}", "{value}") if name not in needle]
    if lacking:
        raise ValueError(f"the needle {needle!r} has no {lacking[0]}; it must have {{key}}, {{kind}} and {{value}}")
    sentences, wording = None if haystack is None else _sentences(haystack), wording_tokens(tokenizer, reserve)
    maker = _Maker(tokenizer, samples, seed, needle, sentences, wording)
    sets: list[tuple[str, str, int, int, Rows]] = []
    for dataset, folder, new_tokens, make in (
        ("ruler_niah_mk_2", "ruler/niah_multikey_2", 50, partial(maker.needles, "number")),
        ("ruler_niah_mk_3", "ruler/niah_multikey_3", 100, partial(maker.needles, "uuid")),
        ("ruler_niah_mv", "ruler/niah_multivalue", 50, maker.values),
        ("json_kv", "json_kv", 100, maker.pairs),
    ):
        for length in lengths:
            rows = make(length, new_tokens)
            name = f"test_k{rows[0]['num_kvs']}_dep{_DEPTHS}" if dataset == "json_kv" else f"validation_{length}"
            file = f"data/{folder}/{name}.jsonl"
            if file in [other for _, other, *_ in sets]:
                raise ValueError(
                    f"length {length} has room for as many JSON pairs as another length, and HELMET's files are named "
                    "after the number of pairs; give lengths that are further apart"
                )
            sets.append((dataset, file, length, new_tokens, rows))
    origin = {"samples": samples, "seed": seed, "needle": needle, "reserve": maker.wording, "lengths": list(lengths)}
    origin |= {
        "tokenizer": without_folders(str(getattr(tokenizer, "name_or_path", ""))),
        "haystack": _digest(haystack or ""),
    }
    return write_sets(tokenizer, Path(out), "recall", sets, origin, shots=_DEMOS)


def write_sets(
    tokenizer: Any,
    out: Path,
    name: str,
    sets: Sequence[tuple[str, str, int, int, Rows]],
    origin: Mapping[str, Any],
    *,
    shots: int,
) -> Recall:
    """Write samples, a HELMET configuration that runs the samples, and a record of their origin.

    Args:
        tokenizer: Tokenizer with which the contexts were measured.
        out: Folder for all files.
        name: Name of the configuration and of the record, without suffix.
        sets: For each set: HELMET's name for the data set, the file, the length, the maximum length of a response, and
            the samples.
        origin: Arguments that determine the samples, as JSON values.
        shots: Number of examples that HELMET puts in front of a question, if the data set has examples.
    """
    files: dict[str, int] = {}
    digests: dict[str, str] = {}
    for _, file, _, _, rows in track(sets, "writing", unit="file"):
        content = b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)
        write_atomically(out / file, content)
        files[file] = max(_count(tokenizer, row["context"]) for row in rows)
        digests[file] = hashlib.sha256(content).hexdigest()
    config = {
        "input_max_length": ",".join(str(length) for _, _, length, _, _ in sets),
        "datasets": ",".join(dataset for dataset, *_ in sets),
        "generation_max_length": ",".join(str(new_tokens) for _, _, _, new_tokens, _ in sets),
        "test_files": ",".join(file for _, file, _, _, _ in sets),
        "demo_files": "," * (len(sets) - 1),
        "use_chat_template": False,
        "max_test_samples": len(sets[0][4]),
        "shots": shots,
    }
    path = out / "configs" / f"{name}.yaml"
    write_atomically(path, yaml.safe_dump(config, sort_keys=False).encode())
    write_json(out / f"{name}.json", {**origin, "files_sha256": digests, "versions": versions()})
    return Recall(path, files)


def wording_tokens(tokenizer: Any, reserve: int | None = None) -> int:
    """Number of tokens to reserve for HELMET's wording around a context and for a chat template.

    The number is ``reserve`` or, if ``reserve`` is ``None``, an estimate for the tokenizer.

    Raises:
        ValueError: If ``reserve`` is negative.
    """
    if reserve is not None:
        if reserve < 0:
            raise ValueError(f"reserve is {reserve}; it must be 0 or more")
        return reserve
    return _count(tokenizer, _WORDING) + _TEMPLATE


def _count(tokenizer: Any, text: str) -> int:
    return len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16] if text else "made up"


def _sentences(haystack: str) -> list[str]:
    sentences = [sentence for sentence in re.split(r"(?<=[.!?])\s+", haystack.strip()) if sentence]
    if not sentences:
        raise ValueError("the haystack has no sentence; give a text, or leave it out for made-up sentences")
    return sentences


@dataclass(frozen=True, eq=False)
class _Maker:
    """Generator of samples. If ``sentences`` is ``None``, :meth:`values` uses synthetic sentences as its text."""

    tokenizer: Any
    samples: int
    seed: int
    needle: str
    sentences: Sequence[str] | None
    wording: int

    def needles(self, kind: str, length: int, new_tokens: int) -> Rows:
        """Samples with one needle among distractor needles with different keys and values."""
        rng, rows = random.Random(f"{self.seed}/{kind}/{length}"), Rows()
        for index in track(range(self.samples), f"{kind} needles, {length:,} tokens"):
            keys = _uuids(rng) if kind == "uuid" else _words(rng)
            values = _uuids(rng) if kind == "uuid" else _numbers(rng)
            key, value = next(keys), next(values)
            needle = self._needle(key, kind, value)
            room = self._room(length, new_tokens, 2 * _count(self.tokenizer, key))
            distractors = (self._needle(next(keys), kind, next(values)) for _ in cycle("x"))
            others = self._filling(distractors, "\n", room, [needle])
            place = rng.randint(0, len(others))
            rows.append(_needle_row(index, "\n".join([*others[:place], needle, *others[place:]]), key, kind, [value]))
            rows[-1]["depth"] = round(place / max(1, len(others)), 3)
        return rows

    def values(self, length: int, new_tokens: int) -> Rows:
        """Samples with several needles of the same key, at random places in a text."""
        rng, rows = random.Random(f"{self.seed}/values/{length}"), Rows()
        for index in track(range(self.samples), f"values of one key, {length:,} tokens"):
            key, numbers = next(_words(rng)), _numbers(rng)
            values = [next(numbers) for _ in range(_VALUES_A_KEY)]
            needles = [self._needle(key, "number", value) for value in values]
            room = self._room(length, new_tokens, 2 * _count(self.tokenizer, key))
            text = self._filling(self._text(rng), " ", room, needles)
            for needle in needles:
                text.insert(rng.randint(0, len(text)), needle)
            rows.append(_needle_row(index, " ".join(text), key, "numbers", values))
        return rows

    def _text(self, rng: random.Random) -> Iterator[str]:
        """Endless sequence of sentences, from the haystack (in a cycle from a random start) or synthetic."""
        if self.sentences is None:
            while True:
                yield f"{rng.choice(FILLER_STARTS)} {rng.choice(FILLER_ENDS)}."
        start = rng.randrange(len(self.sentences))
        yield from cycle([*self.sentences[start:], *self.sentences[:start]])

    def pairs(self, length: int, new_tokens: int) -> Rows:
        """Samples with a JSON object of UUID pairs. All objects have the same number of pairs.

        The samples cycle through six depths of the pair with the answer.
        """
        rng = random.Random(f"{self.seed}/pairs/{length}")
        ids = _uuids(rng)
        pair_tokens = _count(self.tokenizer, _json([(next(ids), next(ids))]))
        room = self._room(length, new_tokens, (_DEMOS + 1) * pair_tokens)
        drawn = [[(next(ids), next(ids)) for _ in range(2 + room // 20)] for _ in range(self.samples)]
        # Two tokens are reserved for the braces.
        k = min(
            len(self._filling((_json_line(*pair) for pair in pairs), _COMMA, room - 2))
            for pairs in track(drawn, f"JSON pairs, {length:,} tokens")
        )
        if k <= _DEMOS:
            raise ValueError(f"length {length} has room for {k} JSON pairs; it must have room for {_DEMOS + 1}")
        return [self._pair_row(index, pairs[:k], rng) for index, pairs in enumerate(drawn)]

    def _pair_row(self, index: int, pairs: list[tuple[str, str]], rng: random.Random) -> dict[str, Any]:
        depth = index % _DEPTHS / (_DEPTHS - 1)
        place = round(depth * (len(pairs) - 1))
        others = [list(pair) for i, pair in enumerate(pairs) if i != place]
        key, value = pairs[place]
        return {
            "index": index,
            "context": _json(pairs),
            "question": key,
            "answer": value,
            "demos": rng.sample(others, _DEMOS),
            "num_kvs": len(pairs),
            "depth": depth,
        }

    def _needle(self, key: str, kind: str, value: str) -> str:
        return self.needle.format(key=key, kind=kind, value=value)

    def _room(self, length: int, new_tokens: int, question_tokens: int) -> int:
        """Number of tokens for the context: the length minus the response, HELMET's wording and the question."""
        room = length - new_tokens - self.wording - question_tokens
        if room < 1:
            raise ValueError(
                f"length {length} is too short for this tokenizer: {new_tokens} tokens are for the response, "
                f"{self.wording} for HELMET's wording (--reserve) and {question_tokens} for the question"
            )
        return room

    def _filling(self, pieces: Iterator[str], joint: str, room: int, needles: Sequence[str] = ()) -> list[str]:
        """First ``pieces`` that, together with the needles, fit into ``room`` tokens."""
        filling: list[str] = []
        n_tokens = sum(_count(self.tokenizer, joint + needle) for needle in needles)
        if n_tokens > room:
            raise ValueError(
                f"the needles take {n_tokens} tokens of this tokenizer, and the length is too short: that length "
                f"leaves {room} for a context"
            )
        for piece in pieces:
            n_tokens += _count(self.tokenizer, joint + piece)
            if n_tokens > room:
                break
            filling.append(piece)
        # Tokens can change at a joint. The joined text may therefore have more tokens than its pieces have together.
        while filling and _count(self.tokenizer, joint.join([*needles, *filling])) > room:
            filling.pop()
        return filling


def _needle_row(index: int, context: str, key: str, kind: str, values: list[str]) -> dict[str, Any]:
    return {"index": index, "context": context, "query": key, "type_needle_v": kind, "answer": values}


def _json(pairs: Sequence[tuple[str, str]]) -> str:
    return "{" + _COMMA.join(_json_line(*pair) for pair in pairs) + "}"


def _json_line(key: str, value: str) -> str:
    return f"{json.dumps(key)}: {json.dumps(value)}"


def _uuids(rng: random.Random) -> Iterator[str]:
    while True:
        yield str(uuid.UUID(int=rng.getrandbits(128), version=4))


def _numbers(rng: random.Random) -> Iterator[str]:
    """Distinct random numbers of seven digits."""
    return map(str, _distinct(lambda: rng.randint(10**6, 10**7 - 1), 9 * 10**6))


def _words(rng: random.Random) -> Iterator[str]:
    """Distinct random pairs of words."""
    kinds = [kind for kind in VALUES if kind != "year"]
    firsts = sorted(
        {word.lower() for kind in kinds for word in VALUES[kind][0] if word} | set(map(str.lower, PLACE_NAMES))
    )
    seconds = sorted({word.lower() for kind in kinds for word in VALUES[kind][1]})
    n = len(firsts) * len(seconds)
    for number in _distinct(lambda: rng.randrange(n), n):
        first, second = divmod(number, len(seconds))
        yield f"{firsts[first]}-{seconds[second]}"


def _distinct(draw: Callable[[], int], n: int) -> Iterator[int]:
    seen: set[int] = set()
    while len(seen) < n:
        number = draw()
        if number not in seen:
            seen.add(number)
            yield number
    raise ValueError(f"there are no more than {n:,} different keys or values; choose a shorter length")
