"""The benchmark of steered checkpoints: the timed models are steered, and ratios compare times of the same round."""

from __future__ import annotations

import json
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import focuslens as fl

bench_serving = pytest.importorskip("bench_serving", reason="the experiments are not here")

SHORT = ["--length", "100", "--new-tokens", "4", "--threads", "1"]
needs_linux = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is read from /proc")


@pytest.fixture(autouse=True)
def _modules_of_its_own(tmp_path_factory, monkeypatch):
    """Copy the code of checkpoints to a temporary cache instead of the user's cache."""
    import transformers.dynamic_module_utils as dynamic

    monkeypatch.setattr(dynamic, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    bench_serving.make(folder)
    return folder


def test_what_is_timed_is_steered(checkpoints):
    options = bench_serving.parse(SHORT)
    prompt = bench_serving.Bench(checkpoints / "original", 100).encoded().tokens
    model = fl.FocusModel.from_pretrained(str(checkpoints / "original"), device="cpu")
    model = fl.FocusModel(model.hooked, model.tokenizer, stop_strings=(), stop_tokens=())
    found: dict[str, Any] = {}
    for name in bench_serving.CONTESTANTS:
        found[name] = bench_serving.generation(checkpoints, name, options)()
        assert found[name].shape == (1, len(prompt) + 4)
    assert torch.equal(found["original"], found["original again"])
    for name in ("folded", "exported"):
        record = json.loads((checkpoints / name / "focuslens.json").read_text())["steering"]
        assert record["site"] == ("projection" if name == "folded" else "rotary")
        assert len(set(map(tuple, record["heads"]))) == 20
        assert not torch.equal(found[name], found["original"])
    plain = model.generate(fl.EncodedPrompt(prompt, {}), max_new_tokens=4).tokens
    assert found["original"][0, len(prompt) :].tolist() == plain.tolist()


def test_ratios_are_of_the_same_round():
    # On a machine that slows down to a third of its speed, the second contestant always takes 1.1 times as long.
    first = [1.0, 1.0, 2.0, 2.0, 3.0]
    ratio = bench_serving.median_ratio([1.1 * one for one in first], first)
    assert (ratio.mean, ratio.low, ratio.high) == pytest.approx((1.1, 1.1, 1.1))
    ratio = bench_serving.median_ratio([1.0, 1.2, 0.9], [1.0, 1.0, 1.0])
    assert (ratio.mean, ratio.low, ratio.high) == pytest.approx((1.0, 0.9, 1.2))


def test_everybody_runs_in_every_round_and_a_round_before_warms_up(monkeypatch):
    order: list[str] = []
    clock = cycle([1.0, 2.0, 3.0, 4.0])
    monkeypatch.setattr(bench_serving, "seconds_of", lambda run, _: (run(), {"wall": next(clock)})[1])
    runs = {name: (lambda name=name: order.append(name)) for name in bench_serving.CONTESTANTS}
    taken = bench_serving.time_rounds(runs, bench_serving.parse(["--rounds", "7", *SHORT]))
    rounds = [order[i : i + 4] for i in range(0, len(order), 4)]
    assert len(rounds) == 8
    assert all(sorted(one) == sorted(bench_serving.CONTESTANTS) for one in rounds)
    assert {one[0] for one in rounds} == set(bench_serving.CONTESTANTS)  # every contestant starts some round
    assert all(len(all_) == 7 for all_ in taken.values())


@pytest.mark.slow
@needs_linux
def test_the_command_writes_ratios_with_intervals(tmp_path, capsys):
    bench_serving.main([*SHORT, "--rounds", "3", "--processes", "1", "--out", str(tmp_path)])
    found = json.loads((tmp_path / "serving.json").read_text())
    text = (tmp_path / "serving.md").read_text()
    assert capsys.readouterr().out.strip() == text.strip()
    for name, one in found["contestants"].items():
        rounds, original = one["rounds"]["wall"], found["contestants"]["original"]["rounds"]["wall"]
        ratio = float(np.median([a / b for a, b in zip(rounds, original, strict=True)]))
        assert len(rounds) == 3
        assert one["ratio"]["wall"]["mean"] == pytest.approx(ratio)
        assert one["ratio"]["wall"]["low"] <= ratio <= one["ratio"]["wall"]["high"]
        assert one["processes"][0]["total_bytes"] > one["processes"][0]["bytes"] > 0
        assert f"| {name} | " in text
    assert found["contestants"]["original"]["ratio"]["wall"] == {"mean": 1, "low": 1, "high": 1, "confidence": 0.95}
