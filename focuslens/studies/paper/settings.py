"""Settings of a reproduction, read from a YAML file and checked before any other file is opened."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, cast, get_args, get_type_hints

import yaml

from focuslens.interventions.directions import Site

__all__ = [
    "AnatomySettings",
    "DirectionSettings",
    "PaperSettings",
    "RetrievalSettings",
    "ScoreSettings",
    "SplitSoftmaxSettings",
    "SteeredScoreSettings",
    "SteeringSettings",
    "find_settings",
    "load_settings",
]


@dataclass(frozen=True)
class DataSettings:
    """Questions of a reproduction.

    Attributes:
        file: ``synthetic``, or the name of a lost-in-the-middle file. The command line can give its path.
        documents: Documents per prompt.
        gold_positions: Positions of the gold document, counted from 1 as in the paper.
        every_position: Whether each question has one sample per gold position (as in the paper) or only one sample.
        train: Number of training questions; ``None`` for all of the training part.
        validation: Number of validation questions, taken from the training half; ``None`` for a fifth of it.
        test: Number of test questions; ``None`` for all.
    """

    file: str = "nq-open-contriever-msmarco-retrieved-documents.jsonl.gz"
    documents: int = 20
    gold_positions: tuple[int, ...] = (1, 5, 10, 15, 20)
    every_position: bool = True
    train: int | None = None
    validation: int | None = None
    test: int | None = None


@dataclass(frozen=True)
class ScoreSettings:
    """Figure 2 and Table 1: ``thresholds`` for the counts of heads, and ``top``, the number of heads in the table."""

    thresholds: tuple[float, ...] = (0.2, 0.1, 0.05)
    top: int = 5


@dataclass(frozen=True)
class SplitSoftmaxSettings:
    """Figure 3: exponents, numbers of heads, and the exponent of random heads.

    The random heads are not among the first ``exclude`` heads of the ranking.
    """

    taus: tuple[float, ...] = (0.1, 0.3, 0.6, 1.5, 1000.0)
    ks: tuple[int, ...] = (1, 5, 10, 20, 30, 50, 100, 150, 200, 300, 400, 500, 600)
    random_tau: float = 0.3
    exclude: int = 20


@dataclass(frozen=True)
class DirectionSettings:
    """Source and training of the focus directions.

    Attributes:
        source: ``train``, or a directory with the authors' files or with files from ``FocusDirections.save``.
        site: Site of trained directions.
        prompts: Training prompts: ``long`` as in the authors' code, ``gold`` as in the paper's text.
        epochs: Passes over the training samples.
        learning_rate: Learning rate of AdamW.
        heads: Number of heads to train, from the top of the ranking; ``None`` for all.
        memory_gb: Gigabytes of activations to store between epochs.
    """

    source: str = "train"
    site: Site = "rotary"
    prompts: Literal["long", "gold"] = "long"
    epochs: int = 10
    learning_rate: float = 1e-3
    heads: int | None = None
    memory_gb: float = 4.0


@dataclass(frozen=True)
class SteeringSettings:
    """Figure 4: strengths, numbers of heads, and the number of contextual heads, beyond which steering should hurt."""

    alphas: tuple[float, ...] = (-0.5, -0.2, -0.1, 0.1, 0.2, 0.3, 0.4, 0.5, 1.0)
    ks: tuple[int, ...] = (1, 5, 10, 20, 30, 50, 100, 150, 200, 300, 400, 500, 600)
    contextual: int = 20


@dataclass(frozen=True)
class SteeredScoreSettings:
    """Table 3: strengths with the top ``few`` heads steered (left) and with the top ``many`` (right)."""

    few: int = 5
    few_alphas: tuple[float, ...] = (-0.2, 0.2, 0.5)
    many: int = 20
    many_alphas: tuple[float, ...] = (0.4, 0.5, 1.0)


@dataclass(frozen=True)
class RetrievalSettings:
    """Figure 9: contextual heads compared with retrieval heads.

    Attributes:
        haystack: ``synthetic``, or a directory of essays with ``needles.jsonl``. The command line can give its path.
        lengths: Lengths of the contexts: in tokens, or in documents if ``haystack`` is ``synthetic``.
        depths: Depths of the needle, from 0 (start of the context) to 1 (end).
        repeats: Number of questions per length and depth, for synthetic needles.
        max_new_tokens: Largest number of tokens of a response.
        top: Number of retrieval heads, compared with the same number of contextual heads.
    """

    haystack: str = "haystack"
    lengths: tuple[int, ...] = (1000, 2000, 3000, 4000, 5000)
    depths: tuple[float, ...] = (0.0, 0.11, 0.22, 0.33, 0.44, 0.56, 0.67, 0.78, 0.89, 1.0)
    repeats: int = 1
    max_new_tokens: int = 50
    top: int = 20


@dataclass(frozen=True)
class AnatomySettings:
    """Anatomy of directions, and attention under steering.

    Attributes:
        heads: Number of decomposed directions, from the top of the ranking.
        samples: Number of prompts for keys and attention.
        alphas: Strengths of the budget and of the comparison of sites and positions.
        k: Number of steered heads in the budget and in the comparison.
        keys: Largest number of keys per head.
        tokens: Number of most favoured tokens in the table, and of most disfavoured tokens, per direction.
    """

    heads: int = 5
    samples: int = 50
    alphas: tuple[float, ...] = (-0.2, 0.2, 0.5, 1.0)
    k: int = 20
    keys: int = 20000
    tokens: int = 15


@dataclass(frozen=True)
class PaperSettings:
    """Settings of one model's reproduction.

    Attributes:
        name: Name of the results' folder.
        model: ``demo``, a hub name, or a directory.
        model_options: Further arguments of :meth:`FocusModel.from_pretrained`.
        data: The questions.
        max_new_tokens: Largest number of tokens of a response.
        batch_tokens: Prompt tokens per batch.
        seed: Seed of all random choices.
        scores: Settings of Figure 2 and Table 1.
        split_softmax: Settings of Figure 3.
        directions: Source and training of the directions.
        steering: Settings of Figure 4.
        steered_scores: Settings of Table 3.
        retrieval: Settings of Figure 9.
        anatomy: Settings of the anatomy of directions.
    """

    name: str
    model: str
    model_options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    data: DataSettings = field(default_factory=DataSettings)
    max_new_tokens: int = 100
    batch_tokens: int = 2**14
    seed: int = 42
    scores: ScoreSettings = field(default_factory=ScoreSettings)
    split_softmax: SplitSoftmaxSettings = field(default_factory=SplitSoftmaxSettings)
    directions: DirectionSettings = field(default_factory=DirectionSettings)
    steering: SteeringSettings = field(default_factory=SteeringSettings)
    steered_scores: SteeredScoreSettings = field(default_factory=SteeredScoreSettings)
    retrieval: RetrievalSettings = field(default_factory=RetrievalSettings)
    anatomy: AnatomySettings = field(default_factory=AnatomySettings)


def find_settings(name: str) -> Path:
    """The YAML file of a model, from a path or from the name of a file in the package.

    Raises:
        FileNotFoundError: If there is no such file.
    """
    if Path(name).suffix in (".yaml", ".yml"):
        if Path(name).is_file():
            return Path(name)
        raise FileNotFoundError(f"there is no file {name}")
    known = {file.stem: file for file in sorted(Path(__file__).parent.glob("*.yaml"))}
    if name not in known:
        raise FileNotFoundError(f"no settings are called {name!r}; there are {', '.join(known)}, or name a YAML file")
    return known[name]


def load_settings(path: str | Path) -> PaperSettings:
    """Settings from a YAML file.

    Raises:
        ValueError: If the file is not a mapping, a setting is unknown or missing, or a value has the wrong type.
    """
    content = yaml.safe_load(Path(path).read_text())
    return cast("PaperSettings", _read(PaperSettings, content, str(path)))


def _read(kind: type[Any], content: Any, where: str) -> Any:
    """Read a dataclass of settings from a mapping."""
    if not isinstance(content, Mapping):
        raise ValueError(f"{where} is {content!r}; it must be a mapping of settings")
    entries = cast("Mapping[str, Any]", content)
    hints, names = get_type_hints(kind), [entry.name for entry in fields(kind)]
    unknown = [name for name in entries if name not in names]
    if unknown:
        raise ValueError(f"{where} has an unknown setting {unknown[0]!r}; there are {', '.join(names)}")
    missing = [
        entry.name
        for entry in fields(kind)
        if entry.default is dataclasses.MISSING
        and entry.default_factory is dataclasses.MISSING
        and entry.name not in entries
    ]
    if missing:
        raise ValueError(f"{where} lacks {missing[0]!r}")
    return kind(**{name: _value(hints[name], value, f"{where}: {name}") for name, value in entries.items()})


def _value(hint: Any, value: Any, where: str) -> Any:
    """One value, converted to the type of its hint."""
    if dataclasses.is_dataclass(hint):
        return _read(cast("type[Any]", hint), value, where)
    origin, inner = getattr(hint, "__origin__", None), get_args(hint)
    if origin is tuple:
        if not isinstance(value, list) or not value:
            raise ValueError(f"{where} is {value!r}; it must be a list with at least one entry")
        return tuple(_value(inner[0], entry, where) for entry in cast("list[Any]", value))
    if origin is Literal:
        if value not in inner:
            raise ValueError(f"{where} is {value!r}; it must be one of {', '.join(map(str, inner))}")
        return value
    if type(None) in inner:
        return None if value is None else _value(inner[0], value, where)
    kind = Mapping if origin is not None else hint
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (hint is int and isinstance(value, bool)):
        raise ValueError(f"{where} is {value!r}; it must have the type {getattr(hint, '__name__', 'mapping')}")
    return value
