"""Faithfulness of attribution: effects of the documents that responses are attributed to, beside other effects."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import nan
from typing import TYPE_CHECKING

from jaxtyping import Float
from torch import Tensor

from focuslens.util.frames import rows_frame
from focuslens.util.statistics import Interval, bootstrap_mean, rank_correlation, sign_flip_exact

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Faithfulness", "compare_effects"]


@dataclass(frozen=True)
class Faithfulness:
    """Effects of the documents that a ranking attributes responses to, beside the effects of all other documents.

    The attributed document is the document with the highest score. Of equal scores, the first counts. Means have 95 %
    bootstrap intervals over questions.

    Attributes:
        sample_ids: ``MultiDocSample.id`` of each compared sample.
        attributed: Index of the attributed document per compared sample.
        attributed_effect: Mean effect of the attributed document.
        other_effect: Mean effect of the other documents of the same sample.
        difference: Mean over samples of the difference of these two.
        larger: Probability that the attributed document has a larger effect than a random other document of the sample.
            Equal effects count half.
        largest: Share of samples in which the attributed document has the largest effect. Ties do not count.
        p_value: Two-sided p-value of an exact test of ``larger`` against 1/2. The test flips signs per question. The
            value of a question is its number of other documents with a smaller effect than the attributed document,
            minus its number of those with a larger effect.
        correlation: Mean of Spearman's rank correlation between scores and effects, per sample. Samples in which all
            scores or all effects are equal are left out; ``None`` if no sample is left.
    """

    sample_ids: tuple[str, ...]
    attributed: tuple[int, ...]
    attributed_effect: Interval
    other_effect: Interval
    difference: Interval
    larger: Interval
    largest: Interval
    p_value: float
    correlation: Interval | None

    def __len__(self) -> int:
        return len(self.attributed)

    def to_frame(self) -> pd.DataFrame:
        """Data frame with one row per measure: its mean, and the ends of its interval. The p-value has no interval."""
        names = ("attributed_effect", "other_effect", "difference", "larger", "largest", "correlation")
        units = ("nats", "nats", "nats", "probability", "share of samples", "rank correlation")
        known = [(name, unit, getattr(self, name)) for name, unit in zip(names, units, strict=True)]
        rows = [
            {"measure": name, "unit": unit, "mean": one.mean, "low": one.low, "high": one.high}
            for name, unit, one in known
            if one is not None
        ]
        rows.append({"measure": "p_value", "unit": "probability", "mean": self.p_value, "low": nan, "high": nan})
        return rows_frame(rows, dict.fromkeys(("mean", "low", "high"), "see the column unit"))

    def __str__(self) -> str:
        return (
            f"{len(self)} samples: effect {self.attributed_effect} of the attributed document, {self.other_effect} of "
            f"the others, difference {self.difference}, p = {self.p_value:.3g}"
        )


@dataclass(frozen=True)
class _Comparison:
    """Comparison of the attributed document with the other documents of one sample."""

    sample_id: str
    question: str
    attributed: int
    effect: float
    others: float
    n_smaller: int
    n_larger: int
    n_others: int
    correlation: float

    @property
    def larger(self) -> float:
        """Share of other documents with a smaller effect. Equal effects count half."""
        return (1 + (self.n_smaller - self.n_larger) / self.n_others) / 2


def compare_effects(
    scores: Sequence[Float[Tensor, "_"]],
    effects: Sequence[Float[Tensor, "_"]],
    sample_ids: Sequence[str],
    question_ids: Sequence[str],
    *,
    seed: int = 0,
) -> Faithfulness:
    """Compare the effect of the document with the highest score of each sample with the effects of the others.

    Samples with NaN scores or effects, and samples with a single document, are left out.

    Args:
        scores: Score of each document, one tensor per sample.
        effects: Effect of each document, one tensor per sample.
        sample_ids: ``MultiDocSample.id`` of each sample.
        question_ids: Question of each sample.
        seed: Random seed of the bootstrap.

    Raises:
        ValueError: If a sample has another number of scores than of effects, or if all samples are left out.
    """
    comparisons = list(_comparisons(scores, effects, sample_ids, question_ids))
    if not comparisons:
        raise ValueError("no sample has a response and two or more documents, so there are no effects to compare")
    questions = [item.question for item in comparisons]

    def mean(values: Sequence[float]) -> Interval:
        return bootstrap_mean(values, groups=questions, seed=seed)

    correlated = [item for item in comparisons if item.correlation == item.correlation]  # NaN differs from itself
    return Faithfulness(
        tuple(item.sample_id for item in comparisons),
        tuple(item.attributed for item in comparisons),
        mean([item.effect for item in comparisons]),
        mean([item.others for item in comparisons]),
        mean([item.effect - item.others for item in comparisons]),
        mean([item.larger for item in comparisons]),
        mean([float(item.n_smaller == item.n_others) for item in comparisons]),
        sign_flip_exact([item.n_smaller - item.n_larger for item in comparisons], groups=questions),
        bootstrap_mean(
            [item.correlation for item in correlated], groups=[item.question for item in correlated], seed=seed
        )
        if correlated
        else None,
    )


def _comparisons(
    scores: Sequence[Float[Tensor, "_"]],
    effects: Sequence[Float[Tensor, "_"]],
    sample_ids: Sequence[str],
    question_ids: Sequence[str],
) -> Iterator[_Comparison]:
    for score, effect, name, question in zip(scores, effects, sample_ids, question_ids, strict=True):
        if len(score) != len(effect):
            raise ValueError(f"sample {name} has {len(score)} scores and {len(effect)} effects; both are per document")
        if len(effect) < 2 or bool(score.isnan().any()) or bool(effect.isnan().any()):
            continue
        top, values = int(score.argmax()), effect.double()
        own, n_others = float(values[top]), len(values) - 1
        n_smaller, n_larger = int((values < own).sum()), int((values > own).sum())
        others = float(values.sum() - own) / n_others
        correlation = rank_correlation(score.tolist(), values.tolist())
        yield _Comparison(name, question, top, own, others, n_smaller, n_larger, n_others, correlation)
