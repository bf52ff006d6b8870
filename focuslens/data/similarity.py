"""Similarity of documents to a question by their words, beside which rankings by attention are measured."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from focuslens.data._bm25 import PassageIndex
from focuslens.prompts.sample import MultiDocSample

__all__ = ["bm25_scores"]


def bm25_scores(samples: Sequence[MultiDocSample]) -> list[Float[Tensor, "_"]]:
    """BM25 score of each document for its question, one tensor per sample.

    How rare a word is, is counted over the different documents of all samples.
    """
    place: dict[tuple[str, str], int] = {}
    for sample in samples:
        for document in sample.documents:
            place.setdefault((document.title, document.text), len(place))
    index = PassageIndex(f"{title} {text}" for title, text in place)
    scores: list[Tensor] = []
    for sample in samples:
        values = torch.from_numpy(index.scores(sample.question))
        scores.append(values[[place[document.title, document.text] for document in sample.documents]])
    return scores
