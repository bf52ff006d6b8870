"""A reproduction of the paper from end to end on a small random model, its resumption, and its summary sentences."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest

import focuslens as fl
from focuslens.evaluation import Setting, Sweep, bootstrap_mean
from focuslens.studies.paper import artefact as kept
from focuslens.studies.paper import chosen_settings, run, study
from focuslens.studies.paper.settings import load_settings
from focuslens.viz import Table, sweep_table
from tests.support.paper_runs import opened


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "qwen2", "mistral_window"])
def test_everything_runs_on_another_family_and_real_files(
    name: str, checkpoint: Any, paper_files: Path, tmp_path: Path
):
    said: list[str] = []
    shown = run.reproduce(opened(tmp_path, paper_files, checkpoint(name)), say=said.append)
    assert [one.key for one in shown] == list(run.ARTEFACTS)
    page = (tmp_path / "out" / "index.html").read_text()
    for one in shown:
        assert one.findings, one.key
        assert one.tables or one.key == "retrieval"
        assert f'id="{one.key}"' in page
        for place, table in enumerate(one.tables, start=1):
            with (tmp_path / "out" / one.key / f"table_{place}.csv").open(newline="") as file:
                columns, *rows = csv.reader(file)
            assert tuple(columns) == table.columns
            assert [tuple(row) for row in rows] == [tuple(str(cell) for cell in row) for row in table.rows]
        for _, picture in one.figures:
            assert (tmp_path / "out" / one.key / picture).stat().st_size > 1000
            with (tmp_path / "out" / one.key / picture).with_suffix(".csv").open(newline="") as file:
                assert len({len(row) for row in csv.reader(file)}) == 1
            assert f'href="{one.key}/{Path(picture).stem}.csv"' in page
    assert page.count('class="reported"') == 7
    assert page.count("<img") == sum(len(one.figures) for one in shown)
    assert not [line for line in said if "already" in line]


@pytest.fixture
def finished(checkpoint: Any, paper_files: Path, tmp_path: Path) -> study.Study:
    made = opened(tmp_path, paper_files, checkpoint("llama"))
    run.reproduce(made, ["heads", "split_softmax"])
    return made


def test_what_is_finished_is_read_and_shown(finished: study.Study, checkpoint: Any, paper_files: Path, tmp_path: Path):
    before = (tmp_path / "out" / "index.html").read_bytes()
    said: list[str] = []
    shown = run.reproduce(
        opened(tmp_path, paper_files, checkpoint("llama")), ["heads", "split_softmax"], say=said.append
    )
    assert said == ["heads: already there", "split_softmax: already there"]
    assert [one.key for one in shown] == ["heads", "split_softmax"]
    assert (tmp_path / "out" / "index.html").read_bytes() == before


def test_what_was_made_otherwise_is_made_again(
    finished: study.Study, checkpoint: Any, paper_files: Path, tmp_path: Path
):
    other = opened(tmp_path, paper_files, checkpoint("mistral"))
    said: list[str] = []
    shown = run.reproduce(other, ["heads"], say=said.append)
    assert said[0] == "heads ..."
    # The split-softmax artefact belongs to the first model, so it is not shown.
    assert [one.key for one in shown] == ["heads"]
    # Heads are computed again only if a setting that they depend on changes.
    file = tmp_path / "tiny.yaml"
    text = file.read_text()
    for change, word in ((("ks: [1, 3, 500]", "ks: [1]"), "already"), (("model:", "scores: {top: 2}\nmodel:"), "...")):
        file.write_text(text.replace(*change))
        said.clear()
        run.reproduce(study.Study(load_settings(file), tmp_path / "out", progress=False), ["heads"], say=said.append)
        assert word in said[0]


def test_an_unknown_artefact_is_refused(checkpoint: Any, paper_files: Path, tmp_path: Path):
    with pytest.raises(ValueError, match="no artefact 'figure_1'; there are heads, split_softmax"):
        run.reproduce(opened(tmp_path, paper_files, checkpoint("llama")), ["figure_1"])


def test_parts_are_disjoint_and_as_large_as_asked_for(checkpoint: Any, paper_files: Path, tmp_path: Path):
    made = opened(tmp_path, paper_files, checkpoint("llama"))
    parts = {part: made.samples(part) for part in ("train", "validation", "test")}
    assert {part: len(samples) for part, samples in parts.items()} == {"train": 3, "validation": 2, "test": 4}
    ids = [sample.question_id for samples in parts.values() for sample in samples]
    assert len(set(ids)) == len(ids)
    # Test questions belong to the paper's test half.
    half = fl.load_multidoc(paper_files / "oracle.jsonl", num_documents=3, gold_positions=(0, 2)).split()[1]
    assert {sample.question_id for sample in parts["test"]} <= {sample.question_id for sample in half}


# --- choice of settings ---


def made_up(right: dict[str, int], parameters: dict[str, dict[str, Any]]) -> tuple[Sweep, list[Setting]]:
    """A sweep over 40 questions. ``right`` is the number of correct answers per setting."""
    names = tuple(str(i) for i in range(40))

    def evaluation(n: int) -> fl.Evaluation:
        correct = tuple(i < n for i in range(40))
        return fl.Evaluation(names, names, names, correct, bootstrap_mean([float(one) for one in correct]))

    settings = [Setting(name, parameters=parameters.get(name, {})) for name in right]
    return Sweep(tuple(settings), {name: evaluation(n) for name, n in right.items()}, {}), settings


GRID = {"a": {"alpha": 2.0, "k": 1}, "b": {"alpha": -1.0, "k": 8}, "c": {"alpha": -1.0, "k": 4}}


def test_the_setting_is_chosen_on_validation_and_reported_on_test():
    validation, settings = made_up({"baseline": 10, "a": 20, "b": 25, "c": 25}, GRID)
    test, _ = made_up({"baseline": 12, "a": 30, "b": 28, "c": 20}, GRID)
    table, chosen = chosen_settings.chosen_table(validation, test, settings[1:])
    assert chosen.name == "c"  # as good as b, with fewer heads
    assert [(row[1], row[2]) for row in table.rows] == [("baseline", 0.3), ("c", 0.5), ("a", 0.75)]
    assert table.rows[1][5:7] == (8, 0)


def test_a_sweeps_table_has_all_digits():
    sweep, _ = made_up({"baseline": 12, "a": 25}, GRID)
    rows = {row[0]: row[1:] for row in sweep_table("c", sweep).rows}
    assert rows["a"][:3] == (25 / 40, sweep["a"].em.low, sweep["a"].em.high)
    assert rows["a"][3:] == (13, 0, pytest.approx(2 * 0.5**13, rel=1e-12))
    assert rows["baseline"][3:] == (0, 0, 1.0)


@pytest.mark.parametrize(
    ("n", "higher", "expected"),
    [(30, True, "holds"), (30, False, "does not hold"), (2, False, "holds"), (13, True, "cannot be told")],
)
def test_verdicts_need_an_exact_test(n: int, higher: bool, expected: str):
    sweep, _ = made_up({"baseline": 12, "a": n}, GRID)
    assert chosen_settings.verdict_of(sweep, "a", higher=higher) == expected


def test_random_heads_come_before_contextual_ones():
    heads = [fl.Head(0, i) for i in range(10)]
    order = chosen_settings.random_order(heads, 3, seed=1)
    assert set(order[:7]) == set(heads[3:])
    assert order[:7] != heads[3:]
    assert sorted(order) == heads
    assert chosen_settings.possible([1, 5, 20], 10) == [1, 5]
    assert chosen_settings.possible([50, 20], 10) == [10]


def test_an_artefact_survives_its_file(tmp_path: Path):
    table = Table("c", ("x", "y"), (("a", 1.25), ("b", 2)))
    made = kept.Artefact("k", "t", "p", (kept.Finding("f", "holds"),), (("c", "p.png"),), (table,), (table,))
    kept.save_artefact(tmp_path, made, {"seed": 1})
    assert kept.load_artefact(tmp_path, {"seed": 1}) is None  # the picture is not drawn
    (tmp_path / "p.png").touch()
    assert kept.load_artefact(tmp_path, {"seed": 1}) == made
    assert kept.load_artefact(tmp_path, {"seed": 2}) is None
    assert kept.load_artefact(tmp_path / "nowhere", {"seed": 1}) is None
    assert (tmp_path / "table_1.csv").read_text() == "x,y\na,1.25\nb,2\n"
