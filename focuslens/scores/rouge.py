"""ROUGE (Lin, 2004), as computed by the package rouge-score, which is imported on first use."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

__all__ = ["rouge_1_recall"]


def rouge_1_recall(response: str, reference: str) -> float:
    """Share of the reference's words that occur in the response, from 0 to 1. Each repetition of a word counts.

    Words are runs of the letters a to z and of digits, lower-cased and stemmed by Porter's rules.

    Raises:
        ValueError: If the reference contains no such word.
        ImportError: If rouge-score is not installed.
    """
    if not re.search("[a-z0-9]", reference.lower()):
        raise ValueError(
            f"the reference {reference!r} has no word that ROUGE counts (a run of letters a to z and digits); "
            "give a reference that has one"
        )
    return float(_scorer().score(reference, response)["rouge1"].recall)


@lru_cache(maxsize=1)
def _scorer() -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise ImportError("ROUGE needs the package rouge-score: pip install 'focuslens[rouge]'") from error
    return RougeScorer(["rouge1"], use_stemmer=True)
