"""Estimates of a run's duration: their numbers, and the runs that have none."""

from __future__ import annotations

from typing import Any

import pytest

import focuslens as fl
from focuslens.model.batching import map_parts
from focuslens.util import estimates
from focuslens.util.estimates import Estimate, note_place, results_in


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Time of the clock, which the test sets."""
    now = [100.0]
    monkeypatch.setattr(estimates.time, "monotonic", lambda: now[0])
    return now


@pytest.fixture(autouse=True)
def _logged(caplog):
    caplog.set_level("INFO", "focuslens")


def test_the_first_batch_gives_the_time_that_is_left(clock, caplog):
    estimate = Estimate(100, 262_144)
    clock[0] += 30
    estimate.finish(10, 16_384)
    # 16,384 tokens in 30 s: the other 245,760 take 450 s.
    assert caplog.messages == [
        "100 samples with 262,144 prompt tokens: about 8 min left, by the first 10 samples in 30 s"
    ]
    clock[0] += 1000
    estimate.finish(10, 16_384)
    assert len(caplog.messages) == 1


def test_batches_at_once_share_the_time(clock, caplog):
    estimate = Estimate(100)
    clock[0] += 600
    estimate.finish(10, at_once=5)
    assert caplog.messages == ["100 samples: about 10 min left, by the first 10 samples in 10 min"]


@pytest.mark.parametrize(("n", "seconds"), [(2, 59), (10, 6), (1, 1000)])
def test_a_short_rest_has_no_estimate(n, seconds, clock, caplog):
    estimate = Estimate(n, unit="step")
    clock[0] += seconds
    estimate.finish(1)
    assert caplog.messages == []


def test_a_run_inside_another_has_no_estimate(clock, caplog):
    with Estimate(1000) as outer:
        inner = Estimate(50)
        clock[0] += 60
        inner.finish(1)
        assert caplog.messages == []
        outer.finish(50)
    assert caplog.messages == ["1,000 samples: about 19 min left, by the first 50 samples in 60 s"]
    inner = Estimate(50)
    clock[0] += 60
    inner.finish(1)
    assert len(caplog.messages) == 2


def test_the_place_of_the_results_is_named_inside_commands(clock, caplog):
    def message() -> str:
        caplog.clear()
        estimate = Estimate(100)
        clock[0] += 60
        estimate.finish(1)
        return caplog.messages[0].partition(" in 60 s")[2]

    note_place("nowhere")  # outside a command
    assert message() == ""
    with results_in(None):
        assert message() == "; the results are only printed: --out DIRECTORY keeps them"
        note_place("runs/train")
        assert message() == "; results go to runs/train"
    with results_in("runs/heads"):
        assert message() == "; results go to runs/heads"
    assert message() == ""


class Counter:
    """Executor whose calls each take as many seconds as their items have tokens."""

    def __init__(self, clock: list[float]) -> None:
        self._clock = clock

    def map(self, function: Any, calls: Any) -> Any:
        for items, *_ in calls:
            self._clock[0] += sum(items)
            yield len(items)


def test_every_run_in_batches_has_an_estimate(clock, caplog, unchecked):
    lengths = [20, 10, 10, 40]
    found = list(map_parts(Counter(clock), None, lengths, list("abcd"), lengths, 20))  # type: ignore[arg-type]
    assert [batch for batch, _ in found] == [[1, 2], [0], [3]]
    assert caplog.messages == ["4 samples with 80 prompt tokens: about 1 min left, by the first 2 samples in 20 s"]


@pytest.mark.parametrize("work", [fl.contextual_scores, fl.document_scores, fl.question_scores])
def test_scores_have_one(work, tiny_model, samples, monkeypatch, caplog):
    monkeypatch.setattr(estimates, "_LONG_SECONDS", 0.0)
    options = {} if work is fl.question_scores else {"max_new_tokens": 2}
    work(tiny_model, samples, batch_tokens=64, **options)
    n = sum(len(tiny_model.encode(sample.prompt()).tokens) for sample in samples)
    (line,) = [line for line in caplog.messages if " left, by the first" in line]
    assert line.startswith(f"4 samples with {n} prompt tokens: about 0 min left, by the first 1 sample in ")
