"""The bars of transformers and of downloads are hidden where FocusLens's own are, and are left as they were."""

from __future__ import annotations

import pytest
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from transformers.utils import logging

import focuslens as fl
from focuslens.util.library_bars import without_library_bars
from focuslens.util.progress import ENVIRONMENT


def settings() -> tuple[bool, bool]:
    return logging.is_progress_bar_enabled(), are_progress_bars_disabled()


@pytest.fixture(autouse=True)
def _as_before():
    before = settings()
    yield
    (logging.enable_progress_bar if before[0] else logging.disable_progress_bar)()
    (disable_progress_bars if before[1] else enable_progress_bars)()


@pytest.mark.parametrize(("value", "disabled", "shown"), [("0", False, False), ("", True, False), ("1", True, True)])
def test_loading_shows_bars_only_where_focuslens_does(value, disabled, shown, checkpoint, monkeypatch, capsys):
    logging.enable_progress_bar()
    monkeypatch.setenv(ENVIRONMENT, value)
    if disabled:
        fl.disable_progress_bars()
    try:
        fl.FocusModel.from_pretrained(str(checkpoint("llama")), device="cpu")
    finally:
        fl.enable_progress_bars()
    assert ("Loading weights" in capsys.readouterr().err) == shown
    assert settings() == (True, False)


@pytest.mark.parametrize("shown", [True, False])
@pytest.mark.parametrize("downloads_hidden", [True, False])
def test_both_settings_are_left_as_they_were(shown, downloads_hidden):
    (logging.enable_progress_bar if shown else logging.disable_progress_bar)()
    (disable_progress_bars if downloads_hidden else enable_progress_bars)()
    with without_library_bars():
        assert settings() == (False, True)
    assert settings() == (shown, downloads_hidden)
