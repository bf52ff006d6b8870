"""Sub-span exact match between responses and accepted answers, as defined by the lost-in-the-middle benchmark."""

from __future__ import annotations

import re
import string
from collections.abc import Iterable, Sequence
from pathlib import Path

from focuslens.prompts.sample import MultiDocSample

__all__ = [
    "answered_right",
    "list_samples",
    "normalize_answer",
    "require_answers",
    "require_comparable_answers",
    "require_samples",
    "sub_exact_match",
]

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLE = re.compile(r"\b(?:a|an|the)\b")


def normalize_answer(text: str) -> str:
    """Normalise a text as SQuAD's evaluation script does: lower case, no punctuation, no articles, single spaces.

    The steps have the same order as in the script (Rajpurkar et al., 2016). For example, "U.S. the" first becomes "us
    the", then "us". Typographic quotes and dashes stay, because only the ASCII characters in ``string.punctuation`` are
    removed. The result can be empty: "The" and "!!!" both normalise to the empty string.
    """
    without_articles = _ARTICLE.sub(" ", text.lower().translate(_PUNCTUATION))
    return " ".join(without_articles.split())


def sub_exact_match(prediction: str, answers: Sequence[str]) -> bool:
    """Whether the normalised prediction contains at least one of the normalised accepted answers.

    This is the exact match (EM) of "Focus Directions" (arXiv 2503.23306), originally ``best_subspan_em`` in the code
    of "Lost in the Middle" (Liu et al., 2024). The comparison is by characters, not by words: the prediction "party"
    contains the answer "art".

    Args:
        prediction: The model's response.
        answers: The accepted answers. A prediction is correct if it contains at least one accepted answer.

    Raises:
        TypeError: If ``answers`` is one string instead of a sequence of strings.
        ValueError: If there are no answers, or if an answer normalises to the empty string, which every text contains.
    """
    if isinstance(answers, str):
        raise TypeError(f"answers is the string {answers!r}; it must be a sequence of strings, such as [{answers!r}]")
    if not answers:
        raise ValueError("there are no answers to compare with; give at least one")
    normalised = _normalised(answers)
    response = normalize_answer(prediction)
    return any(answer in response for answer in normalised)


def answered_right(responses: Sequence[str], samples: Sequence[MultiDocSample]) -> tuple[bool, ...]:
    """Whether each response contains an accepted answer of its sample, according to :func:`sub_exact_match`.

    The value is false for a sample without accepted answers.
    """
    pairs = zip(responses, samples, strict=True)
    return tuple(bool(sample.answers) and sub_exact_match(text, sample.answers) for text, sample in pairs)


def list_samples(samples: Iterable[MultiDocSample]) -> list[MultiDocSample]:
    """Convert samples to a list, and check the type of every sample.

    Raises:
        TypeError: If ``samples`` is a single sample, a path, or no iterable, or if an element is not a
            :class:`MultiDocSample`.
    """
    if isinstance(samples, MultiDocSample):
        raise TypeError("samples is one MultiDocSample; give a list of them: [sample]")
    if isinstance(samples, str | Path) or not isinstance(samples, Iterable):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"samples is {samples!r}; it must be a list of MultiDocSample, such as fl.load_multidoc(path)")
    chosen = list(samples)
    other = next((sample for sample in chosen if not isinstance(sample, MultiDocSample)), None)  # pyright: ignore[reportUnnecessaryIsInstance]
    if other is not None:
        raise TypeError(
            f"samples contain a {type(other).__name__}; they must be MultiDocSample(question, answers, documents, "
            "gold_index)"
        )
    return chosen


def require_samples(samples: Iterable[MultiDocSample]) -> list[MultiDocSample]:
    """Convert samples to a list, and check that every sample can be scored.

    Raises:
        TypeError: If ``samples`` is a single sample, or if an element is not a :class:`MultiDocSample`.
        ValueError: If there are no samples, or if an accepted answer normalises to the empty string.
    """
    chosen = list_samples(samples)
    if not chosen:
        raise ValueError("there are no samples to score")
    require_comparable_answers(chosen)
    return chosen


def require_answers(samples: Iterable[MultiDocSample], purpose: str) -> None:
    """Check that every sample has accepted answers, which can be compared with a prediction.

    Args:
        samples: The samples.
        purpose: Result that needs the answers, for the message.

    Raises:
        ValueError: If a sample has no answers, or if an accepted answer normalises to the empty string.
    """
    chosen = list(samples)
    missing = [sample.id for sample in chosen if not sample.answers]
    if missing:
        raise ValueError(
            f"sample {missing[0]!r} has no accepted answers ({len(missing)} of {len(chosen)} samples), and {purpose} "
            "compares responses with them; give answers, or measure attention alone, as fl.document_scores does"
        )
    require_comparable_answers(chosen)


def require_comparable_answers(samples: Iterable[MultiDocSample]) -> None:
    """Check that every accepted answer can be compared with a prediction. Samples may have no answers.

    Run this check before generation, so that an unusable answer is reported before the model runs.

    Raises:
        ValueError: If an accepted answer normalises to the empty string.
    """
    for sample in samples:
        _normalised(sample.answers)


def _normalised(answers: Sequence[str]) -> list[str]:
    normalised = [normalize_answer(answer) for answer in answers]
    if "" in normalised:
        raise ValueError(
            f"the answer {answers[normalised.index('')]!r} is empty after normalisation, so it would match every "
            "prediction; an answer needs at least one character that is not punctuation, an article or a space"
        )
    return normalised
