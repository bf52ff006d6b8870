"""Visibility of progress bars: the default, and the precedence of settings."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import time
import types
from collections.abc import Callable

import pytest

import focuslens as fl
from focuslens.util import progress
from focuslens.util.progress import ENVIRONMENT, bars_inside, late_bar, progress_bar, track

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


def test_lines_stand_in_for_a_bar_where_there_is_no_terminal(monkeypatch, caplog):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    monkeypatch.setattr(progress, "_LINE_SECONDS", 0.02)
    caplog.set_level("INFO", "focuslens")
    with progress_bar("scores", 4, done=1) as lines:
        assert wait_for(lambda: caplog.messages)[0] == "scores: 1 of 4 samples after 0 min"
        lines.update(2)
        n = len(caplog.messages)
        assert wait_for(lambda: caplog.messages[n + 1 :])[-1] == "scores: 3 of 4 samples after 0 min, about 0 min left"
    n = len(caplog.messages) + 1  # a line can be on its way
    time.sleep(0.1)
    assert len(caplog.messages) <= n
    for hidden in (lambda: progress_bar("work", 3, show=False), lambda: silent_bar(monkeypatch, "0")):
        assert not isinstance(hidden(), progress.ProgressLines)


def silent_bar(monkeypatch: pytest.MonkeyPatch, value: str) -> object:
    with monkeypatch.context() as patch:
        patch.setenv(ENVIRONMENT, value)
        return progress_bar("work", 3)


def wait_for(messages: Callable[[], list[str]]) -> list[str]:
    for _ in range(500):
        if found := messages():
            return found
        time.sleep(0.01)
    raise TimeoutError("no line after five seconds")


@pytest.mark.parametrize(("seconds", "text"), [(20, "0 min"), (59 * 60, "59 min"), (3600, "1 h 0 min")])
def test_durations_are_short(seconds, text):
    assert progress.duration(seconds) == text


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


def test_a_late_bar_appears_if_the_step_is_going_to_be_long(monkeypatch):
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    monkeypatch.setattr(progress, "_EARLIEST", 0)
    with late_bar("prompt", 100, unit="layer") as reach:
        reach(0)
        reach(50)  # as many again will take no time
    assert terminal.getvalue() == ""
    with late_bar("prompt", 100_000, unit="layer") as reach:
        time.sleep(0.02)
        reach(1)  # at this pace, the step takes half an hour
        assert "prompt:   0%" in terminal.getvalue()
        assert "1/100000" in terminal.getvalue()
        before = re.findall(r"<(\d+):(\d+)", terminal.getvalue())[-1]
        assert 20 <= int(before[0]) <= 600  # the remaining time counts from the step's start
    assert terminal.getvalue().endswith("\r")  # it disappears


def test_a_late_bar_is_lines_where_there_is_no_terminal(monkeypatch, caplog):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    monkeypatch.setattr(progress, "_LINE_SECONDS", 0.02)
    monkeypatch.setattr(progress, "_EARLIEST", 0)
    caplog.set_level("INFO", "focuslens")
    with late_bar("prompt", 1000, unit="layer") as reach:
        time.sleep(0.02)
        reach(2)
        assert wait_for(lambda: caplog.messages)[0].startswith("prompt: 2 of 1,000 layers after 0 min, about")


def test_bars_inside_a_hidden_bar_are_hidden_too(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    with progress_bar("work", 3, show=False):
        assert not shown()
        with bars_inside(None):
            assert not shown()
    assert shown()
    with bars_inside(False):
        assert not shown()
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with bars_inside(True):
        assert shown()
    assert not shown()


def test_a_long_prompt_shows_its_layers_unless_told_otherwise(tiny_model, samples, monkeypatch):
    monkeypatch.setattr(progress, "_EARLIEST", 0)
    monkeypatch.setattr(progress, "_LONG_SECONDS", 0)
    prompt = samples[0].prompt("long")
    n = len(tiny_model.encode(prompt).tokens)
    for lean in (True, False):
        monkeypatch.setattr(tiny_model, "lean", lean)
        monkeypatch.setattr(sys, "stderr", terminal := Terminal())
        tiny_model.prefill(prompt)
        assert f"prompt of {n} tokens" in terminal.getvalue()
        assert "1/3" in terminal.getvalue()
        monkeypatch.setattr(sys, "stderr", terminal := Terminal())
        tiny_model.prefill(prompt, progress=False)
        tiny_model.generate(prompt, max_new_tokens=2, progress=False)
        fl.response_attention(tiny_model, prompt, [(0, 0)], max_new_tokens=2, progress=False)
        fl.window_attention(tiny_model, prompt, [(0, 0)], ["question"], max_new_tokens=2, progress=False)
        fl.contextual_scores(tiny_model, samples[:1], max_new_tokens=2, progress=False)
        assert terminal.getvalue() == ""
        fl.contextual_scores(tiny_model, samples[:1], max_new_tokens=2)
        assert "1/3" in terminal.getvalue()
