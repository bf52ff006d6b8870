"""Visibility of progress bars: the default, and the precedence of settings."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import struct
import subprocess
import sys
import termios
import types

import pytest

import focuslens as fl
from focuslens.util import progress
from focuslens.util.progress import ENVIRONMENT, progress_bar, track

SCORE = (
    "import focuslens as fl\n"
    "model = fl.FocusModel.demo(device='cpu')\n"
    "samples = fl.load_synthetic(2, num_documents=2, gold_positions=[0])\n"
    "fl.contextual_scores(model, samples, max_new_tokens=3)\n"
)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _as_it_was(monkeypatch):
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    yield
    fl.enable_progress_bars()


def shown(show: bool | None = None) -> bool:
    with progress_bar("work", 3, show=show) as bar:
        return not bar.disable


def test_a_bar_is_for_a_terminal(monkeypatch):
    for stream, expected in ((Terminal(), True), (io.StringIO(), False)):
        monkeypatch.setattr(sys, "stderr", stream)
        with progress_bar("scores", 4, done=1) as bar:
            bar.update(2)
        written = stream.getvalue()
        assert bool(written) == expected
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    with progress_bar("scores", 4, done=1) as bar:
        bar.update(3)
    last = terminal.getvalue().split("\r")[-1]
    assert "scores: 100%" in last
    assert "4/4 [00:00<00:00" in last  # elapsed and remaining time


def test_the_argument_shows_or_silences(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert shown(True)
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert not shown(False)


def test_bars_are_disabled_and_enabled_for_all(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    fl.disable_progress_bars()
    assert not shown()
    assert not shown(True)
    fl.enable_progress_bars()
    assert shown()
    assert not progress.progress_bars_disabled()


@pytest.mark.parametrize(("value", "expected"), [("0", False), ("1", True), ("off", False), ("Yes", True)])
def test_the_environment_has_the_last_word(value, expected, monkeypatch):
    monkeypatch.setenv(ENVIRONMENT, value)
    monkeypatch.setattr(sys, "stderr", Terminal() if not expected else io.StringIO())
    (fl.disable_progress_bars if expected else fl.enable_progress_bars)()
    assert shown(not expected) == shown() == expected


def test_an_answer_that_is_none_is_refused(monkeypatch):
    monkeypatch.setenv(ENVIRONMENT, "perhaps")
    with pytest.raises(ValueError, match="FOCUSLENS_PROGRESS_BARS is 'perhaps'; it must be 0"):
        shown()


def test_a_notebook_is_watched_though_its_standard_error_is_no_terminal(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    for config, expected in (({"IPKernelApp": {}}, True), ({"TerminalIPythonApp": {}}, False)):
        shell = types.SimpleNamespace(config=config)
        monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda shell=shell: shell))
        assert shown() == expected


def test_what_is_done_in_passing_is_silent_where_it_is_quick(monkeypatch):
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    assert list(track([1, 2, 3], "counting")) == [1, 2, 3]
    assert terminal.getvalue() == ""
    monkeypatch.setattr(progress, "_MINOR_DELAY", 0)
    assert list(track([1, 2, 3], "counting")) == [1, 2, 3]
    assert "counting" in terminal.getvalue()


@pytest.mark.slow
def test_the_library_shows_bars_on_a_terminal_and_nothing_elsewhere():
    environment = {name: value for name, value in os.environ.items() if name not in (ENVIRONMENT, "TQDM_DISABLE")}
    done = subprocess.run([sys.executable, "-c", SCORE], capture_output=True, text=True, check=True, env=environment)
    assert "contextual scores" not in done.stderr
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
    process = subprocess.Popen([sys.executable, "-c", SCORE], stderr=theirs, env=environment)
    os.close(theirs)
    assert process.wait() == 0
    assert b"contextual scores (long): 100%" in os.read(ours, 1 << 16)
    os.close(ours)
