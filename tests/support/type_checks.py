"""Pytest plugin that checks types and shapes of arguments and results, in the first calls of each function in a test.

A function that runs in every layer for every token would otherwise be checked thousands of times in one test, which
takes longer than the test itself.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from types import CodeType, FunctionType
from typing import Any

import jaxtyping
import pytest

__all__ = ["CALLS", "INNER_CALLS", "install"]

CALLS, INNER_CALLS = 20, 2
"""Number of calls that are checked in each test: of a function, and of all functions of one inner ``def``. Each of
these functions has checks of its own, and to make them takes longer than to check a call."""


class _Tests:
    """Number of tests that have begun."""

    begun = 0


def install(package: str, typechecker: str) -> None:
    """Check the functions of a package that has not been imported yet.

    Args:
        package: Name of the package.
        typechecker: Python expression for a decorator that checks types; see :func:`jaxtyping.install_import_hook`.
    """
    jaxtyped = jaxtyping.jaxtyped

    def decorator(*, typechecker: Any) -> Callable[[Any], Any]:
        checked_by = jaxtyped(typechecker=typechecker)
        return lambda fn: _checked_at_first(fn, checked_by) if inspect.isfunction(fn) else checked_by(fn)

    # The hook decorates every function and class with what it finds under this name.
    jaxtyping.jaxtyped = decorator
    jaxtyping.install_import_hook(package, typechecker)


@dataclass
class _Calls:
    """Calls of the functions of one ``def`` in a test, up to a limit."""

    limit: int
    test: int = -1
    n: int = 0

    def next_is_checked(self) -> bool:
        if self.test != _Tests.begun:
            self.test, self.n = _Tests.begun, 0
        self.n += 1
        return self.n <= self.limit


_CALLS: dict[CodeType, _Calls] = {}


def _checked_at_first(fn: FunctionType, checked_by: Callable[..., Any]) -> Callable[..., Any]:
    """A function whose first calls in each test are checked."""
    is_inner = "<locals>" in fn.__qualname__
    # Checks of an inner function are made when it is called. Those of others need the names in their module as they are
    # now, before a test replaces one.
    checked = None if is_inner else checked_by(fn)
    calls = _CALLS.setdefault(fn.__code__, _Calls(INNER_CALLS if is_inner else CALLS))

    @functools.wraps(fn)
    def call(*args: Any, **kwargs: Any) -> Any:
        __tracebackhide__ = True
        nonlocal checked
        if not calls.next_is_checked():
            return fn(*args, **kwargs)
        if checked is None:
            checked = checked_by(fn)
        return checked(*args, **kwargs)

    return call


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    _Tests.begun += 1
