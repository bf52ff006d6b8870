"""The demo command from end to end on the embedded model, with few samples."""

from __future__ import annotations

import json
import re

import pytest

from focuslens.cli import demo as demo_command
from focuslens.cli.main import _parser
from focuslens.data.synthetic import load_synthetic
from focuslens.evaluation import Evaluation, Setting, Sweep, bootstrap_mean

FIGURES = ("results-map", "split_softmax", "steering", "directions-losses")
FILES = ("results.json", "report.html", *(f"report_files/{name}.png" for name in FIGURES))


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """Output directory of a small demo run."""
    from focuslens.cli.demo import DemoSettings, run

    out = tmp_path_factory.mktemp("demo")
    settings = DemoSettings(
        scored=3, trained=2, chosen=2, tested=3, taus=(0.1, 1000), ks=(1, 2), alphas=(-0.5, 0.5), steered=(2,),
        trained_heads=2, epochs=2, max_new_tokens=16,
    )  # fmt: skip
    run(_parser().parse_args(["demo", "--out", str(out)]), settings)
    return out


def test_the_demo_writes_results_figures_directions_and_a_report(demo):
    for name in FILES:
        assert (demo / name).stat().st_size > 1000
    assert (demo / "directions" / "directions.json").exists()


def test_results_name_what_made_them_and_agree_with_the_records(demo):
    results = json.loads((demo / "results.json").read_text())
    assert {"model", "data", "seed", "versions", "demo"} <= results.keys()
    lines = [json.loads(line) for line in (demo / "split_softmax.jsonl").read_text().splitlines()[1:]]
    assert len(lines) == 3
    for row in results["split_softmax"]:
        correct = [line["results"][row["name"]]["correct"] for line in lines]
        assert row["em"] == pytest.approx(sum(correct) / len(correct))
        assert row["em_low"] <= row["em"] <= row["em_high"]
    assert results["data"]["samples"] == 3
    assert results["data"]["gold_positions"] == [0, 4]
    named = [json.loads(line)["id"] for line in (demo / "split_softmax.jsonl").read_text().splitlines()[1:]]
    assert sorted(int(name.rpartition("@")[2]) for name in named) == [0, 0, 4]
    assert len(results["data"]["prompts_sha256"]) == 64


def test_the_direction_shown_is_the_one_that_was_best_on_validation(demo):
    results = json.loads((demo / "results.json").read_text())
    tried = [row for row in results["steering_validation"] if row["name"] != "baseline"]
    best = max(row["em"] for row in tried)
    gentlest = min((row for row in tried if row["em"] == best), key=lambda row: abs(row["alpha"]))
    assert results["chosen_on_validation"] == gentlest["name"]


def made_up(settings, right):
    """A sweep over ten questions. ``right`` is the number of correct answers per setting."""
    ids = tuple(map(str, range(10)))
    evaluations = {}
    for setting in settings:
        correct = tuple(i < right[setting.name] for i in range(10))
        evaluations[setting.name] = Evaluation(ids, ids, ids, correct, bootstrap_mean([float(one) for one in correct]))
    return Sweep(tuple(settings), evaluations, {})


def test_the_choice_is_made_on_validation_questions_whatever_the_test_would_say(load_model, tmp_path, monkeypatch):
    grid = [Setting(name, parameters={"alpha": alpha}) for name, alpha in (("a", 1.0), ("b", -4.0), ("c", 2.0))]
    right = {
        "steering_validation": {"baseline": 9, "a": 1, "b": 5, "c": 5},
        "steering": {"baseline": 1, "a": 9, "b": 2, "c": 1},
    }
    seen = {}

    def sweep(self, data, settings, name):
        seen[name] = {sample.question_id.split("-")[1] for sample in data.samples}
        return made_up(settings, right[name])

    monkeypatch.setattr(demo_command._Demo, "sweep", sweep)
    test = demo_command.Samples(load_synthetic(2, split="test"), {})
    sizes = demo_command.DemoSettings(chosen=2)
    settings = demo_command.run_settings(_parser().parse_args(["demo"]), sizes)
    steps = demo_command._Demo(settings, sizes, tmp_path, load_model("llama"))
    chosen_on, steer, best = steps.steer(grid, test)
    assert seen == {"steering_validation": {"validation"}, "steering": {"test"}}
    assert best == "c"  # b and c are equally good, and c has the smaller strength
    assert (chosen_on["a"].em.mean, steer["a"].em.mean) == (0.1, 0.9)


def test_the_report_loads_nothing_from_the_network_and_holds_a_circuitsvis_view(demo):
    page = (demo / "report.html").read_text()
    assert not re.search(r"""(?:src|href)\s*=\s*["']?(?:https?:)?//""", page)
    assert "CircuitsVis" in page or "circuitsvis" in page
    assert "data:image/png;base64," in page


def test_the_demo_of_another_model_measures_heads_and_split_softmax_alone(checkpoint, tmp_path, capsys):
    from dataclasses import replace

    from focuslens.cli.demo import REAL, run

    model, out = str(checkpoint("llama")), tmp_path / "out"
    sizes = replace(REAL, documents=2, scored=2, tested=3, ks=(1, 2), max_new_tokens=3)
    run(_parser().parse_args(["demo", "--model", model, "--n-ctx", "4096", "--out", str(out)]), sizes)
    printed = capsys.readouterr().out
    assert "2 documents per question: the relevant one, and the passages most like the question of other" in printed
    assert "1/2  contextual heads" in printed
    results = json.loads((out / "results.json").read_text())
    assert results["data"]["file"] == "passages"
    assert results["data"]["distractors"] == "bm25"
    assert {row["name"] for row in results["split_softmax"]} >= {"baseline", "gold", "negative"}
    assert "steering" not in results
    assert not (out / "directions").exists()
    assert f"where {checkpoint('llama').name} looks" in (out / "report.html").read_text()


def test_the_embedded_model_has_its_own_corpus(capsys, tmp_path):
    from focuslens.cli.main import main

    assert main(["demo", "--data", "passages"]) == 1
    assert "--data needs --model: the embedded model knows the synthetic corpus only" in capsys.readouterr().err


def test_a_repaired_answer_is_printed(capsys):
    from focuslens.cli.common import Samples
    from focuslens.cli.demo import _print_repaired

    samples = load_synthetic(2, split="test")
    ids = tuple(sample.id for sample in samples)
    em = bootstrap_mean([0.0, 1.0])

    def answered(*correct: bool) -> Evaluation:
        return Evaluation(ids, ids, tuple(f"answer {i} {right}" for i, right in enumerate(correct)), correct, em)

    raised = Setting("tau 0.3", parameters={"tau": 0.3})
    evaluations = {"baseline": answered(True, False), "tau 0.3": answered(True, True)}
    _print_repaired(Sweep((Setting("baseline"), raised), evaluations, {}), Samples(samples, {}))
    printed = capsys.readouterr().out
    assert samples[1].question in printed
    assert "before: answer 1 False\n  after:  answer 1 True" in printed
