"""Tables of the page on focus, from a table as the study makes it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import focus_page
import pytest
from real_models_page import filled

from focuslens.evaluation import Setting, bootstrap_mean
from focuslens.evaluation.sweeps import Evaluation
from focuslens.interventions import SelfFocus
from focuslens.studies.paper.artefact import Artefact, save_artefact
from focuslens.studies.paper.focus_families import Family
from focuslens.studies.paper.focus_table import Chosen, findings, table_of
from focuslens.viz import Table


def evaluation(*correct: bool) -> Evaluation:
    ids = tuple(map(str, range(len(correct))))
    return Evaluation(ids, ids, ("",) * len(correct), correct, bootstrap_mean([float(one) for one in correct]))


@pytest.fixture
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    some, more = evaluation(True, False, False, False), evaluation(True, True, True, False)
    setting = Setting("a", (SelfFocus([(0, 0)], 0.1),), parameters={"setting": "tau=0.1 k=5"})
    chosen = [Chosen(Family("self-focus", (setting,), "question rows", own=True), setting, more, more)]
    test = {"a": more, **dict.fromkeys(("baseline", "gold", "negative", "random document"), some)}
    tables = (
        table_of(chosen, test, {"a": 1.25, "baseline": 1.0}, {"a": 0.75}),
        Table("", ("rows", "log share"), (("the question", -0.5), ("an answer", "-"))),
    )
    artefact = Artefact("focus", "Focus", "", tuple(findings(chosen, test)), (), tables)
    save_artefact(tmp_path / "run", artefact, {})
    (tmp_path / "demo-focus").mkdir()
    (tmp_path / "demo-focus" / "focus.json").write_text((tmp_path / "run" / "artefact.json").read_text())
    monkeypatch.setattr(focus_page, "RESULTS", tmp_path)


@pytest.mark.usefixtures("published")
def test_the_tables_have_the_numbers_of_the_artefact(capsys: Any) -> None:
    made = focus_page.tables()
    assert list(made) == ["demo-focus-methods", "demo-focus-choosers", "demo-focus-findings"]
    row = "| self-focus | tau=0.1 k=5 | 0.750 [0.250, 1.000] | 2, 0 | 0.5 | question rows | 0.750 | 0.250 |"
    assert row in made["demo-focus-methods"].splitlines()
    assert "| the question | -0.500 |" in made["demo-focus-choosers"]
    assert made["demo-focus-findings"].startswith("- *does not hold*: Without a label, self-focus")
    page = "<!-- table: demo-focus-methods --> old <!-- end -->"
    assert row in filled(page, made)
    focus_page.main([])
    assert row in capsys.readouterr().out
    assert json.loads(json.dumps(made)) == made
