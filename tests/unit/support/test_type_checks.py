"""The plugin that checks types and shapes does so in the first calls of each function in each test."""

from __future__ import annotations

import pytest

from tests.support.type_checks import CALLS, INNER_CALLS

PACKAGE = """
from jaxtyping import Float
from numpy import ndarray

def first_half(x: Float[ndarray, "2 n"]) -> Float[ndarray, "n"]:
    return x[0]

def maker():
    def inner(x: Float[ndarray, "2 n"]) -> Float[ndarray, "n"]:
        return x[0]
    return inner

def wrong(x: Float[ndarray, "2 n"]) -> Float[ndarray, "n"]:
    return x
"""

TESTS = """
import pytest
import numpy
from hypothesis import given, settings, strategies as st
from jaxtyping import TypeCheckError
from tests.support import type_checks

type_checks.install("checked_package", "beartype.beartype")

from checked_package import first_half, maker, wrong

GOOD, BAD = numpy.zeros((2, 3)), numpy.zeros((3, 2))

def test_a_result_is_checked():
    with pytest.raises(TypeCheckError, match="return value"):
        wrong(GOOD)

@pytest.mark.parametrize("test", range(2))
def test_the_first_calls_are_checked(test):
    for _ in range(type_checks.CALLS - 1):
        first_half(GOOD)
    with pytest.raises(TypeCheckError, match="parameters"):
        first_half(BAD)
    assert first_half(BAD) is not None

@pytest.mark.parametrize("test", range(2))
def test_functions_of_one_inner_def_are_counted_together(test):
    for _ in range(type_checks.INNER_CALLS - 1):
        maker()(GOOD)
    with pytest.raises(TypeCheckError, match="parameters"):
        maker()(BAD)
    assert maker()(BAD) is not None

def test_calls_of_another_form_are_counted_apart():
    for _ in range(type_checks.CALLS):
        first_half(GOOD)
    with pytest.raises(TypeCheckError, match="parameters"):
        first_half(numpy.zeros((3, 1)))

@given(st.just(0))
@settings(max_examples=1)
def test_every_call_of_a_property_is_checked(number):
    for _ in range(type_checks.CALLS):
        first_half(GOOD)
    with pytest.raises(TypeCheckError, match="parameters"):
        first_half(BAD)
"""


def test_first_calls_are_checked_in_each_test(pytester: pytest.Pytester):
    pytester.makepyfile(checked_package=PACKAGE, test_calls=TESTS)
    plugins = ["-p", "tests.support.type_checks", "-p", "no:cacheprovider", "-p", "no:xdist"]
    result = pytester.runpytest_subprocess(*plugins)
    result.assert_outcomes(passed=7)


def test_the_package_itself_is_checked():
    import jaxtyping
    import torch

    from focuslens.interventions.split_softmax import split_softmax

    assert CALLS > INNER_CALLS > 0
    with pytest.raises(jaxtyping.TypeCheckError, match="tau"):
        split_softmax(torch.ones(1, 2) / 2, (0, 1), "0.5")  # pyright: ignore[reportArgumentType]
