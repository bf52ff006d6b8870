"""A killed reproduction resumes from its last chunk, and leaves the same files as an uninterrupted reproduction."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import focuslens as fl
from focuslens.model.batching import RunOptions
from focuslens.scores.retrieval_scores import copy_runs
from focuslens.studies.paper import attribution, budget, chunks, faithfulness, retrieval, scored, steering
from focuslens.studies.paper.settings import RetrievalSettings
from focuslens.studies.paper.study import Study
from tests.support.paper_runs import opened

OPTIONS = RunOptions(max_new_tokens=3, progress=False)


@pytest.fixture
def prefills(monkeypatch: Any) -> Any:
    """Counter of the prompts that were run. A prefill raises KeyboardInterrupt when the count equals ``last``."""

    class Prefills:
        n, last = 0, 10**9

    original = fl.FocusModel.prefill

    def prefill(self: Any, prompts: Any, *arguments: Any, **settings: Any) -> Any:
        if Prefills.n == Prefills.last:
            raise KeyboardInterrupt
        Prefills.n += len(prompts) if isinstance(prompts, list) else 1
        return original(self, prompts, *arguments, **settings)

    monkeypatch.setattr(fl.FocusModel, "prefill", prefill)
    return Prefills


def killed_and_again(prefills: Any, after: int, run: Callable[[], Any]) -> Any:
    """Result of a run that is killed after ``after`` prompts and then run again."""
    prefills.n, prefills.last = 0, after
    with pytest.raises(KeyboardInterrupt):
        run()
    assert prefills.n == after
    prefills.last = 10**9
    return run()


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- parts of a reproduction ---


def same(first: Any, second: Any) -> None:
    """Check that all fields of two results are equal, and their tensors bit for bit."""
    assert type(first) is type(second)
    for name, one in vars(first).items():
        other = vars(second)[name]
        pairs = zip(one, other, strict=True) if isinstance(one, tuple) else [(one, other)]
        for a, b in pairs:
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, name


@pytest.mark.parametrize("what", ["scores", "steered scores", "documents", "budget"])
def test_what_was_measured_is_not_measured_again(
    what: str, load_model: Any, samples: Any, prefills: Any, tmp_path: Path, monkeypatch: Any
):
    monkeypatch.setattr(chunks, "CHUNK", 2)
    model, split = load_model("llama"), [fl.SplitSoftmax([(1, 2)], 0.3)]
    run = {
        "scores": lambda out: scored.score_in_chunks(model, samples, "long", out, OPTIONS),
        "steered scores": lambda out: scored.score_in_chunks(model, samples, "gold", out, OPTIONS, split),
        "documents": lambda out: scored.documents_in_chunks(model, samples, out, OPTIONS),
        "budget": lambda out: scored.budget_in_chunks(model, samples, out, OPTIONS, split),
    }[what]
    whole = run(tmp_path / "whole")
    again = killed_and_again(prefills, 2, lambda: run(tmp_path / "killed"))
    assert prefills.n == len(samples) == 4
    same(again, whole)
    assert files(tmp_path / "killed") == files(tmp_path / "whole")
    run(tmp_path / "killed")
    assert prefills.n == 4


def test_chunks_together_are_the_whole(load_model: Any, samples: Any, tmp_path: Path, monkeypatch: Any):
    monkeypatch.setattr(chunks, "CHUNK", 3)
    model, split = load_model("qwen2"), [fl.SplitSoftmax([(1, 2)], 0.3)]
    options: Any = {"max_new_tokens": 3, "interventions": split}
    scores = scored.score_in_chunks(model, samples, "long", tmp_path / "a", OPTIONS, split)
    whole = fl.contextual_scores(model, samples, **options)
    for kind in ("relevant", "irrelevant", "irrelevant_max", "sink"):
        torch.testing.assert_close(getattr(scores, kind), getattr(whole, kind), atol=1e-5, rtol=0)
    assert (scores.sample_ids, scores.responses, scores.correct) == (whole.sample_ids, whole.responses, whole.correct)
    budget_ = scored.budget_in_chunks(model, samples, tmp_path / "b", OPTIONS, split)
    torch.testing.assert_close(budget_.shares, fl.attention_budget(model, samples, **options).shares, atol=1e-5, rtol=0)
    # Prompts have six or four documents.
    documents = scored.documents_in_chunks(model, samples, tmp_path / "c", OPTIONS)
    at_once = fl.document_scores(model, samples, max_new_tokens=3)
    assert [one.shape for one in documents.scores] == [one.shape for one in at_once.scores]
    for ours, theirs in zip(documents.scores, at_once.scores, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    for name in ("gold", "sample_ids", "question_ids", "responses", "correct"):
        assert getattr(documents, name) == getattr(at_once, name)


def test_chunks_of_another_size_are_not_read(load_model: Any, samples: Any, tmp_path: Path, monkeypatch: Any):
    model, ids = load_model("qwen2"), tuple(sample.id for sample in samples)
    for size in (1, 2, 4):  # a chunk of one sample stays, unless it is taken away
        monkeypatch.setattr(chunks, "CHUNK", size)
        assert scored.score_in_chunks(model, samples, "long", tmp_path, OPTIONS).sample_ids == ids
        assert tuple(chunks.read_chunks(tmp_path).about["sample_ids"]) == ids


def test_needles_that_were_asked_for_are_not_asked_for_again(prefills: Any, tmp_path: Path, monkeypatch: Any):
    monkeypatch.setattr(chunks, "CHUNK", 2)
    model, needles = fl.FocusModel.demo(device="cpu"), fl.synthetic_needles(3, n=5)
    options = RunOptions(max_new_tokens=20, progress=False)
    whole = scored.retrieval_in_chunks(model, needles, tmp_path / "whole", options)
    again = killed_and_again(
        prefills, 4, lambda: scored.retrieval_in_chunks(model, needles, tmp_path / "killed", options)
    )
    assert prefills.n == 5
    same(again, whole)
    assert files(tmp_path / "killed") == files(tmp_path / "whole")
    at_once = fl.retrieval_scores(model, needles, max_new_tokens=20)
    torch.testing.assert_close(whole.by_sample, at_once.by_sample, atol=1e-5, rtol=0)
    assert (whole.recall, whole.responses, whole.sample_ids) == (at_once.recall, at_once.responses, at_once.sample_ids)
    assert any(whole.counted)
    copies, responses = copy_runs(model, needles, RunOptions(max_new_tokens=20))
    assert torch.equal(copies, at_once.by_sample)
    assert tuple(responses) == at_once.responses


def test_nothing_to_measure_is_refused(load_model: Any, tmp_path: Path):
    with pytest.raises(ValueError, match="there are no samples to score"):
        scored.documents_in_chunks(load_model("llama"), [], tmp_path, OPTIONS)


# --- artefacts ---


def compared(first: Study, second: Study, prefills: Any, after: int, run: Callable[[Study], Any]) -> int:
    """Check that an uninterrupted and a killed reproduction agree, and return the number of prompts."""
    for one in (first, second):
        assert one.ranking
        assert one.directions.heads
    prefills.n = 0
    whole = run(first)
    total = prefills.n
    assert after < total
    assert killed_and_again(prefills, after, lambda: run(second)) == whole
    assert prefills.n == total
    assert files(second.out) == files(first.out)
    return total


@pytest.fixture
def two(checkpoint: Any, paper_files: Path, tmp_path: Path, monkeypatch: Any) -> tuple[Study, Study]:
    monkeypatch.setattr(chunks, "CHUNK", 1)
    return (
        opened(tmp_path, paper_files, checkpoint("llama"), "whole"),
        opened(tmp_path, paper_files, checkpoint("llama"), "killed"),
    )


def test_attribution_goes_on(two: tuple[Study, Study], prefills: Any):
    assert compared(*two, prefills, 3, attribution.run) == 4


def test_effects_of_documents_go_on(two: tuple[Study, Study], prefills: Any):
    # Four scored responses, three prompts with one document blocked after the other, and two prompts that run as a
    # whole and without each of their three documents.
    assert compared(*two, prefills, 11, faithfulness.run) == 4 + 3 + 2 * (1 + 3)


def test_an_attention_budget_goes_on(two: tuple[Study, Study], prefills: Any):
    def run(study: Study) -> Any:
        return budget.piece(study, steering.steerable(study), study.folder("anatomy"))

    # Two prompts, each at alpha = 0 and 1.
    assert compared(*two, prefills, 3, run) == 4


def test_retrieval_heads_go_on(two: tuple[Study, Study], prefills: Any):
    wanted = RetrievalSettings("synthetic", (3,), (0.0, 1.0), repeats=2, max_new_tokens=20, top=3)
    first, second = (
        Study(replace(one.settings, model="demo", retrieval=wanted), one.out, progress=False) for one in two
    )
    assert compared(first, second, prefills, 2, retrieval.run) == 4
    assert retrieval.run(first).tables
