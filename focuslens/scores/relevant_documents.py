"""Contextual score of each relevant document of a sample, for questions that need several documents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from jaxtyping import Float
from torch import Tensor

from focuslens.prompts.answers import list_samples
from focuslens.prompts.sample import MultiDocSample
from focuslens.scores.document_scores import DocumentScores

__all__ = ["relevant_scores"]


def relevant_scores(
    scores: DocumentScores, samples: Sequence[MultiDocSample]
) -> tuple[Mapping[int, Float[Tensor, "layer head"]], ...]:
    """Contextual score (equation 1) of each relevant document, out of the scores of all documents.

    The relevant score of :func:`contextual_scores` is that of all relevant documents together. It is the sum of these
    scores for the same response.

    Args:
        scores: Scores of all documents, from :func:`document_scores`.
        samples: The samples of the scores, in any order.

    Returns:
        For each sample of ``scores``, the score per head of each relevant document, by the document's index. The
        mapping of a sample without relevant documents is empty. All scores of a sample with an empty response are NaN.

    Raises:
        TypeError: If ``samples`` is not a sequence of samples.
        ValueError: If a sample of the scores is not among the samples.
    """
    by_id = {sample.id: sample for sample in list_samples(samples)}
    missing = [name for name in scores.sample_ids if name not in by_id]
    if missing:
        raise ValueError(f"the scores are those of sample {missing[0]!r}, which is not among the samples")
    return tuple(
        {index: by_document[..., index] for index in by_id[name].gold_indices}
        for name, by_document in zip(scores.sample_ids, scores.scores, strict=True)
    )
