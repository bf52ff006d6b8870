"""ROUGE (Lin, 2004), as the package rouge-score computes it; imported when it is first needed."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

__all__ = ["rouge_1_recall"]


def rouge_1_recall(response: str, reference: str) -> float:
    """Share of the reference's words that the response has, 0 to 1; a word twice in the reference counts twice.

    Words are runs of the letters a to z and of digits, lower-cased and stemmed by Porter's rules.

    Raises:
        ValueError: If the reference has no such word, so that no response could recall any.
        ImportError: If rouge-score is not installed.
    """
    if not re.search("[a-z0-9]", reference.lower()):
        raise ValueError(
            f"the reference {reference!r} has no word that ROUGE counts (letters a to z and digits); give one that has"
        )
    return float(_scorer().score(reference, response)["rouge1"].recall)


@lru_cache(maxsize=1)
def _scorer() -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise ImportError("ROUGE needs the package rouge-score: pip install 'focuslens[rouge]'") from error
    return RougeScorer(["rouge1"], use_stemmer=True)
