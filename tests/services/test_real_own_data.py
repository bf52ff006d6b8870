"""Tables in every form that ``load_samples`` reads, from a file to heads, sources of answers and a report.

The model is SmolLM2-135M-Instruct, which answers the short questions of these files from their documents.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from focuslens.cli.main import main
from tests.support import own_files

pytestmark = [pytest.mark.download, pytest.mark.slow]

ROWS = [
    ("what colour is the door?", "The door is red.", "The window is grey.", "red", 0),
    ("what is the toll?", "The tunnel is closed.", "The toll is two crowns.", "two crowns", 1),
]
COLUMNS = "question=query,documents=doc1+doc2,answers=answer,relevant=gold"
NAMES = ("query", "doc1", "doc2", "answer", "gold")


def _csv(path: Path) -> None:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([NAMES, *ROWS])


def _parquet(path: Path) -> None:
    import pandas as pd

    pd.DataFrame(ROWS, columns=list(NAMES)).to_parquet(path)


def _lines(rows: list[Any]) -> Callable[[Path], Any]:
    return lambda path: path.write_text("".join(json.dumps(row) + "\n" for row in rows))


FORMS: dict[str, tuple[str, Callable[[Path], Any], list[str], int]] = {
    "jsonl": ("a.jsonl", _lines([dict(zip(NAMES, row, strict=True)) for row in ROWS]), ["--columns", COLUMNS], 2),
    "csv": ("a.csv", _csv, ["--columns", COLUMNS], 2),
    "parquet": ("a.parquet", _parquet, ["--columns", COLUMNS], 2),
    "HotpotQA": ("a.jsonl", _lines(own_files.HOTPOTQA), [], 2),
    "SQuAD": ("a.json", lambda path: path.write_text(json.dumps(own_files.SQUAD)), [], 3),
    "KILT": ("a.jsonl", _lines([*own_files.KILT, *own_files.KILT_EVIDENCE]), [], 2),
    "RGB": ("a.jsonl", _lines(own_files.RGB), [], 3),
}
"""File name, writer, options and number of samples of each form."""


@pytest.mark.parametrize("form", FORMS)
def test_a_file_goes_to_heads_to_sources_and_to_a_report(form: str, real_model: Any, tmp_path: Path) -> None:
    name, write, options, n = FORMS[form]
    data = tmp_path / name
    write(data)
    model = ["--model", str(real_model("smollm2-135m-instruct")[1]), "--device", "cpu", "--max-new-tokens", "12"]
    common = [*model, "--data", str(data), *options, "--split", "all"]
    heads, sources = tmp_path / "heads", tmp_path / "sources"

    assert main(["heads", *common, "--out", str(heads)]) == 0
    ranking = json.loads((heads / "heads.json").read_text())
    assert len(ranking["samples"]) == n
    assert len(ranking["heads"]) == 30 * 9

    assert main(["attribute", *common, "--heads", str(heads / "heads.json"), "--out", str(sources)]) == 0
    found = json.loads((sources / "attribution.json").read_text())
    assert len(found["samples"]) == n
    assert (sources / "attribution.html").read_text().count('<article class="card"') == n
    # The heads were ranked on the same answers, so that they find most of the documents.
    assert found["known"]["accuracy"]["mean"] > 0.6

    for folder in (heads, sources):
        assert main(["report", str(folder), *model[2:4], "--data", str(data), "--views", "1"]) == 0
    assert "Contextual heads" in (heads / "report.html").read_text()
    page = (sources / "report.html").read_text()
    assert "Documents that the answers came from" in page
    assert f"Source of each of {n} generated answers" in page
    assert 'href="attribution.html"' in page
