"""Pytest plugin that checks types and shapes of arguments and results, in the first calls of each function in a test.

A function that runs in every layer for every token would otherwise be checked thousands of times in one test, which
takes longer than the test itself.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from types import CodeType, FunctionType
from typing import Any

import jaxtyping
import pytest

__all__ = ["CALLS", "INNER_CALLS", "install"]

CALLS, INNER_CALLS = 20, 2
"""Number of calls of each form that are checked in each test: of a function, and of all functions of one inner ``def``.

The checks of an inner function are made anew for each of these functions, which takes longer than to check a call. The
form of a call is the number of dimensions of its tensors and which of them are 1, so that hooks are checked in passes
over a prompt and in passes over one token.
"""


class _Tests:
    """Number of tests that have begun, and whether the running one makes many examples, all of which are checked."""

    begun = 0
    unlimited = False


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
    """Calls of the functions of one ``def`` in a test, by form, up to a limit."""

    limit: int
    test: int = -1
    n: dict[Any, int] = field(default_factory=dict[Any, int])

    def next_is_checked(self, args: tuple[Any, ...]) -> bool:
        if _Tests.unlimited:
            return True
        if self.test != _Tests.begun:
            self.test, self.n = _Tests.begun, {}
        # By name, because this module must not import torch, and other objects can have a slow shape of their own.
        arrays = (arg for arg in args if type(arg).__name__ in ("Tensor", "ndarray"))
        form = tuple(tuple(size == 1 for size in array.shape) for array in arrays)
        self.n[form] = n = self.n.get(form, 0) + 1
        return n <= self.limit


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
        if not calls.next_is_checked(args):
            return fn(*args, **kwargs)
        if checked is None:
            checked = checked_by(fn)
        return checked(*args, **kwargs)

    return call


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    _Tests.begun += 1
    _Tests.unlimited = getattr(getattr(item, "obj", None), "is_hypothesis_test", False)
