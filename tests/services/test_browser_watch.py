"""The page of ``focuslens watch`` in a browser: it shows progress, and changes when results do."""

from __future__ import annotations

import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from focuslens.util.record_file import RecordFile
from focuslens.viz.run_report.live import LiveReport
from focuslens.viz.run_report.server import open_server
from tests.support.browser import Browser, chromium

SETTINGS = [{"name": name, "case": "long", "parameters": {}, "interventions": []} for name in ("baseline", "other")]
HEADER: dict[str, Any] = {"data": {"samples": 3}, "settings": SETTINGS, "seed": 1}


def record(name: str) -> dict[str, Any]:
    result = {"response": "x", "correct": True, "finished": True}
    results = {setting["name"]: result for setting in SETTINGS}
    return {"id": name, "question_id": name, "answers": ["x"], "results": results}


def wait_for(browser: Browser, text: str) -> None:
    for _ in range(200):
        if text in browser.driver.page_source:
            return
        time.sleep(0.1)
    raise TimeoutError(f"the page does not show {text!r}")


@pytest.fixture
def browser() -> Generator[Browser]:
    with chromium(local=True) as opened:
        yield opened


def test_the_page_changes_without_the_reader(browser: Browser, tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    report = LiveReport(tmp_path / "run", tmp_path / "work")
    with open_server(report, 0) as server:
        report.refresh()
        browser.open(server.url)
        wait_for(browser, "There are no results")
        file = RecordFile(tmp_path / "run" / "sweep.jsonl", HEADER)
        file.append([record("a")])
        wait_for(browser, "sweep.jsonl: 2 of 6 responses")  # by its script, before the report is built
        assert "There are no results" in browser.driver.page_source
        report.refresh()
        wait_for(browser, "1 of 3 samples are done")
        file.append([record("b"), record("c")])
        report.refresh()
        wait_for(browser, "On 3 samples of 3 questions")
        assert "responses, about" not in browser.driver.page_source
    wait_for(browser, "The server has ended")
