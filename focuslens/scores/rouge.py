"""ROUGE (Lin, 2004), computed with the optional package rouge-score, which is imported on first use."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

__all__ = ["rouge_1_recall"]


def rouge_1_recall(response: str, reference: str) -> float:
    """Share of the reference's words that occur in the response, from 0 to 1.

    Each occurrence of a word in the reference needs a separate occurrence in the response. A word is a sequence
    of digits and letters from a to z. Words are converted to lower case and stemmed with the Porter stemmer.

    Raises:
        ValueError: If the reference does not contain any word.
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
