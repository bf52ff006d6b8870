"""Destinations of notes, warnings and results, with ``--verbose``, with ``--quiet``, and when called from Python."""

from __future__ import annotations

import argparse
import logging
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

import focuslens as fl
from focuslens.cli import output
from focuslens.cli.main import main

SPOKEN = (
    "import sys, warnings, logging\n"
    "from pathlib import Path\n"
    "from argparse import Namespace\n"
    "import focuslens\n"
    "from focuslens.cli import output\n"
    "def run(args):\n"
    "    logging.basicConfig(level=logging.INFO)\n"  # some imported libraries configure logging like this
    "    log = logging.getLogger('focuslens.work')\n"
    "    log.debug('a detail'), log.info('a note'), log.warning('a doubt')\n"
    "    own = str(Path(focuslens.__file__).with_name('heads.py'))\n"
    "    warnings.warn_explicit('of ours', UserWarning, own, 1)\n"
    "    warnings.warn_explicit('of theirs', UserWarning, '/site-packages/other.py', 1)\n"
    "    print('the result')\n"
    "    return {}\n"
    "output.carry_out(Namespace(**{name: True for name in sys.argv[1:]}), run)\n"
)


def spoken(*options: str) -> tuple[str, str]:
    done = subprocess.run([sys.executable, "-c", SPOKEN, *options], capture_output=True, text=True, check=True)
    return done.stdout, done.stderr


def test_notes_and_warnings_are_lines_on_standard_error():
    out, err = spoken()
    assert out == "the result\n"
    assert err.splitlines() == ["a note", "warning: a doubt", "warning: of ours"]


def test_quiet_leaves_results_and_warnings():
    out, err = spoken("quiet")
    assert out == "the result\n"
    assert err.splitlines() == ["warning: a doubt", "warning: of ours"]


def test_verbose_says_everything_and_where_it_is_from():
    out, err = spoken("verbose")
    assert out == "the result\n"
    assert "DEBUG   focuslens.work: a detail" in err
    assert "INFO    focuslens.work: a note" in err
    assert "DEBUG   focuslens: /site-packages/other.py: of theirs" in err


def test_under_json_results_for_people_go_where_notes_go():
    out, err = spoken("json")
    assert out == "{}\n"
    assert err.splitlines()[-1] == "the result"
    out, err = spoken("json", "quiet")
    assert out == "{}\n"
    assert "the result" not in err


def test_a_command_leaves_logging_warnings_and_bars_as_they_were():
    from focuslens.util.progress import progress_bars_disabled

    logger = logging.getLogger("focuslens")
    before = (list(logger.handlers), logger.level, warnings.showwarning)

    def stop(args: argparse.Namespace) -> dict[str, object]:
        assert progress_bars_disabled()
        raise ValueError("stopped")

    with pytest.raises(ValueError, match="stopped"):
        output.carry_out(argparse.Namespace(quiet=True), stop)
    assert (list(logger.handlers), logger.level, warnings.showwarning) == before
    assert not progress_bars_disabled()


def test_the_library_is_silent_unless_it_is_asked(capfd, caplog):
    assert any(isinstance(one, logging.NullHandler) for one in logging.getLogger("focuslens").handlers)
    with caplog.at_level(logging.INFO, "focuslens"):
        fl.FocusModel.demo(device="cpu")
    assert "loading" in caplog.text
    assert "loading" not in capfd.readouterr().err


def test_verbose_and_quiet_exclude_each_other(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["heads", "-v", "-q"])
    assert stop.value.code == 2
    assert "not allowed with argument" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["heads"], ["helmet"], ["helmet", "make-recall"], ["fold"], ["published"]])
def test_every_command_explains_what_it_says_and_where(command, capsys):
    with pytest.raises(SystemExit):
        main([*command, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "--json results as one JSON document on standard output" in text
    assert "errors stay lines on standard error" in text
    assert "-q, --quiet results and warnings alone: no notes, no progress bars" in text


def test_the_library_prints_nothing():
    """The library calls ``print`` only in the command line interface, which ruff's T20 also checks."""
    root = Path(fl.__file__).parent
    allowed = set((root / "cli").glob("*.py"))
    printing = [path.name for path in root.rglob("*.py") if path not in allowed and "print(" in path.read_text()]
    assert printing == []


def test_a_command_leaves_out_the_warning_about_a_method_that_no_command_calls(monkeypatch, capsys):
    monkeypatch.setattr("focuslens.model.verification.Verified.reads_cache", lambda _: False)
    with pytest.warns(UserWarning, match="^TransformerLens's own generate of .* does not read"):
        fl.FocusModel.demo(device="cpu")
    assert main(["heads", "--samples", "1", "--max-new-tokens", "1", "--device", "cpu"]) == 0
    captured = capsys.readouterr()
    assert "heads by relevant contextual score" in captured.out
    assert "own generate" not in captured.err
