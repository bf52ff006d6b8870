"""Pytest plugin that fails a test whose call exceeds its limit of processor time, unless it has the marker ``slow``.

The time includes child processes that the test process waited for. Processor time is measured because it, unlike wall
time, hardly depends on the machine's load. The measurement excludes blocks ``with shared_work():`` and fixtures of
a wider scope than ``function``, because their cost falls on the first test that uses them.
"""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import pytest

__all__ = ["processor_seconds", "shared_work"]


class _Shared:
    """Total processor time of shared work so far, and the number of its open blocks."""

    seconds = 0.0
    depth = 0


def processor_seconds() -> float:
    """Processor time of this process and of its finished children, in seconds."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


@contextmanager
def shared_work() -> Generator[None]:
    """Exclude the block's processor time from that of the running test. Blocks may be nested."""
    begin = processor_seconds()
    _Shared.depth += 1
    try:
        yield
    finally:
        _Shared.depth -= 1
        if _Shared.depth == 0:
            _Shared.seconds += processor_seconds() - begin


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addini("processor_seconds", "processor time that a test without the marker slow may take", default="10")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: may take more processor time than the ini option processor_seconds")


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef[Any]) -> Generator[None, Any, Any]:
    if fixturedef.scope == "function":
        return (yield)
    with shared_work():
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, Any]:
    begin = processor_seconds() - _Shared.seconds
    result = yield
    taken = processor_seconds() - _Shared.seconds - begin
    allowed = float(item.config.getini("processor_seconds"))
    item.user_properties.append(("processor_seconds", round(taken, 2)))
    if taken > allowed and item.get_closest_marker("slow") is None:
        pytest.fail(
            f"{item.name} took {taken:.1f} s of processor time, and a test may take {allowed:g} s: "
            "make it quicker, or mark it with @pytest.mark.slow",
            pytrace=False,
        )
    return result
