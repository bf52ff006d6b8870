"""Cases of parametrised tests, of which only the first run in the quick tier."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from typing import Any

import pytest

__all__ = ["first_quick"]


def first_quick(cases: Iterable[Any], n: int = 1) -> list[Any]:
    """The cases for ``pytest.mark.parametrize``. All but the first ``n`` are marked as slow.

    A case that is not a tuple is the value of a single parameter. ``make test`` runs the quick cases, and
    ``make test-all`` runs all of them.
    """
    listed = list(cases)
    marked = (
        pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.slow) for case in listed[n:]
    )
    return list(chain(listed[:n], marked))
