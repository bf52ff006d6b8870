"""The table of focus without a label: choosers, families, the way to the label, and resumption."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import focuslens as fl
from focuslens.evaluation import Setting
from focuslens.evaluation.sweeps import Evaluation
from focuslens.studies.paper import focus, focus_families, focus_table
from focuslens.studies.paper.focus_choice import Chooser, Choosers, choosers
from focuslens.studies.paper.settings import FocusSettings
from focuslens.studies.paper.study import Study
from focuslens.viz import Table
from tests.support.paper_runs import opened


@pytest.fixture
def study(checkpoint: Any, paper_files: Path, tmp_path: Path) -> Study:
    return opened(tmp_path, paper_files, checkpoint("llama"))


def evaluation(*correct: bool) -> Evaluation:
    ids = tuple(map(str, range(len(correct))))
    return Evaluation(ids, ids, ("",) * len(correct), correct, fl.evaluation.bootstrap_mean(list(map(float, correct))))


def chosen(name: str, test: Evaluation, **about: Any) -> focus_table.Chosen:
    chooses = about.get("own") and not about.get("label")
    setting = Setting(name, (fl.SelfFocus([(0, 0)], 0.1),) if chooses else ())
    return focus_table.Chosen(focus_families.Family(name, (setting,), **about), setting, test, test)


def test_choosers_are_fitted_on_training_and_compared_on_validation_questions(study: Study) -> None:
    found = choosers(study)
    train = fl.question_scores(study.model, study.samples("train"), null=None)
    assert found.heads.by == tuple(head for head, _ in train.select(2, by="contrast"))
    assert found.votes.by == fl.HeadVotes.fit(train.attention, train.gold, penalty=0.1)
    validation = fl.question_scores(study.model, study.samples("validation"), null=None)
    assert isinstance(found.votes.by, fl.HeadVotes)
    right = [
        int(found.votes.by.shares(values.flatten(0, 1)).argmax()) == gold
        for values, gold in zip(validation.attention, validation.gold, strict=True)
    ]
    assert found.votes.accuracy == sum(right) / len(right)
    assert (found.answer.rows, len(found.table.rows)) == ("response", 3)
    again = choosers(study)
    assert again.votes == found.votes, "stored chunks give the same votes"


def test_the_methods_of_others_get_the_choice_of_self_focus() -> None:
    heads = [fl.Head(0, 0), fl.Head(1, 1)]
    best = fl.SelfFocus(fl.HeadVotes(tuple(heads), (1.0, 2.0)), 0.1, focused=heads[:1])
    settings = FocusSettings(ks=(1,), leave_out=("DySCO",))
    by_heads = Chooser(tuple(heads), "2 heads", "tail", 1.0)
    found = Choosers(by_heads, by_heads, by_heads, Table("", (), ()))
    others = focus_families.of_others(settings, heads, found, best, "question rows", [], 0.5)
    variants = focus_families.refined(settings, best, "question rows")
    on_choice = [
        item
        for family in (*others, *variants)
        for setting in family.settings
        for item in setting.interventions
        if isinstance(item, fl.SelfFocus)
    ]
    assert len(on_choice) == 3 + 2 + 2 + 3 + 2 + 1
    assert all(item.by == best.by for item in on_choice)
    assert "DySCO" not in {family.name for family in others}
    control = focus_families.control(Setting("x", (best,)), 3)
    assert control.interventions == (fl.RandomFocus(heads[:1], 0.1, seed=3),)


def test_the_way_to_the_label_of_a_hand_worked_case() -> None:
    baseline, label = evaluation(*[False] * 8, True, True), evaluation(*[True] * 10)
    ours = evaluation(*[True] * 6, False, False, True, True)
    findings = focus_table.findings(
        [chosen("label", label, label=True, own=True), chosen("self-focus", ours, own=True), chosen("other", baseline)],
        {"baseline": baseline, "random document": baseline},
    )
    assert "0.750 [" in findings[1].text
    assert findings[0].verdict == "does not hold", "six of ten are not enough for p < 0.01"
    assert findings[2].verdict == "holds"
    assert "On 6 samples only self-focus is right, on 0 only the other" in findings[2].text


def test_what_needs_a_second_answer_is_compared_with_its_like() -> None:
    some, more, most = evaluation(True, False, False), evaluation(True, True, False), evaluation(True, True, True)
    others = [chosen("once", some), chosen("twice", most, extra="a second answer")]
    test = {"baseline": some, "random document": some}
    once = focus_table.findings([*others, chosen("ours", more, own=True)], test)
    assert "is once with 0.333" in once[-1].text
    twice = focus_table.findings([*others, chosen("ours", more, own=True, extra="a second answer")], test)
    assert "is twice with 1.000" in twice[-1].text
    assert twice[-1].verdict == "does not hold"


@pytest.mark.slow
def test_the_table_has_every_method_and_resumes(study: Study, monkeypatch: Any) -> None:
    made = focus.run(study)
    names = {row[1] for row in made.tables[0].rows}
    assert {"baseline", "gold", "negative", "random document", "DySCO", "SelfElicit", "AdaCAD"} <= names
    assert {"self-focus by heads", "self-focus by votes", "direction of rank 1 (U V^T q)"} <= names
    assert len(names) == len(made.tables[0].rows) == 26
    sink = focus._mean_sink(study, study.ranking[:2])

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("a finished table runs the model again")

    monkeypatch.setattr(focus, "_mean_sink", lambda *_: sink)
    monkeypatch.setattr(fl.FocusModel, "prefill", refuse)
    again = focus.run(study)
    assert (again.findings, again.tables) == (made.findings, made.tables)
