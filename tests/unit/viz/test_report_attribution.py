"""Reports on the documents that answers came from, and the page of a server while ``focuslens attribute`` runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from focuslens.cli.main import main
from focuslens.viz.run_report.live import LiveReport
from focuslens.viz.run_report.reading import read_run
from tests.support.pages import Elements, stands_alone

ROWS = [
    {
        "query": f"where is <{name}>?",
        "contexts": ["The river.", "The door."],
        "gold": 1,
        "response": f"At {name}.",
    }
    for name in ("Ada", "Ben", "Cem")
]


@pytest.fixture(scope="module")
def attributed(checkpoint: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a finished ``focuslens attribute``; the last answer is empty."""
    folder = tmp_path_factory.mktemp("attributed")
    rows = [*ROWS[:2], {**ROWS[2], "response": ""}]
    (folder / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "ranking.json").write_text(json.dumps({"heads": [[2, 1], [0, 3]]}))
    command = ["attribute", "--model", str(checkpoint("llama")), "--device", "cpu", "--data", str(folder / "own.jsonl")]
    command += ["--columns", "relevant=gold", "--response-column", "response", "--heads", str(folder / "ranking.json")]
    assert main([*command, "--top-k", "2", "--quiet", "--out", str(folder / "out")]) == 0
    return folder / "out"


@pytest.fixture
def folder(attributed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(attributed, tmp_path / "run" / "sources"))


def test_a_report_shows_every_answer_with_its_source(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(folder)]) == 0
    assert "left out" not in capsys.readouterr().out
    page = (folder / "report.html").read_text()
    assert stands_alone(page)
    text = Elements(page).text
    result = json.loads((folder / "attribution.json").read_text())
    assert "2 responses have a source." in text
    assert "1 responses are empty" in text
    assert "of the 2 answers whose relevant document is known" in text
    assert "own.jsonl: 3 of 3 rows, form columns, prompts" in text
    assert "Source of each of 3 given answers, by the heads L2H1, L0H3" in text
    for entry in result["samples"]:
        assert entry["question"] in text
        assert entry["response"] in text
        assert entry["share"] is None or f"{entry['share']:.3f}" in text
    assert "(empty)" in text
    for name in ("attribution.html", "attribution.csv"):
        assert f'href="{name}"' in page


def test_a_folder_of_several_commands_links_to_the_picture_below_it(folder: Path) -> None:
    assert main(["report", str(folder.parent)]) == 0
    assert 'href="sources/attribution.html"' in (folder.parent / "report.html").read_text()
    (folder / "attribution.html").unlink()
    assert main(["report", str(folder.parent)]) == 0
    assert "attribution.html" not in (folder.parent / "report.html").read_text()


def test_another_file_of_the_same_name_is_named(folder: Path) -> None:
    (folder / "attribution.json").write_text("{}")
    files = read_run(folder)
    assert files.attributions == ()
    assert [str(why) for _, why in files.unread] == ["it has no answers of focuslens attribute"]


def test_the_page_of_a_server_changes_when_the_command_ends(attributed: Path, tmp_path: Path) -> None:
    work, folder = tmp_path / "work", tmp_path / "out"
    work.mkdir()
    report = LiveReport(folder, work)
    report.refresh()
    assert b"There are no results" in report.html
    shutil.copytree(attributed, folder)
    assert report.refresh()
    assert b"There are no results" not in report.html
    assert b'href="/files/attribution.html"' in report.html
    assert report.file("/files/attribution.html") == folder / "attribution.html"
    assert report.file("/files/views/001.html") == folder / "views" / "001.html"
