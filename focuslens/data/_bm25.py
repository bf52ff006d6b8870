"""Ranking of passages by their similarity to a question, with BM25."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

import numpy as np
from jaxtyping import Float, Int

__all__ = ["PassageIndex"]

_WORD = re.compile(r"\w+")


class PassageIndex:
    r"""Index of the words of passages, which ranks the passages by their BM25 score for a question.

    The variant is that of Lucene (Kamphuis et al., 2020), with ``k1`` 1.5 and ``b`` 0.75. A word is a run of letters,
    digits and underscores (``\w+``) in lower case. Words are not reduced to their stems. The stop words of bm25s's
    longer English list are left out. Otherwise, "who", "what" and "when" would be among the rarest words of a question,
    because few passages contain them. Scores have 64 bits, and the terms of a score are added in the order of the
    question's words. The ranking is therefore the same in every process.

    The index contains numbers, not the texts: about 12 bytes per distinct word of a passage.

    Args:
        texts: Texts of the passages. They are read once.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        # These imports are here, because they load SciPy where there is one.
        from bm25s import BM25
        from bm25s.stopwords import STOPWORDS_EN_PLUS

        self._stop_words = frozenset(STOPWORDS_EN_PLUS)
        # The empty word keeps the vocabulary of passages without words from being empty. No question contains it.
        self._vocabulary: dict[str, int] = {"": 0}
        ids = [
            [self._vocabulary.setdefault(word, len(self._vocabulary)) for word in self._words(text)] for text in texts
        ]
        self._n_passages = len(ids)
        self._index = None
        if any(ids):
            self._index = BM25(k1=1.5, b=0.75, method="lucene", dtype="float64", backend="numpy", csc_backend="numpy")
            self._index.index((ids, self._vocabulary), show_progress=False)

    def scores(self, question: str) -> Float[np.ndarray, " passage"]:
        """BM25 score of each passage. A passage that shares no word with the question has the score 0."""
        ids = [self._vocabulary[word] for word in self._words(question) if word in self._vocabulary]
        if self._index is None or not ids:
            return np.zeros(self._n_passages)
        return self._index.get_scores_from_ids(ids)

    def ranking(self, question: str) -> Int[np.ndarray, " passage"]:
        """Indices of all passages, the most similar first. Passages with equal scores are in their given order."""
        return np.argsort(-self.scores(question), kind="stable")

    def _words(self, text: str) -> Iterator[str]:
        return (word for word in _WORD.findall(text.lower()) if word not in self._stop_words)
