"""Evaluations and sweeps: the same responses as for each sample alone, correct counts, and resumption after a kill."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from focuslens import (
    Evaluation,
    FocusDirections,
    FocusModel,
    FocusSteering,
    HeadAblation,
    MultiDocSample,
    Setting,
    SplitSoftmax,
    Sweep,
    evaluate,
    run_sweep,
    split_softmax_settings,
    steering_settings,
)
from focuslens.evaluation import BASELINES, bootstrap_mean, sweeps
from tests.support.paths import ROOT

ALL_HEADS = [(layer, head) for layer in range(3) for head in range(4)]


def steering(alpha: float, positions: Any = "all") -> FocusSteering:
    query = 3 * torch.randn(12, 16, generator=torch.Generator().manual_seed(3))
    return FocusSteering(FocusDirections(ALL_HEADS, query), alpha, positions=positions)


def settings() -> list[Setting]:
    return [
        Setting("baseline"),
        Setting("gold", case="gold"),
        Setting("split", (SplitSoftmax(ALL_HEADS, 0.0),), parameters={"tau": 0.0, "k": 12}),
        Setting("steered", (steering(1.0),), parameters={"alpha": 1.0}),
        Setting("steered late", (steering(1.0, "response"),)),
        Setting("gold, no head", (HeadAblation(ALL_HEADS),), case="gold"),
    ]


@pytest.fixture
def model(tiny_model: FocusModel) -> FocusModel:
    return FocusModel(tiny_model.hooked, tiny_model.tokenizer, stop_strings=(), stop_tokens=(), name="tiny")


@pytest.fixture
def one_model(load_model: Any) -> FocusModel:
    """The model on one backend, for tests that do not depend on the backend."""
    return FocusModel(
        load_model("llama").hooked, load_model("llama").tokenizer, stop_strings=(), stop_tokens=(), name="tiny"
    )


# --- equal responses ---


def test_a_sweep_gives_what_separate_runs_give(model: FocusModel, samples: list[MultiDocSample]) -> None:
    chosen = samples[1:]
    sweep = run_sweep(model, chosen, settings(), max_new_tokens=3, batch_tokens=600)
    for setting in settings():
        expected = [
            model.generate(sample.prompt(setting.case), setting.interventions, max_new_tokens=3).text
            for sample in chosen
        ]
        assert list(sweep[setting.name].responses) == expected, setting.name
        assert sweep[setting.name].sample_ids == ("q1@0", "q2@5", "q3@1")
        assert sweep[setting.name].question_ids == ("q1", "q2", "q3")
    responses = [sweep[setting.name].responses for setting in settings()]
    assert len(set(responses)) == len(responses)


def test_settings_that_leave_the_prompt_share_one_run_of_it(
    one_model: FocusModel, samples: list[MultiDocSample], monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[Any] = []
    prefill, run_from = one_model.prefill, one_model.run_prompts_from

    def count(prompts: Any, interventions: Any = (), *, hold_last: bool = False, keep: Any = ()) -> Any:
        runs.append((len(prompts), len(interventions), hold_last, keep))
        return prefill(prompts, interventions, hold_last=hold_last, keep=keep)

    def count_from(layer: int, residual: Any, *others: Any) -> None:
        runs.append((len(residual), layer))
        run_from(layer, residual, *others)

    monkeypatch.setattr(one_model, "prefill", count)
    monkeypatch.setattr(one_model, "run_prompts_from", count_from)
    run_sweep(one_model, samples[2:], settings(), max_new_tokens=2, batch_tokens=600)
    # Settings that leave the prompt unchanged share one prefill per case (long, gold). The steered and ablated settings
    # rerun the prompt from the first layer that they change.
    assert runs == [(2, 0, True, [0]), (2, 0), (2, 0, True, [0]), (2, 0)]


def test_samples_keep_their_order_though_similar_lengths_run_together(
    one_model: FocusModel, samples: list[MultiDocSample], tmp_path: Path
) -> None:
    path = tmp_path / "results.jsonl"
    lengths = {sample.id: len(one_model.encode(sample.prompt("long")).tokens) for sample in samples}
    assert sorted(lengths, key=lambda name: lengths[name]) != list(lengths)
    result = evaluate(one_model, samples, max_new_tokens=2, out=path, batch_tokens=1)
    assert result.sample_ids == tuple(lengths)
    written = [json.loads(line)["id"] for line in path.read_text().splitlines()[1:]]
    assert written == sorted(lengths, key=lambda name: lengths[name])
    for sample, response in zip(samples, result.responses, strict=True):
        assert response == one_model.generate(sample.prompt(), max_new_tokens=2).text


def test_evaluate_is_a_sweep_of_one_setting(one_model: FocusModel, samples: list[MultiDocSample]) -> None:
    split = [SplitSoftmax(ALL_HEADS, 0.0)]
    result = evaluate(one_model, iter(samples[2:]), split, max_new_tokens=3)
    sweep = run_sweep(one_model, samples[2:], [Setting("x", tuple(split))], max_new_tokens=3)
    assert result == sweep["x"]
    assert len(result) == 2
    gold = evaluate(one_model, samples[2:], case="gold", max_new_tokens=3)
    assert gold.responses[0] == one_model.generate(samples[2].prompt("gold"), max_new_tokens=3).text


# --- counting ---


def answered(
    model: FocusModel, sample: MultiDocSample, prompts: list[tuple[str, Setting | None]]
) -> list[MultiDocSample]:
    """Variants of a sample that differ in their question id and answer.

    A variant's answer is the response under its setting. Without a setting, it is a text that no setting generates.
    """
    copies: list[MultiDocSample] = []
    for question, setting in prompts:
        answer = "nothing of the kind"
        if setting is not None:
            answer = model.generate(sample.prompt(setting.case), setting.interventions, max_new_tokens=3).text
        copies.append(dataclasses.replace(sample, answers=(answer,), question_id=question))
    return copies


def test_accuracy_and_mcnemar_counts_are_those_of_the_hand(
    one_model: FocusModel, samples: list[MultiDocSample]
) -> None:
    baseline, split = Setting("baseline"), Setting("split", (SplitSoftmax(ALL_HEADS, 0.0),), parameters={"tau": 0.0})
    gold = Setting("gold", case="gold")
    outcomes: list[tuple[str, Setting | None]] = [
        ("a", baseline), ("b", split), ("c", split), ("d", split), ("e", None), ("f", gold),
    ]  # fmt: skip
    chosen = answered(one_model, samples[3], outcomes)
    sweep = run_sweep(one_model, chosen, [baseline, split, gold], max_new_tokens=3, seed=4)
    assert sweep["baseline"].correct == (True, False, False, False, False, False)
    assert sweep["split"].correct == (False, True, True, True, False, False)
    assert sweep["gold"].correct == (False, False, False, False, False, True)

    by_name = {row["name"]: row for row in sweep.rows()}
    assert list(by_name) == ["baseline", "split", "gold"]
    row = by_name["split"]
    assert (row["em"], row["samples"], row["case"], row["tau"]) == (0.5, 6, "long", 0.0)
    # Against the baseline, three samples are gained and one is lost. The exact two-sided binomial p of 1 in 4 is
    # 2 (1 + 4) / 16.
    assert (row["gained"], row["lost"], row["mcnemar_p"]) == (3, 1, pytest.approx(10 / 16))
    assert (by_name["gold"]["gained"], by_name["gold"]["lost"], by_name["gold"]["mcnemar_p"]) == (1, 1, 1.0)
    assert (by_name["baseline"]["gained"], by_name["baseline"]["lost"]) == (0, 0)
    interval = bootstrap_mean([0, 1, 1, 1, 0, 0], seed=4)
    assert (row["em_low"], row["em_high"]) == (interval.low, interval.high)
    assert 0 < row["em_low"] < 0.5 < row["em_high"] < 1

    frame = sweep.to_frame()
    figures = ["em", "em_low", "em_high", "samples", "gained", "lost", "mcnemar_p"]
    assert set(frame.columns) == {"name", "case", "tau", *figures}
    assert frame["name"].tolist() == ["baseline", "split", "gold"]
    assert frame["em"].tolist() == pytest.approx([1 / 6, 0.5, 1 / 6])
    assert "gained" not in sweep.rows(baseline=None)[0]
    assert "gained" not in sweep.rows(baseline="another")[0]
    assert {row["name"]: row["gained"] for row in sweep.rows(baseline="split")} == {
        "baseline": 1,
        "split": 0,
        "gold": 1,
    }


def test_intervals_resample_questions(one_model: FocusModel, samples: list[MultiDocSample]) -> None:
    # One question is correct at both gold positions, and one is wrong at both. These are two clusters, not four
    # samples.
    right = one_model.generate(samples[3].prompt(), max_new_tokens=2).text
    chosen = [
        dataclasses.replace(samples[3], answers=(answer,), question_id=question, gold_index=gold)
        for question, answer in (("a", right), ("b", "nothing of the kind"))
        for gold in (1, 2)
    ]
    result = evaluate(one_model, chosen, max_new_tokens=2, seed=1)
    assert result.correct == (True, True, False, False)
    assert result.em == bootstrap_mean([1, 1, 0, 0], groups=["a", "a", "b", "b"], seed=1)
    assert (result.em.low, result.em.high) == (0.0, 1.0)
    assert bootstrap_mean([1, 1, 0, 0], seed=1).low == 0.0
    nameless = evaluate(one_model, [dataclasses.replace(one, question_id="") for one in chosen[:2]], max_new_tokens=2)
    assert nameless.em.mean == 1.0


def test_evaluations_of_other_samples_are_not_paired(one_model: FocusModel, samples: list[MultiDocSample]) -> None:
    one, other = (evaluate(one_model, samples[i : i + 1], max_new_tokens=1) for i in (2, 3))
    with pytest.raises(ValueError, match="different samples"):
        one.compare(other)


# --- files ---


def test_the_header_says_what_was_done(one_model: FocusModel, samples: list[MultiDocSample], tmp_path: Path) -> None:
    path = tmp_path / "runs" / "sweep.jsonl"
    sweep = run_sweep(
        one_model, samples[3:], settings()[:3], max_new_tokens=2, out=path, data={"file": "x.jsonl.gz"}, seed=7
    )
    header, record = (json.loads(line) for line in path.read_text().splitlines())
    header = header["header"]
    assert header == json.loads(json.dumps(sweep.header))
    assert header["model"] == one_model.description
    assert (header["seed"], header["max_new_tokens"]) == (7, 2)
    assert header["data"].items() >= {"file": "x.jsonl.gz", "samples": 1}.items()
    assert [one["name"] for one in header["settings"]] == ["baseline", "gold", "split"]
    assert header["settings"][2]["interventions"] == [SplitSoftmax(ALL_HEADS, 0.0).describe()]
    assert header["settings"][2]["parameters"] == {"tau": 0.0, "k": 12}
    assert header["versions"].keys() >= {"python", "focuslens", "torch", "transformer-lens", "transformers"}
    assert (record["id"], record["question_id"], record["answers"]) == ("q3@1", "q3", list(samples[3].answers))
    assert record["results"].keys() == {"baseline", "gold", "split"}
    assert record["results"]["gold"].keys() == {"response", "correct", "finished"}
    assert record["results"]["gold"]["finished"] is False


def finished_file(model: FocusModel, chosen: list[MultiDocSample], path: Path, **changes: Any) -> Sweep:
    arguments: dict[str, Any] = {"max_new_tokens": 2, "seed": 1, "data": {"file": "x"}, "batch_tokens": 1, **changes}
    return run_sweep(model, chosen, arguments.pop("settings", settings()[:3]), out=path, **arguments)


def test_a_file_cut_at_any_line_is_continued_without_repeating_a_sample(
    one_model: FocusModel, samples: list[MultiDocSample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, chosen = tmp_path / "whole.jsonl", samples[1:]
    whole = finished_file(one_model, chosen, path)
    content = path.read_bytes()
    lines = content.splitlines(keepends=True)
    ran: list[str] = []
    original = sweeps._answer

    def answer(model: Any, batch: Any, *rest: Any, **options: Any) -> Any:
        ran.extend(sample.id for sample in batch)
        return original(model, batch, *rest, **options)

    monkeypatch.setattr(sweeps, "_answer", answer)
    for kept in range(len(lines) + 1):
        for half in (b"", (lines[kept] if kept < len(lines) else b"")[:-1]):
            cut = tmp_path / "cut.jsonl"
            cut.write_bytes(b"".join(lines[:kept]) + half)
            ran.clear()
            again = finished_file(one_model, chosen, cut)
            assert again.evaluations == whole.evaluations
            assert cut.read_bytes() == content
            # Exactly the samples that were not on disk are run.
            assert len(ran) == len(set(ran)) == len(chosen) - max(0, kept - 1)


@pytest.mark.parametrize(
    ("changed", "field"),
    [
        ({"seed": 2}, "seed was 1, is now 2"),
        ({"max_new_tokens": 3}, "max_new_tokens was 2, is now 3"),
        ({"data": {"file": "y"}}, "data differ"),
        ({"settings": settings()[:2]}, "settings differ"),
        ({"settings": [*settings()[:2], Setting("split", (SplitSoftmax(ALL_HEADS, 0.1),))]}, "settings differ"),
    ],
)
def test_results_made_otherwise_are_not_continued(
    one_model: FocusModel, samples: list[MultiDocSample], tmp_path: Path, changed: dict[str, Any], field: str
) -> None:
    path = tmp_path / "results.jsonl"
    finished_file(one_model, samples[3:], path)
    content = path.read_bytes()
    with pytest.raises(ValueError, match=rf"holds results of a different run \(.*{field}"):
        finished_file(one_model, samples[3:], path, **changed)
    assert path.read_bytes() == content


def test_other_samples_and_models_are_not_continued(
    one_model: FocusModel, load_model: Any, samples: list[MultiDocSample], tmp_path: Path
) -> None:
    path = tmp_path / "results.jsonl"
    finished_file(one_model, samples[3:], path)
    reworded = dataclasses.replace(samples[3], question="where is another?")
    for chosen in ([reworded], samples[2:], [dataclasses.replace(samples[3], answers=("x",))]):
        with pytest.raises(ValueError, match="data differ"):
            finished_file(one_model, chosen, path)
    with pytest.raises(ValueError, match="model differ"):
        finished_file(load_model("qwen2"), samples[3:], path)


KILLED = """
import os, signal, sys
sys.path.insert(0, {root!r})
from tests.support.checkpoints import multidoc_samples
from focuslens import FocusModel, Setting, SplitSoftmax, run_sweep

synced = []
sync = os.fsync

def fsync(handle):
    sync(handle)
    synced.append(1)
    if len(synced) == 3:  # the third record is half on disk
        os.truncate(handle, os.fstat(handle).st_size - 25)
        os.kill(os.getpid(), signal.SIGKILL)

heads = [(layer, head) for layer in range(3) for head in range(4)]
settings = [Setting("baseline"), Setting("split", (SplitSoftmax(heads, 0.0),))]
model = FocusModel.from_pretrained({model!r}, device="cpu", backend="bridge", stop_strings=())
os.fsync = fsync  # only now: opening a model can write a record of its comparison
run_sweep(model, multidoc_samples(), settings, max_new_tokens=3, out={out!r}, batch_tokens=1)
"""


@pytest.mark.slow
def test_a_killed_sweep_goes_on_to_the_same_results(
    checkpoint: Any, load_model: Any, samples: list[MultiDocSample], tmp_path: Path
) -> None:
    model = load_model("llama")
    chosen = [Setting("baseline"), Setting("split", (SplitSoftmax(ALL_HEADS, 0.0),))]
    whole = run_sweep(model, samples, chosen, max_new_tokens=3, out=tmp_path / "whole.jsonl")
    path = tmp_path / "killed.jsonl"
    script = KILLED.format(root=str(ROOT), model=str(checkpoint("llama")), out=str(path))
    environment = {**os.environ, "TQDM_DISABLE": "1"}
    killed = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    left = path.read_bytes()
    assert left.count(b"\n") == 3  # the header and two records
    assert not left.endswith(b"\n")
    resumed = run_sweep(model, samples, chosen, max_new_tokens=3, out=path)
    assert resumed.evaluations == whole.evaluations
    assert path.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert left[: left.rfind(b"\n") + 1] == path.read_bytes()[: left.rfind(b"\n") + 1]


# --- settings ---


def test_settings_of_a_split_softmax_sweep() -> None:
    made = split_softmax_settings(ALL_HEADS, [0.1, 0.5], [1, 3], label="random")
    assert [setting.name for setting in made] == [
        f"split-softmax random tau={tau} k={k}" for tau in (0.1, 0.5) for k in (1, 3)
    ]
    assert made[1].parameters == {"heads": "random", "tau": 0.1, "k": 3}
    assert made[1].interventions == (SplitSoftmax(ALL_HEADS[:3], 0.1),)
    for k in (0, 13):
        with pytest.raises(ValueError, match=f"k is {k}; it must be 1 to 12, the number of heads given"):
            split_softmax_settings(ALL_HEADS, [0.1], [k])


def test_settings_of_a_steering_sweep() -> None:
    directions = steering(1.0).directions
    made = steering_settings(directions, ALL_HEADS[::-1], [-0.5, 2], [1, 2], positions="response")
    assert len({setting.name for setting in made}) == 4
    assert made[3].parameters.items() >= {"alpha": 2, "k": 2, "positions": "response"}.items()
    (intervention,) = made[3].interventions
    assert isinstance(intervention, FocusSteering)
    assert intervention.heads == ((2, 3), (2, 2))
    assert (intervention.alpha, intervention.positions) == (2.0, "response")
    with pytest.raises(ValueError, match="k is 13"):
        steering_settings(directions, ALL_HEADS, [1.0], [13])
    with pytest.raises(ValueError, match="no direction for L3H0"):
        steering_settings(directions, [(3, 0)], [1.0], [1])


def test_the_baselines_are_the_three_prompts() -> None:
    assert [(one.name, one.case, one.interventions) for one in BASELINES] == [
        ("baseline", "long", ()),
        ("gold", "gold", ()),
        ("negative", "negative", ()),
    ]


# --- errors ---


def test_what_cannot_be_evaluated_is_refused(one_model: FocusModel, samples: list[MultiDocSample]) -> None:
    one = [Setting("baseline")]
    with pytest.raises(ValueError, match="there is no sample to evaluate"):
        run_sweep(one_model, [], one)
    with pytest.raises(ValueError, match="there is no setting to evaluate"):
        run_sweep(one_model, samples, [])
    with pytest.raises(ValueError, match="sample 'q1@0' occurs more than once"):
        run_sweep(one_model, [samples[0], samples[1], samples[1]], one)
    with pytest.raises(ValueError, match="setting 'baseline' occurs more than once"):
        run_sweep(one_model, samples, one * 2)
    for size in (0, -1):
        with pytest.raises(ValueError, match=f"batch_tokens is {size}; it must be at least 1"):
            run_sweep(one_model, samples, one, batch_tokens=size)


def test_an_unknown_setting_is_refused_with_those_there_are() -> None:
    empty = Evaluation(("a",), ("a",), ("x",), (True,), bootstrap_mean([1.0]))
    sweep = Sweep((Setting("one"), Setting("two")), {"one": empty, "two": empty}, {})
    with pytest.raises(KeyError, match="no setting 'three'; there are one, two"):
        sweep["three"]
