"""Sub-span exact match of responses with accepted answers, as the lost-in-the-middle benchmark defines it."""

from __future__ import annotations

import re
import string
from collections.abc import Iterable, Sequence

from focuslens.prompts.prompt import MultiDocSample

__all__ = [
    "answered_right",
    "list_samples",
    "normalize_answer",
    "require_comparable_answers",
    "require_samples",
    "sub_exact_match",
]

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLE = re.compile(r"\b(?:a|an|the)\b")


def normalize_answer(text: str) -> str:
    """Normalise a text as SQuAD does: lower case, no ASCII punctuation, no articles, single spaces.

    The steps are applied in this order, as in the SQuAD evaluation script (Rajpurkar et al., 2016): "U.S. the" first
    becomes "us the", then "us". Only the characters of ``string.punctuation`` are removed; typographic quotes and
    dashes stay. The result may be empty: "The" and "!!!" normalise to the empty string.
    """
    without_articles = _ARTICLE.sub(" ", text.lower().translate(_PUNCTUATION))
    return " ".join(without_articles.split())


def sub_exact_match(prediction: str, answers: Sequence[str]) -> bool:
    """Whether the normalised prediction contains any of the normalised accepted answers.

    This is the exact match (EM) of "Focus Directions" (arXiv 2503.23306), which takes it from "Lost in the Middle"
    (Liu et al., 2024, ``best_subspan_em``). The comparison is by characters, not by words: "party" contains "art".

    Args:
        prediction: The model's response.
        answers: The accepted answers. A prediction that contains one of them is correct.

    Raises:
        TypeError: If ``answers`` is one string instead of a sequence of strings.
        ValueError: If there are no answers, or an answer normalises to the empty string, which every text contains.
    """
    if isinstance(answers, str):
        raise TypeError(f"answers is the string {answers!r}; it must be a sequence of strings, such as [{answers!r}]")
    if not answers:
        raise ValueError("there are no answers to compare with; give at least one")
    normalised = _normalised(answers)
    response = normalize_answer(prediction)
    return any(answer in response for answer in normalised)


def answered_right(responses: Sequence[str], samples: Sequence[MultiDocSample]) -> tuple[bool, ...]:
    """Whether each response contains an accepted answer of its sample, by :func:`sub_exact_match`."""
    return tuple(sub_exact_match(text, sample.answers) for text, sample in zip(responses, samples, strict=True))


def list_samples(samples: Iterable[MultiDocSample]) -> list[MultiDocSample]:
    """Convert samples to a list, and check the type of every element.

    Raises:
        TypeError: If ``samples`` is a single sample, or an element is not a sample.
    """
    if isinstance(samples, MultiDocSample):
        raise TypeError("samples is one MultiDocSample; give a list of them: [sample]")
    chosen = list(samples)
    other = next((sample for sample in chosen if not isinstance(sample, MultiDocSample)), None)  # pyright: ignore[reportUnnecessaryIsInstance]
    if other is not None:
        raise TypeError(
            f"samples hold a {type(other).__name__}; they must be MultiDocSample(question, answers, documents, "
            "gold_index)"
        )
    return chosen


def require_samples(samples: Iterable[MultiDocSample]) -> list[MultiDocSample]:
    """Convert samples to a list, and check that every sample can be scored.

    Raises:
        TypeError: If ``samples`` is a single sample, or an element is not a sample.
        ValueError: If there are no samples, or an answer normalises to the empty string.
    """
    chosen = list_samples(samples)
    if not chosen:
        raise ValueError("there are no samples to score")
    require_comparable_answers(chosen)
    return chosen


def require_comparable_answers(samples: Iterable[MultiDocSample]) -> None:
    """Check, before any prediction is made, that every answer of every sample can be compared with a prediction.

    Raises:
        ValueError: If an answer normalises to the empty string.
    """
    for sample in samples:
        _normalised(sample.answers)


def _normalised(answers: Sequence[str]) -> list[str]:
    normalised = [normalize_answer(answer) for answer in answers]
    if "" in normalised:
        raise ValueError(
            f"the answer {answers[normalised.index('')]!r} normalises to nothing, so it would match every prediction; "
            "an answer needs at least one character that is not punctuation, an article or a space"
        )
    return normalised
