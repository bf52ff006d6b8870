"""Batches of similar length within a token budget that is halved when memory runs out."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

import focuslens as fl
from focuslens.util.memory import is_out_of_memory
from tests.support.batches import in_batches


def batches(lengths, budget):
    return [batch for batch, _ in in_batches(lengths, budget, lambda batch, budget: None)]


def test_batches_are_of_similar_length_and_within_the_budget():
    lengths = [10, 3, 9, 50, 4, 10, 3]
    made = batches(lengths, 20)
    assert made == [[1, 6, 4], [2, 0], [5], [3]]
    assert sorted(index for batch in made for index in batch) == list(range(7))
    assert batches([5, 5, 5], 1) == [[0], [1], [2]]
    assert batches([], 10) == []


@pytest.mark.parametrize("budget", [0, -4])
def test_a_budget_of_nothing_is_refused(budget):
    with pytest.raises(ValueError, match=f"batch_tokens is {budget}; it must be at least 1"):
        batches([1], budget)


OUT_OF_MEMORY = [
    MemoryError("no room"),
    torch.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:130] DefaultCPUAllocator: can't allocate memory: you tried to"),
    RuntimeError("MPS backend out of memory (MPS allocated: 9.00 GB, other allocations: 1.00 GB)"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY)
def test_the_budget_halves_and_nothing_is_lost(error):
    seen = []

    def run(batch, budget):
        seen.append((list(batch), budget))
        if len(batch) > 2:
            raise error
        return [index * 2 for index in batch]

    with pytest.warns(UserWarning, match="memory ran out on 8 prompts of 80 tokens; going on with 40 tokens per batch"):
        made = dict(enumerate(in_batches([10] * 8, 1000, run)))
    assert [budget for _, budget in seen] == [1000, 40, 20, 20, 20, 20]
    assert [pair for _, pair in sorted(made.items())] == [([i, i + 1], [2 * i, 2 * i + 2]) for i in (0, 2, 4, 6)]


def test_what_failed_is_freed_before_the_next_try():
    class Tensor:
        pass

    held = []

    def run(batch, budget):
        gc.collect()
        assert not held or held[-1]() is None
        big = Tensor()
        held.append(weakref.ref(big))
        if len(batch) > 1:
            raise MemoryError(big)

    with pytest.warns(UserWarning, match="memory ran out"):
        assert len(list(in_batches([1] * 4, 4, run))) == 4


def test_an_item_too_large_alone_and_other_errors_are_errors():
    def run(batch, budget):
        raise MemoryError("no room")

    with pytest.raises(MemoryError, match=r"memory ran out on a single prompt of 7,000 tokens \(no room\)"):
        list(in_batches([7000], 10, run))

    def fail(batch, budget):
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes do not match"):
        list(in_batches([1, 1], 10, fail))


def test_only_what_ran_out_of_memory_says_so():
    assert all(map(is_out_of_memory, OUT_OF_MEMORY))
    assert not is_out_of_memory(RuntimeError("CUBLAS_STATUS_EXECUTION_FAILED"))
    assert not is_out_of_memory(ValueError("can't allocate memory"))


@pytest.mark.filterwarnings("ignore:memory ran out")
def test_what_can_be_divided_is_divided_before_it_is_given_up():
    seen = []

    def run(batch, budget):
        seen.append(budget)
        if budget > 3:
            raise MemoryError

    assert len(list(in_batches([40], 100, run, divisible=True))) == 1
    assert seen == [100, 20, 10, 5, 2]

    def fail(batch, budget):
        raise MemoryError

    with pytest.raises(MemoryError, match="a single prompt of 40 tokens"):
        list(in_batches([40], 100, fail, divisible=True))


@pytest.mark.filterwarnings("ignore:memory ran out")
def test_evaluation_and_scores_carry_on(load_model, backend, samples, monkeypatch):
    model = load_model("llama", backend)
    expected = fl.evaluate(model, samples, max_new_tokens=3).responses
    scores = fl.contextual_scores(model, samples, max_new_tokens=3)
    prefill, sizes = model.prefill, []

    def short_of_memory(prompts, *args, **kwargs):
        sizes.append(len(prompts))
        if len(prompts) > 1:
            raise MemoryError
        return prefill(prompts, *args, **kwargs)

    monkeypatch.setattr(model, "prefill", short_of_memory)
    assert fl.evaluate(model, samples, max_new_tokens=3).responses == expected
    assert sizes[0] == len(samples)
    assert sizes[-1] == 1
    again = fl.contextual_scores(model, samples, max_new_tokens=3)
    torch.testing.assert_close(again.relevant, scores.relevant, atol=1e-5, rtol=0)
    assert again.responses == scores.responses
