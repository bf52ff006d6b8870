"""Reports of sweeps under self-focus, its neighbours and methods: views, and the parts that were chosen."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import focuslens as fl
from focuslens.viz.run_report import Sources, write_run_report
from tests.support.multidoc_files import oracle_record, write
from tests.support.pages import Elements, data_of
from tests.support.recorded_runs import judge
from tests.support.tiers import first_quick

HEADS = [(0, 1), (1, 2)]
KINDS: dict[str, fl.Intervention] = {
    "self-focus": fl.SelfFocus(HEADS, 0.1),
    "soft": fl.SelfFocus(HEADS, 0.1, soft=True, top=2),
    "edit": fl.SelfFocus(HEADS, edit=fl.LogitBias(None, 2.0)),
    "windows": fl.SelfFocus(HEADS, 0.1, parts=8),
    "unsure": fl.SelfFocus(HEADS, 0.1, min_margin=1.0),
    "bias": fl.LogitBias(None, 2.0),
    "target": fl.TargetedSplitSoftmax(HEADS, 0.9),
    "random": fl.RandomFocus(HEADS, 0.1),
}


@pytest.fixture
def model(load_model: Any) -> fl.FocusModel:
    return load_model("llama")


@pytest.fixture
def data(tmp_path: Path) -> fl.MultiDocData:
    path = write(tmp_path / "oracle.jsonl", [oracle_record(i) for i in range(16)])
    return fl.load_multidoc(path, num_documents=3, gold_positions=(0, 2)).sample(4)


def swept(model: fl.FocusModel, data: fl.MultiDocData, folder: Path, *settings: fl.Setting) -> None:
    folder.mkdir()
    grid = [fl.Setting("baseline"), *settings]
    fl.run_sweep(model, data, grid, max_new_tokens=4, out=folder / "sweep.jsonl", progress=False)
    judge(folder / "sweep.jsonl", settings[0].name)


def reported(model: fl.FocusModel, folder: Path) -> tuple[str, list[str]]:
    sources = Sources(model, data=folder.parent / "oracle.jsonl")
    page, missing = write_run_report(folder, sources=sources)
    return page.read_text(encoding="utf-8"), missing


def captions(html: str) -> list[str]:
    return [Elements(text).text for text in re.findall(r"<figcaption>(.*?)</figcaption>", html) if "Question:" in text]


@pytest.mark.parametrize("parameters", first_quick([{}, {"tau": 0.1, "k": 2}]))
@pytest.mark.parametrize("kind", KINDS)
def test_a_sweep_has_views_of_both_answers(
    kind: str, parameters: dict[str, Any], model: fl.FocusModel, data: fl.MultiDocData, tmp_path: Path
) -> None:
    swept(model, data, tmp_path / "run", fl.Setting(kind, (KINDS[kind],), parameters=parameters))
    html, missing = reported(model, tmp_path / "run")
    assert missing == []
    views = [data_of(frame["srcdoc"] or "") for frame in Elements(html).named("iframe") if "panels" in str(frame)]
    assert [[panel["name"] for panel in view["panels"]] for view in views] == [["baseline", kind]] * 3
    assert [text.split(" under ")[0] for text in captions(html)] == ["Became right", "Became right", "Became wrong"]
    heading = "Self-focus" if isinstance(KINDS[kind], fl.SelfFocus) else "Evaluation: sweep"
    assert f"<h2>{heading}</h2>" in html


@pytest.mark.parametrize("kind", ["self-focus", "soft", "edit"])
def test_captions_say_which_document_was_chosen(
    kind: str, model: fl.FocusModel, data: fl.MultiDocData, tmp_path: Path
) -> None:
    focus = KINDS[kind]
    assert isinstance(focus, fl.SelfFocus)
    swept(model, data, tmp_path / "run", fl.Setting(kind, (focus,)))
    html, _ = reported(model, tmp_path / "run")
    choices = dict(zip((sample.question for sample in data), fl.choices(model, data, focus).choices, strict=True))
    golds = {sample.question: sample.gold_index for sample in data}
    told = captions(html)
    assert len(told) == 3
    for text in told:
        question = re.findall(r"Question: (.*?) Accepted:", text)[0]
        choice = choices[question]
        expected = "; ".join(
            f"document {i + 1} (share {choice.shares[i]:.2f}), {'gold' if i == golds[question] else 'not gold'}"
            for i in choice.chosen
        )
        assert text.endswith(f" chosen: {expected}.")


def test_captions_say_what_else_was_chosen(model: fl.FocusModel, data: fl.MultiDocData, tmp_path: Path) -> None:
    for kind, pattern in (
        ("windows", r" chosen: tokens \d+ to \d+ \(share 0\.\d\d\), (not )?gold\.$"),
        ("unsure", r" chosen: no part, since the choice is not sure\.$"),
        ("random", r" chosen: document [123] \(at random\), (not )?gold\.$"),
        ("bias", r"Accepted: [^.]*\.$"),
    ):
        swept(model, data, tmp_path / kind, fl.Setting(kind, (KINDS[kind],)))
        html, _ = reported(model, tmp_path / kind)
        assert all(re.search(pattern, text) for text in captions(html)), (kind, captions(html))


def test_an_evaluation_without_a_baseline_shows_its_first_answers(
    model: fl.FocusModel, data: fl.MultiDocData, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    focus = KINDS["self-focus"]
    fl.evaluate(model, data, [focus], max_new_tokens=4, out=folder / "evaluation.jsonl", progress=False)
    judge(folder / "evaluation.jsonl", "evaluation", {0: (True, True), 1: (True, False), 2: (True, False)})
    html, missing = reported(model, folder)
    assert missing == []
    told = captions(html)
    assert [text.split(". ")[0] for text in told] == [
        "Right under evaluation", "Wrong under evaluation", "Wrong under evaluation"
    ]  # fmt: skip
    assert all(" chosen: document " in text for text in told)
    assert "evaluation.jsonl: first answers under evaluation" in html


@pytest.mark.parametrize("parameters", [{}, {"alpha": 1.0}])
def test_a_method_is_in_the_tables_and_is_not_drawn(
    parameters: dict[str, Any], model: fl.FocusModel, data: fl.MultiDocData, tmp_path: Path
) -> None:
    method = fl.Setting("cad", method=fl.ContextAwareDecoding(), parameters=parameters)
    swept(model, data, tmp_path / "run", method)
    html, missing = reported(model, tmp_path / "run")
    why = "no attention views under cad, since the setting has a method (context_aware_decoding), which is not drawn."
    assert missing == [f"sweep.jsonl: {why}"]
    assert "answers that cad changed" in html
    assert not Elements(html).named("iframe")


def test_an_intervention_that_cannot_be_made_again_is_named(
    model: fl.FocusModel, data: fl.MultiDocData, tmp_path: Path
) -> None:
    swept(model, data, tmp_path / "run", fl.Setting("bias", (KINDS["bias"],)))
    path = tmp_path / "run" / "sweep.jsonl"
    path.write_text(path.read_text().replace('"kind": "logit_bias"', '"kind": "other"'))
    _, missing = reported(model, tmp_path / "run")
    assert missing == [
        "sweep.jsonl: no attention views, since the interventions of bias cannot be made again (an intervention of the "
        "kind 'other' cannot be made from its description)."
    ]
