"""The paper's HELMET tables agree with values derived from its other tables, except for known deviations."""

from __future__ import annotations

import statistics

import pytest

from focuslens.studies.helmet.paper_values import ReportedRow, reported_rows
from focuslens.studies.helmet.tables import OVERALL
from focuslens.studies.helmet.tasks import TASKS
from tests.support.paths import PAPER

SETTINGS = {"20_-0.2", "10_-0.2", "20_0.2", "10_0.2", "baseline"}
CATEGORIES = ("Recall", "RAG", "Re-ranking", "ICL", "Long QA")


@pytest.fixture(scope="module")
def rows() -> list[ReportedRow]:
    return reported_rows()


def table(rows: list[ReportedRow], *numbers: int) -> dict[tuple[int, str, str], ReportedRow]:
    names = tuple(f"Table {number}" for number in numbers)
    chosen = [one for one in rows if one.source.removesuffix(" (left)").removesuffix(" (right)") in names]
    return {(one.length, one.model, one.setting): one for one in chosen}


def test_every_table_is_there_whole(rows):
    for number in (4, 5, 6, 7, 8, 9, 10, 11):
        assert len(table(rows, number)) == 25
    assert len(table(rows, 2)) == 50
    assert len(table(rows, 12)) == len(table(rows, 13)) == 5
    tasks = table(rows, 4, 5, 6, 7, 8)
    assert {length for length, _, _ in tasks} == {8192, 16384, 32768, 65536, 131072}
    assert {setting for _, _, setting in tasks} == SETTINGS
    for (_, model, _), row in tasks.items():
        instruct = "Instruct" in model
        assert len(row.values) == (16 if instruct else 14)  # base models have no long-document questions


def test_averages_are_means_of_the_tasks_and_the_overall_average_is_over_categories(rows):
    tasks, averages = table(rows, 4, 5, 6, 7, 8), table(rows, 2, 9, 10, 11)
    assert tasks.keys() == averages.keys()
    compared = 0
    for place, row in tasks.items():
        stated = averages[place].values
        for category in CATEGORIES:
            found = [row.values[one.name] for one in TASKS if one.category == category and one.name in row.values]
            assert bool(found) == (category in stated)
            if found:
                # Each value is rounded to two decimals.
                assert stated[category] == pytest.approx(statistics.fmean(found), abs=0.0101), (place, category)
                compared += 1
        over = [stated[category] for category in CATEGORIES if category in stated]
        assert stated[OVERALL] == pytest.approx(statistics.fmean(over), abs=0.0101), place
        compared += 1
    assert compared == 700


def test_standard_deviations_follow_from_the_rows_of_table_13_but_not_of_table_12(rows):
    def apart(row: ReportedRow) -> float:
        found = [row.values[task.name] for task in TASKS if task.name in row.values]
        return abs(statistics.stdev(found) - row.values["STD"])

    assert max(map(apart, table(rows, 13).values())) < 0.01
    assert min(map(apart, table(rows, 12).values())) > 0.1


def test_what_section_4_says_of_llama_under_8k_is_in_the_table_of_16k(rows):
    model = "Llama-3.2-3B-Instruct"
    for number, length, coarse, mean in ((12, 8192, 44.59, 27.46), (13, 16384, 53.52, 29.72)):
        values = table(rows, number)[length, model, ""].values
        assert values["TREC Coarse"] == coarse
        assert statistics.fmean(values[task.name] for task in TASKS) == pytest.approx(mean, abs=0.005)


def test_33_of_46_categories_improve_where_the_paper_says_34_of_48(rows):
    averages, better, every = table(rows, 2), 0, 0
    for (length, model, setting), row in averages.items():
        if setting == "baseline":
            others = [averages[length, model, other].values for other in SETTINGS - {"baseline"}]
            for category in row.values.keys() & set(CATEGORIES):
                every += 1
                better += any(other[category] > row.values[category] for other in others)
    assert (better, every) == (33, 46)


@pytest.mark.skipif(not PAPER.is_file(), reason="the paper's text is not beside the checkout")
def test_every_line_stands_in_the_papers_text(rows):
    text = set(PAPER.read_text().splitlines())
    columns = [*(task.name for task in TASKS), *CATEGORIES, OVERALL, "STD"]
    for row in rows:
        missing_allowed = "Long QA" in row.values or OVERALL not in row.values
        wanted = columns[:16] + (["STD"] if "STD" in row.values else [])
        if OVERALL in row.values:
            wanted = [*CATEGORIES, OVERALL]
        assert missing_allowed or row.model in ("Llama-3.2-3B", "Qwen2.5-7B")
        figures = " ".join(f"{row.values[one]:.2f}" if one in row.values else "-" for one in wanted)
        assert {f"{row.setting or row.model} {figures}", f"Qwen_{row.model} {figures}"} & text, row
