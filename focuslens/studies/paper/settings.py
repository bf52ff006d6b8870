"""Settings of a reproduction, read from a YAML file and checked before the model and the data are opened."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, cast, get_args, get_type_hints

import yaml

from focuslens.data.selection import DistractorChoice
from focuslens.interventions.directions import Site
from focuslens.prompts.template import PromptTemplate

__all__ = [
    "AnatomySettings",
    "DataSettings",
    "DirectionSettings",
    "FaithfulnessSettings",
    "FocusSettings",
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

    For the synthetic corpus, ``None`` in ``train``, ``validation`` or ``test`` means 100 questions.

    Attributes:
        file: Name of a lost-in-the-middle file, or ``synthetic`` for the synthetic corpus. The command line can give
            the path of the file.
        documents: Number of documents per prompt.
        gold_positions: Positions of the gold document, counted from 1 as in the paper.
        every_position: Whether each question gives one sample per gold position, as in the paper. Otherwise each
            question gives only one sample.
        train: Number of training questions. For a file, ``None`` means all questions of the training half that are not
            used for validation.
        validation: Number of validation questions, taken from a file's training half. For a file, ``None`` means a
            fifth of the training half.
        test: Number of test questions. For a file, ``None`` means all questions of the test half.
        distractors: Choice of the distractors from an oracle file: ``random``, or ``bm25`` for the passages most
            similar to the question. The paper's file has distractors of its own, for which only ``random`` is possible.
        template: Path of a YAML file with the wording of the prompts (:class:`PromptTemplate`); ``None`` for the
            wording of the paper.
    """

    file: str = "nq-open-contriever-msmarco-retrieved-documents.jsonl.gz"
    documents: int = 20
    gold_positions: tuple[int, ...] = (1, 5, 10, 15, 20)
    every_position: bool = True
    train: int | None = None
    validation: int | None = None
    test: int | None = None
    distractors: DistractorChoice = "random"
    template: str | None = None


@dataclass(frozen=True)
class ScoreSettings:
    """Settings of Figure 2 and Table 1.

    Attributes:
        thresholds: Thresholds of the relevant score. For each threshold, the heads above it are counted.
        top: Number of heads in Table 1.
    """

    thresholds: tuple[float, ...] = (0.2, 0.1, 0.05)
    top: int = 5


@dataclass(frozen=True)
class SplitSoftmaxSettings:
    """Settings of Figure 3.

    Attributes:
        taus: Exponents on contextual heads.
        ks: Numbers of heads.
        random_tau: Exponent on random heads.
        exclude: Number of heads at the top of the ranking that count as contextual heads. These heads (at most half of
            all heads) come last in the random order of heads.
        questions: Number of test questions of the sweep over exponents and heads; ``None`` means all. The prompts with
            all documents, the relevant document alone and no relevant document run on all test questions.
    """

    taus: tuple[float, ...] = (0.1, 0.3, 0.6, 1.5, 1000.0)
    ks: tuple[int, ...] = (1, 5, 10, 20, 30, 50, 100, 150, 200, 300, 400, 500, 600)
    random_tau: float = 0.3
    exclude: int = 20
    questions: int | None = None


@dataclass(frozen=True)
class DirectionSettings:
    """Source and training of the focus directions.

    Attributes:
        source: ``train`` to train directions, or a directory to read directions from. The directory contains either
            the authors' files or files from ``FocusDirections.save``.
        site: Site of the directions. Directions from a directory must have this site.
        prompts: Case of the training prompts: ``long``, as in the authors' code, or ``gold``, as in the paper's text.
        epochs: Number of passes over the training samples.
        learning_rate: Learning rate of AdamW.
        heads: Number of heads to train directions for, from the top of the ranking; ``None`` means all heads.
        memory_gb: Gigabytes of activations to store between epochs. All other activations are recomputed.
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
    """Settings of Figure 4.

    Attributes:
        alphas: Strengths of the directions.
        ks: Numbers of steered heads.
        contextual: Number of contextual heads. According to the paper, steering more heads lowers accuracy.
        questions: Number of test questions; ``None`` means all.
    """

    alphas: tuple[float, ...] = (-0.5, -0.2, -0.1, 0.1, 0.2, 0.3, 0.4, 0.5, 1.0)
    ks: tuple[int, ...] = (1, 5, 10, 20, 30, 50, 100, 150, 200, 300, 400, 500, 600)
    contextual: int = 20
    questions: int | None = None


@dataclass(frozen=True)
class SteeredScoreSettings:
    """Settings of Table 3.

    Attributes:
        few: Number of steered heads in the left half of the table.
        few_alphas: Strengths in the left half.
        many: Number of steered heads in the right half of the table.
        many_alphas: Strengths in the right half.
        questions: Number of test questions; ``None`` means all.
    """

    few: int = 5
    few_alphas: tuple[float, ...] = (-0.2, 0.2, 0.5)
    many: int = 20
    many_alphas: tuple[float, ...] = (0.4, 0.5, 1.0)
    questions: int | None = None


@dataclass(frozen=True)
class RetrievalSettings:
    """Settings of Figure 9, which compares contextual heads with retrieval heads.

    Attributes:
        haystack: Directory of essays with ``needles.jsonl``, or ``synthetic`` for synthetic needles. The command line
            can give the path of the directory.
        lengths: Context lengths in tokens. If ``haystack`` is ``synthetic``, lengths are numbers of documents.
        depths: Depths of the needle, from 0 (start of the context) to 1 (end).
        repeats: Number of synthetic questions per length and depth. Essays do not use this setting.
        max_new_tokens: Maximum length of a response, in tokens.
        top: Number of retrieval heads, and number of contextual heads in the comparison.
    """

    haystack: str = "haystack"
    lengths: tuple[int, ...] = (1000, 2000, 3000, 4000, 5000)
    depths: tuple[float, ...] = (0.0, 0.11, 0.22, 0.33, 0.44, 0.56, 0.67, 0.78, 0.89, 1.0)
    repeats: int = 1
    max_new_tokens: int = 50
    top: int = 20


@dataclass(frozen=True)
class AnatomySettings:
    """Settings of the anatomy of directions, and of attention under steering.

    Attributes:
        heads: Number of heads whose directions are decomposed, from the top of the ranking.
        samples: Number of validation prompts on which keys and attention budgets are measured.
        alphas: Strengths in the attention budget and in the comparison of sites and rows.
        k: Number of steered heads in the attention budget and in the comparison.
        keys: Maximum number of keys per head.
        tokens: Number of favoured tokens per direction in the table; also the number of disfavoured tokens.
    """

    heads: int = 5
    samples: int = 50
    alphas: tuple[float, ...] = (-0.2, 0.2, 0.5, 1.0)
    k: int = 20
    keys: int = 20000
    tokens: int = 15


@dataclass(frozen=True)
class FocusSettings:
    """Settings of the table of focus without a label. All grids are for validation questions, which choose one setting.

    Attributes:
        taus: Exponents of split-softmax.
        ks: Numbers of contextual heads whose attention is changed.
        choosing: Numbers of heads whose attention chooses a document.
        penalties: Penalties of the votes that choose a document.
        margins: Smallest margins of the gate.
        masses: Targets of the mass on the chosen document.
        sink: Targets of the mass on the sink under steering, as fractions of the mean mass without it.
        biases: Biases of attention logits.
        targets: Proportions of SpotLight.
        scales: Factors of PASTA.
        temperatures: Temperatures of position calibration.
        dummy: Text of its dummies; ``None`` for the default of :class:`PositionCalibration`.
        contrasts: Strengths of context-aware decoding.
        kept: Numbers of documents that a filter leaves.
        strengths: Factors of DySCO.
        alphas: Strengths of focus directions.
        steered: Numbers of contextual heads that directions steer.
        ranks: Ranks of directions that depend on the question, each trained by the answers.
        epochs: Number of passes over the training samples for these directions.
        learning_rate: Learning rate of these directions.
        leave_out: Names of methods to leave out.
        train: Number of training questions for heads and votes that choose; ``None`` for those of the ranking.
        validation: Number of validation questions; ``None`` for all.
        questions: Number of test questions; ``None`` for all.
        timed: Number of test samples on which the seconds of each method are measured.
    """

    taus: tuple[float, ...] = (0.1, 0.3)
    ks: tuple[int, ...] = (5, 20)
    choosing: tuple[int, ...] = (4, 8, 16)
    penalties: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3)
    margins: tuple[float, ...] = (0.1, 0.3, 0.5)
    masses: tuple[float, ...] = (0.3, 0.6)
    sink: tuple[float, ...] = (0.5, 0.75)
    biases: tuple[float, ...] = (1.0, 2.0, 4.0)
    targets: tuple[float, ...] = (0.1, 0.3)
    scales: tuple[float, ...] = (0.01, 0.1)
    temperatures: tuple[float, ...] = (5e-5, 5e-4)
    dummy: str | None = None
    contrasts: tuple[float, ...] = (0.5, 1.0)
    kept: tuple[int, ...] = (2, 3, 5)
    strengths: tuple[float, ...] = (2.0,)
    alphas: tuple[float, ...] = (0.25, 0.5, 1.0)
    steered: tuple[int, ...] = (5, 20)
    ranks: tuple[int, ...] = (4,)
    epochs: int = 3
    learning_rate: float = 5e-3
    leave_out: tuple[str, ...] = ()
    train: int | None = None
    validation: int | None = None
    questions: int | None = None
    timed: int = 8


@dataclass(frozen=True)
class FaithfulnessSettings:
    """Settings of the causal check of attribution.

    Attributes:
        questions: Number of test questions whose documents are knocked out one by one; ``None`` for all.
        removal: Number of these questions whose documents are also removed one by one, which takes one run of the
            prompt per document; ``None`` for all.
        k: Number of heads that attribute an answer to a document.
    """

    questions: int | None = 100
    removal: int | None = 20
    k: int = 8


@dataclass(frozen=True)
class PaperSettings:
    """Settings of the reproduction for one model.

    Attributes:
        name: Name of the reproduction, and of its default folder of results.
        model: ``demo`` for the embedded demo model, a name on the Hugging Face Hub, or a directory.
        model_options: Keyword arguments of :meth:`FocusModel.from_pretrained`.
        data: Settings of the questions.
        max_new_tokens: Maximum length of a response, in tokens.
        batch_tokens: Maximum number of prompt tokens per batch; halved when memory runs out.
        seed: Seed of all random choices.
        scores: Settings of Figure 2 and Table 1.
        split_softmax: Settings of Figure 3.
        directions: Source and training of the directions.
        steering: Settings of Figure 4.
        steered_scores: Settings of Table 3.
        retrieval: Settings of Figure 9.
        anatomy: Settings of the anatomy of directions.
        focus: Settings of focus without a label.
        faithfulness: Settings of the causal check of attribution.
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
    focus: FocusSettings = field(default_factory=FocusSettings)
    faithfulness: FaithfulnessSettings = field(default_factory=FaithfulnessSettings)


def find_settings(name: str) -> Path:
    """Path of a model's YAML file. ``name`` is a path, or the name of a YAML file in this package, such as ``demo``.

    Raises:
        FileNotFoundError: If the YAML file does not exist.
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
    """Read settings from a YAML file.

    Raises:
        FileNotFoundError: If the file of a prompt template does not exist.
        ValueError: If the file is not a mapping, a setting is unknown or missing, or a value has the wrong type.
    """
    content = yaml.safe_load(Path(path).read_text())
    settings = cast("PaperSettings", _read(PaperSettings, content, str(path)))
    if settings.data.template is not None:
        PromptTemplate.load(settings.data.template)  # an error now, and not after the model has been opened
    return settings


def _read(kind: type[Any], content: Any, where: str) -> Any:
    """Create a dataclass of settings from a mapping. ``where`` names the mapping in error messages."""
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
    """Convert the value of a setting to the type in its type hint."""
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
