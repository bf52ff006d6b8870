"""The paper's tables computed from scores, against hand-computed values.

Intervals are checked by explicit resampling.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from focuslens.studies.helmet.page import Grid, GridCell, grids_of, markdown, to_html
from focuslens.studies.helmet.paper_values import reported_rows
from focuslens.studies.helmet.results import TaskScores
from focuslens.studies.helmet.tables import OVERALL, length_tables, tidy_rows
from focuslens.studies.helmet.tasks import NEEDLE_QA, TASKS
from focuslens.util.statistics import bootstrap_mean, percentile_interval, resampled_means

BY_NAME = {task.name: task for task in (*TASKS, NEEDLE_QA)}
NAN = float("nan")


def scores(name: str, length: int, base: Sequence[float], steered: Sequence[float], **more: Any) -> TaskScores:
    questions = more.pop("questions", [str(i) for i in range(len(base))])
    return TaskScores(
        BY_NAME[name], length, tuple(questions), {"baseline": tuple(base), "10_0.2": tuple(steered)}, **more
    )


@pytest.fixture
def given() -> list[TaskScores]:
    """Scores of two recall tasks and one retrieval task at one length, and of one of these tasks at a second length."""
    return [
        scores("NQ", 8192, [0, 100, 100, 0, 100, 0], [0, 100, 100, 0, 0, 0], questions=list("aabbcc"), sinks={}),
        scores("MK Needle", 8192, [100, 100, 0, 0], [100, 100, 100, 0], sinks={"baseline": (10, 20, 30, NAN)}),
        scores("MV", 8192, [50, 75], [50, 75], sinks={"baseline": (40, 60), "10_0.2": (1, 3)}, truncated=1),
        scores("MV", 16384, [25, 25], [100, 100], sinks={}),
    ]


def test_columns_averages_and_differences(given):
    short, long = length_tables(given, ["10_0.2", "baseline"])
    assert (short.length, long.length) == (8192, 16384)
    assert short.tasks == ("MK Needle", "MV", "NQ")
    assert short.averages == ("Recall", "RAG", OVERALL)
    assert long.averages == ("Recall", OVERALL)

    def means(setting: str) -> list[float]:
        return [short.cells[setting, column].score.mean for column in (*short.tasks, *short.averages)]

    assert means("baseline") == [50, 62.5, 50, 56.25, 50, 53.125]
    assert means("10_0.2") == pytest.approx([75, 62.5, 100 / 3, 68.75, 100 / 3, (68.75 + 100 / 3) / 2])
    gains = [short.cells["10_0.2", column].difference for column in (*short.tasks, *short.averages)]
    assert [one and one.mean for one in gains] == pytest.approx([25, 0, -50 / 3, 12.5, -50 / 3, (12.5 - 50 / 3) / 2])
    marks = [short.cells["10_0.2", column].mark for column in (*short.tasks, *short.averages)]
    assert marks == ["better", "same", "worse", "better", "worse", "worse"]
    assert all(short.cells["baseline", column].mark == "" for column in short.tasks)
    assert long.cells["10_0.2", "MV"].certain
    assert not any(short.cells["10_0.2", column].certain for column in short.tasks)
    assert short.samples == {"MK Needle": 4, "MV": 2, "NQ": 6}
    assert short.truncated == {"MV": 1}


def test_what_is_no_difference_as_printed_is_not_marked():
    (table,) = length_tables([scores("MV", 1, [0] * 1000, [0] * 999 + [4], sinks={})], ["baseline", "10_0.2"])
    assert table.cells["10_0.2", "MV"].difference == pytest.approx(0.004)
    assert table.cells["10_0.2", "MV"].mark == "same"


def test_an_interval_of_one_task_is_that_of_its_questions():
    one = scores("NQ", 1, [0, 100, 100, 100, 0, 0], [0, 100, 0, 0, 0, 0], questions=list("aabbcc"), sinks={})
    (table,) = length_tables([one], ["baseline", "10_0.2"])
    found = table.cells["10_0.2", "NQ"].difference
    assert found is not None
    # Question b loses both of its samples. All three drawn questions are b with probability 1/27, and none is b with
    # 8/27.
    assert (found.mean, found.low, found.high) == pytest.approx((-100 / 3, -100, 0))


def test_tasks_are_not_resampled_alike():
    values = list(np.random.default_rng(1).random(50) * 100)
    given = [scores(name, 1, values, values, sinks={}) for name in ("MK Needle", "MK UUID")]
    (table,) = length_tables(given, ["baseline", "10_0.2"])
    one, average = table.cells["baseline", "MK Needle"].score, table.cells["baseline", "Recall"].score
    # The mean of two independent tasks has half the variance of one task.
    assert (average.high - average.low) / (one.high - one.low) == pytest.approx(2**-0.5, rel=0.05)


def test_an_interval_of_an_average_is_that_of_tasks_resampled_apart():
    rng = np.random.default_rng(0)
    base = {name: rng.random(n) * 100 for name, n in (("MK Needle", 40), ("MK UUID", 40), ("NQ", 25))}
    steered = {name: values + rng.normal(3, 20, len(values)) for name, values in base.items()}
    given = [scores(name, 1, list(base[name]), list(steered[name]), sinks={}) for name in base]
    (table,) = length_tables(given, ["baseline", "10_0.2"])
    drawn: list[float] = []
    for _ in range(4000):  # explicit resampling
        means = {name: rng.choice(steered[name] - base[name], len(base[name])).mean() for name in base}
        drawn.append(((means["MK Needle"] + means["MK UUID"]) / 2 + means["NQ"]) / 2)
    found = table.cells["10_0.2", OVERALL].difference
    assert found is not None
    assert found.mean == pytest.approx(
        statistics.fmean([statistics.fmean([gain(base, steered, "MK Needle"), gain(base, steered, "MK UUID")]),
                          gain(base, steered, "NQ")])
    )  # fmt: skip
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(drawn, [0.025, 0.975])), abs=0.35)


def gain(base: Any, steered: Any, name: str) -> float:
    return float((steered[name] - base[name]).mean())


def test_draws_are_those_of_the_interval():
    values, groups = [1.0, 0.0, 4.0, 2.0], ["a", "a", "b", "c"]
    draws = resampled_means(values, groups=groups, seed=3)
    assert percentile_interval(1.75, draws) == bootstrap_mean(values, groups=groups, seed=3)
    assert not np.array_equal(draws, resampled_means(values, groups=groups, seed=(3, 1)))
    with pytest.raises(ValueError, match="confidence is 1"):
        percentile_interval(1.75, draws, confidence=1)
    with pytest.raises(ValueError, match="resamples is 0"):
        resampled_means(values, resamples=0)


def test_sink_scores_and_their_standard_deviation_over_tasks(given):
    short, long = length_tables(given, ["baseline", "10_0.2"])
    assert short.sinks["baseline", "MK Needle"].mean == 20  # an empty response has no score
    assert short.sinks["baseline", "MV"].mean == 50
    assert ("10_0.2", "MK Needle") not in short.sinks
    assert short.sink_std("baseline") == pytest.approx(statistics.stdev([20, 50]))
    assert short.sink_std("10_0.2") is None
    assert not long.sinks


def test_a_task_in_two_forms_at_one_length_is_refused(given):
    with pytest.raises(ValueError, match="MV was run twice at 8192 tokens"):
        length_tables([*given, given[2]], ["baseline", "10_0.2"])


def test_every_figure_is_a_row_for_machines(given):
    short, _ = length_tables(given, ["baseline", "10_0.2"])
    rows = {(row["setting"], row["column"]): row for row in tidy_rows(short)}
    assert len(rows) == 2 * 6
    row = rows["10_0.2", "MK Needle"]
    assert (row["length"], row["samples"], row["score"], row["difference"]) == (8192, 4, 75, 25)
    assert (row["against_baseline"], row["certain"], row["sink"]) == ("better", False, "")
    assert rows["baseline", "MV"]["sink"] == 50
    assert rows["baseline", "Recall"]["difference"] == rows["baseline", "Recall"]["samples"] == ""


def test_the_papers_figures_of_the_same_model_and_length_stand_below_ours(given):
    short, long = length_tables(given, ["baseline", "10_0.2"])
    reported = reported_rows()
    tasks, averages, sinks = grids_of(short, "meta-llama/Llama-3.2-3B-Instruct", reported)
    ours = {label: cells for label, cells, paper in tasks.rows if not paper}
    papers = {label: cells for label, cells, paper in tasks.rows if paper}
    assert [cell.text for cell in ours["10_0.2"]] == ["75.00", "62.50", "33.33"]
    assert [cell.mark for cell in ours["10_0.2"]] == ["better", "same", "worse"]
    assert re.fullmatch(r"\+25\.00 \[\+0\.00, \+\d\d\.00\]", ours["10_0.2"][0].detail)
    assert [cell.text for cell in papers["Table 4: 10_0.2"]] == ["99.00", "99.00", "58.00"]
    assert len(papers) == 5
    # Each row of the paper is below the run's row of the same setting, and is marked against the paper's baseline.
    # Settings that were not run come last.
    assert [label for label, *_ in tasks.rows[:5]] == [
        "baseline",
        "Table 4: baseline",
        "10_0.2",
        "Table 4: 10_0.2",
        "Table 4: 20_-0.2",
    ]
    found = [(cell.detail, cell.mark) for cell in papers["Table 4: 10_0.2"]]
    assert found == [("-1.00", "worse"), ("+0.00", "same"), ("+2.67", "better")]
    assert all((cell.detail, cell.mark) == ("", "") for cell in papers["Table 4: baseline"])
    assert "(HELMET cut the context of 1 of 2 of MV)" in tasks.caption
    assert averages.caption.endswith("(over the tasks of this run: 3 of the paper's 16)")
    # The averages cover the tasks of this run: needles 100 and 99, questions 55.33.
    assert [
        [cell.text for cell in cells] for label, cells, _ in averages.rows if label == "Table 4, these tasks: baseline"
    ] == [["99.50", "55.33", f"{(99.5 + 55.33) / 2:.2f}"]]
    assert [cell.text for cell in sinks.rows[0][1]] == ["20.00", "50.00", "-", "21.21"]
    assert [label for label, *_ in sinks.rows] == ["baseline", "Table 12", "10_0.2"]
    assert [cell.text for cell in sinks.rows[1][1]] == ["32.53", "23.01", "22.28", "9.33"]
    assert [len(grid.rows) for grid in grids_of(long, "meta-llama/Llama-3.2-3B-Instruct", reported)] == [7, 7]
    assert [len(grid.rows) for grid in grids_of(short, "someone/else", reported)] == [2, 2, 2]


def test_where_all_tasks_were_run_the_papers_averages_are_those_that_it_states():
    fourteen = [scores(task.name, 8192, [0, 100], [0, 100], sinks={}) for task in TASKS[:14]]
    (table,) = length_tables(fourteen, ["baseline", "10_0.2"])
    _, averages = grids_of(table, "/models/Llama-3.2-3B", reported_rows())  # without long-document tasks
    assert averages.caption.endswith("(over the tasks of this run, without Infbench QA, Infbench MC)")
    label, cells, _ = averages.rows[1]
    assert label == "Table 9: baseline"
    assert [cell.text for cell in cells] == ["90.62", "61.46", "43.52", "64.40", "65.00"]
    (table,) = length_tables(fourteen[1:], ["baseline", "10_0.2"])
    _, averages = grids_of(table, "Llama-3.2-3B", reported_rows())
    label, cells, _ = averages.rows[1]
    assert label == "Table 4, these tasks: baseline"
    assert [cell.text for cell in cells[1:4]] == ["61.46", "43.52", "64.40"]
    assert cells[0].text == f"{(99 + 65.5 + 99) / 3:.2f}"


GRIDS = [
    Grid(
        "A <b>",
        ("setting", "NQ"),
        (
            ("10_0.2", (GridCell("56.00", "+3.00 [+1.00, +5.00]", "better", True),), False),
            ("20_0.2", (GridCell("50.00", "-3.00 [-9.00, +5.00]", "worse"),), False),
            ("Table 4: 10_0.2", (GridCell("58.00"),), True),
        ),
    )
]


def test_markdown():
    text = markdown("HELMET", {"seed": "42"}, GRIDS)
    assert "| setting | NQ |\n| --- | --- |\n| 10_0.2 | 56.00 +3.00 [+1.00, +5.00] ▲* |\n" in text
    assert "| 20_0.2 | 50.00 -3.00 [-9.00, +5.00] ▼ |\n| *Table 4: 10_0.2* | 58.00 |\n" in text
    assert "- seed: 42\n" in text


def test_the_page_marks_cells_and_holds_all_of_the_papers_tables():
    html = to_html("HELMET <1>", {"seed": "4<2"}, GRIDS, reported_rows(), [8192])
    assert '<td class="number better certain">56.00 ▲*<small>+3.00<br>[+1.00, +5.00]</small></td>' in html
    assert '<td class="number worse">50.00 ▼<small>' in html
    assert '<tr class="reported"><th>Table 4: 10_0.2</th><td class="number">58.00</td></tr>' in html
    for number in (2, *range(4, 14)):
        what = "sink scores in percent" if number > 11 else "tasks" if 3 < number < 9 else "averages"
        assert re.search(rf"<caption>Table {number}( \(left\)| \(right\))? of arXiv 2503.23306: {what}</caption>", html)
    found = re.findall(r"<caption>Table (\d+) of", html.split("<details")[1])  # open section of the shortest length
    assert found == ["4", "9", "12"]
    assert html.count("<details open>") == 1
    assert "<details open><summary>8,192 tokens" in to_html("HELMET", {}, GRIDS, reported_rows(), [768])
    assert "A &lt;b&gt;" in html
    assert "4&lt;2" in html
    assert "HELMET &lt;1&gt;" in html
    assert "http" not in html.replace("Content-Security-Policy", "").replace("http-equiv", "")
