"""``focuslens focus``: settings by name, by file, or made from the options."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from focuslens.cli import focus
from focuslens.cli.main import main
from focuslens.studies.paper.settings import find_settings, load_settings
from tests.support.paper_runs import SETTINGS


def options(*given: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    focus.COMMAND.add_options(parser)
    return parser.parse_args(given)


def test_a_name_of_the_package_has_its_own_settings(paper_files: Path) -> None:
    assert focus._settings(options()) == load_settings(find_settings("demo-focus"))
    named = focus._settings(options("--model", "smollm2-135m-instruct"))
    assert named == load_settings(find_settings("smollm2-135m-instruct"))
    assert named.focus.questions == 200
    file = paper_files / "oracle.jsonl"
    made = focus._settings(options("--model", "org/model", "--data", str(file), "--documents", "5", "--test", "7"))
    assert (made.name, made.model) == ("model", "org/model")
    assert (made.data.file, made.data.documents, made.data.gold_positions) == ("oracle.jsonl", 5, (1, 3, 5))
    assert (made.data.test, made.data.every_position) == (7, False)
    with pytest.raises(ValueError, match="no settings in the package are called 'org/model'"):
        focus._settings(options("--model", "org/model"))


@pytest.mark.slow
def test_the_table_is_printed_and_kept(checkpoint: Any, paper_files: Path, tmp_path: Path, capsys: Any) -> None:
    file = tmp_path / "tiny.yaml"
    text = SETTINGS.format(model=checkpoint("llama"), file=paper_files / "oracle.jsonl", haystack=paper_files)
    file.write_text(text)
    arguments = ["focus", "--model", str(file), "--out", str(tmp_path / "out")]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "self-focus by votes" in printed
    assert "of others" in printed
    assert json.loads((tmp_path / "out" / "focus" / "artefact.json").read_text())["key"] == "focus"
    assert main(arguments) == 0
    assert capsys.readouterr().out == printed
