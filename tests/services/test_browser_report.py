"""A report opened from disk in a real browser without network access: on a screen, on a phone, and in dark mode."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from focuslens.viz import Table, write_report
from focuslens.viz.report import Section, write_sections
from focuslens.viz.run_report import Sources, write_run_report

if TYPE_CHECKING:
    from tests.support.browser import Browser

ROWS = (("b10", 0.5, "0.725 [0.575, 0.850]", "3.2e-05"), ("B9", -1.25, "0.05 [0, 1]", "-"), ("a", 12.0, "0.9", "1"))


@pytest.fixture(scope="module")
def report(recorded_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Report page of a run of every command."""
    folder = tmp_path_factory.mktemp("reported") / "run"
    shutil.copytree(recorded_run / "out", folder)
    page, missing = write_run_report(folder, sources=Sources(data=recorded_run / "oracle.jsonl", views=1))
    assert missing == []
    return page


@pytest.fixture
def tables(tmp_path: Path) -> Path:
    """A page with two identical tables."""
    table = Table("Numbers", ("name", "value", "interval", "p"), ROWS)
    return write_report(tmp_path / "t.html", title="T", facts={}, findings=["x"], tables=[table, table])


@pytest.mark.parametrize(("width", "height"), [(1200, 900), (390, 800)])
@pytest.mark.parametrize("dark", [False, True])
def test_it_opens_from_disk_on_every_screen(browser: Browser, report: Path, width: int, height: int, dark: bool):
    browser.open(report, width=width, height=height, dark=dark)
    browser.until(lambda: len(browser.all("iframe")) == 6)
    assert browser.overflow() <= 0
    background = browser.run("return getComputedStyle(document.body).backgroundColor")
    assert background == ("rgb(18, 22, 26)" if dark else "rgb(251, 251, 249)")
    ink = np.array([int(one) for one in browser.run("return getComputedStyle(document.body).color")[4:-1].split(",")])
    assert (ink.mean() > 200) == dark
    # A view is as high as its content, but not higher than the window, and it fits its frame's width.
    first = browser.one("iframe")
    browser.run("arguments[0].scrollIntoView()", first)
    browser.until(lambda: first.rect["height"] not in (150, 900) and first.rect["height"] > 300)
    browser.driver.switch_to.frame(first)
    assert browser.overflow() <= 0
    # The status line describes the token under the pointer. It is at the view's lower end, which must be visible.
    browser.until(
        lambda: browser.run("return document.querySelector('.status').getBoundingClientRect().bottom - innerHeight") < 1
    )
    browser.driver.switch_to.default_content()
    assert first.rect["height"] <= browser.run("return innerHeight")
    assert browser.problems() == []


def test_figures_are_drawn_and_their_numbers_lie_beside(browser: Browser, report: Path):
    browser.open(report)
    figures = browser.all("figure img")
    assert len(figures) == 4
    for figure in figures:
        assert browser.run("return arguments[0].naturalWidth", figure) > 300
        assert figure.get_attribute("alt")
    # The heatmap of heads contains the darkest and lightest colour of its colour map, and red outlines.
    browser.run("arguments[0].scrollIntoView({block: 'center'})", figures[0])
    picture = browser.picture(figures[0])
    for colour in ([0, 34, 78], [254, 232, 56], [176, 0, 32]):
        assert (np.abs(picture - colour).max(axis=-1) < 30).sum() > 50, colour
    links = [link.get_attribute("href") for link in browser.all("a") if "numbers of this figure" in link.text]
    assert len(links) == 4
    for link in links:
        browser.driver.get(link)
        assert "layer" in browser.one("body").text or "," in browser.one("body").text
    browser.problems()


def names(browser: Browser, table: int = 0) -> list[str]:
    rows = browser.all("table")[table].find_elements("css selector", "tbody tr td:first-child")
    return [row.text for row in rows]


def heading(browser: Browser, place: int, table: int = 0):
    return browser.all("table")[table].find_elements("css selector", "thead th")[place]


@pytest.mark.parametrize(
    ("column", "first", "second"),
    [
        (0, ["a", "B9", "b10"], ["b10", "B9", "a"]),  # natural sort order of names
        (1, ["a", "b10", "B9"], ["B9", "b10", "a"]),  # the largest value first
        (2, ["a", "b10", "B9"], ["B9", "b10", "a"]),  # by the number before the interval
        (3, ["a", "b10", "B9"], ["b10", "a", "B9"]),  # missing values stay last
    ],
)
def test_tables_sort_by_a_click_and_back(browser: Browser, tables: Path, column: int, first: list, second: list):
    browser.open(tables)
    assert names(browser) == ["b10", "B9", "a"]
    button = heading(browser, column).find_element("css selector", "button")
    button.click()
    assert names(browser) == first
    assert heading(browser, column).get_attribute("aria-sort") == ("ascending" if column == 0 else "descending")
    button.click()
    assert names(browser) == second
    assert names(browser, 1) == ["b10", "B9", "a"]  # the second table is unchanged
    assert browser.problems() == []


def test_tables_sort_by_keyboard(browser: Browser, tables: Path):
    browser.open(tables)
    browser.run("arguments[0].focus()", heading(browser, 1).find_element("css selector", "button"))
    browser.press("enter")
    assert names(browser) == ["a", "b10", "B9"]
    browser.run("arguments[0].focus()", heading(browser, 0).find_element("css selector", "button"))
    browser.press("space")
    assert names(browser) == ["a", "B9", "b10"]
    assert [heading(browser, i).get_attribute("aria-sort") for i in (0, 1)] == ["ascending", None]


def test_a_table_of_the_report_sorts(browser: Browser, report: Path):
    browser.open(report)
    table = next(i for i, one in enumerate(browser.all("table")) if "steering alpha=2 k=3" in one.text)
    assert names(browser, table)[0] == "baseline"
    heading(browser, 1, table).find_element("css selector", "button").click()
    assert names(browser, table)[:2] == ["steering alpha=2 k=3", "baseline"]
    assert browser.problems() == []


def test_the_views_in_it_work(browser: Browser, report: Path):
    browser.open(report)
    frame = browser.one("iframe")
    browser.run("arguments[0].scrollIntoView()", frame)
    browser.driver.switch_to.frame(frame)
    browser.until(lambda: browser.all("option"))
    heads = [option.text for option in browser.all("#head option")]
    assert heads[0] == "mean of 3 heads"

    def pointed_at() -> bool:  # retried, because the page may still be resizing its frames
        browser.hover_inside(frame, ".text .marked b")
        return browser.text("#status").startswith("baseline: “")

    browser.until(pointed_at)
    assert f"of the attention of {heads[0]}" in browser.text("#status")
    browser.choose("#head", heads[2])
    assert f"of the attention of {heads[2]}" in browser.text("#status")
    browser.driver.switch_to.default_content()
    circuits = browser.all("iframe")[1]
    browser.run("arguments[0].scrollIntoView()", circuits)
    browser.driver.switch_to.frame(circuits)
    browser.until(lambda: len(browser.all("canvas")) == 4)
    browser.driver.switch_to.default_content()
    browser.until(lambda: circuits.rect["height"] > 600)
    assert browser.problems() == []


@pytest.mark.parametrize("width", [1100, 400])
@pytest.mark.parametrize("n_rows", [3, 40], ids=["short", "long"])
def test_the_caption_of_a_wide_table_stays_in_sight(browser: Browser, tmp_path: Path, width: int, n_rows: int):
    columns = tuple(f"column {i}" for i in range(30))
    table = Table("word " * 150, columns, tuple(("value-of-a-cell",) * 30 for _ in range(n_rows)))
    section = Section("wide", "Wide", tables=(table,))
    browser.open(write_sections(tmp_path / "w.html", title="T", facts={}, sections=[section]), width=width)
    scrolling = browser.one(".long" if n_rows > 24 else ".scroll")
    for _ in range(2):
        left, right = browser.run(
            "const r = document.querySelector('caption').getBoundingClientRect(); return [r.left, r.right]"
        )
        assert 0 <= left < right <= width
        assert right - left > 0.8 * width
        browser.run("arguments[0].scrollLeft = 300", scrolling)
        assert browser.run("return arguments[0].scrollLeft", scrolling) == 300
    assert browser.run("return arguments[0].scrollWidth > arguments[0].clientWidth", scrolling)
    assert browser.overflow() <= 0
