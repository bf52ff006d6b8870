"""The plugin that fails slow tests without the marker counts processor time of the test's call and nothing else."""

from __future__ import annotations

import pytest

BURN = """
import subprocess
import sys
import time
import pytest
from tests.support.processor_time import shared_work

CODE = "import time\\nwhile time.process_time() < 0.4: pass"

def burn():
    end = time.process_time() + 0.4
    while time.process_time() < end:
        pass
"""


@pytest.fixture
def outcomes(pytester: pytest.Pytester):
    """Function that returns test outcomes and output of a test file, with a limit of 0.2 s per test."""

    def run(tests: str) -> tuple[dict[str, int], str]:
        pytester.makepyfile(BURN + tests)
        plugins = ["-p", "tests.support.processor_time", "-p", "no:cacheprovider"]
        result = pytester.runpytest_inprocess(*plugins, "-o", "processor_seconds=0.2")
        return result.parseoutcomes(), result.stdout.str()

    return run


@pytest.mark.parametrize("work", ["burn()", "subprocess.run([sys.executable, '-c', CODE], check=True)"])
def test_work_beyond_the_limit_fails_without_the_marker(outcomes, work):
    found, text = outcomes(f"def test_work():\n    {work}\n\n@pytest.mark.slow\ndef test_marked():\n    {work}\n")
    assert found == {"failed": 1, "passed": 1}
    assert "test_work took 0." in text
    assert "a test may take 0.2 s: make it quicker, or mark it with @pytest.mark.slow" in text


def test_waiting_is_not_work(outcomes):
    assert outcomes("def test_waits():\n    time.sleep(0.4)\n")[0] == {"passed": 1}


def test_shared_work_is_nobodys(outcomes):
    tests = """
@pytest.fixture(scope="module")
def model():
    burn()

@pytest.fixture(scope="module")
def late():
    with shared_work():
        burn()

def test_with_a_fixture(model):
    pass

def test_with_a_fixture_of_the_call(request):
    request.getfixturevalue("late")

def test_with_a_block():
    with shared_work(), shared_work():
        burn()
"""
    assert outcomes(tests)[0] == {"passed": 3}


def test_a_failure_is_its_own(outcomes):
    found, text = outcomes("def test_fails():\n    burn()\n    assert 1 == 2\n")
    assert found == {"failed": 1}
    assert "assert 1 == 2" in text
    assert "processor time" not in text
