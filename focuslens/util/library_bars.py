"""Progress bars of other libraries: loading of weights (transformers), and downloads (huggingface_hub)."""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import contextmanager

from focuslens.util.progress import bars_hidden

__all__ = ["library_bars", "without_library_bars"]


@contextmanager
def library_bars() -> Generator[None]:
    """Hide the bars of other libraries in a ``with`` block if this package's bars are hidden."""
    if not bars_hidden():
        yield
        return
    with without_library_bars():
        yield


@contextmanager
def without_library_bars() -> Generator[None]:
    """Hide the bars of other libraries in a ``with`` block. Afterwards, their settings are as before."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from transformers.utils import logging

    if "HF_HUB_DISABLE_PROGRESS_BARS" in os.environ:  # the user has decided, and huggingface_hub warns of other calls
        disable_progress_bars = enable_progress_bars = lambda: None
    shown, downloads_hidden = logging.is_progress_bar_enabled(), are_progress_bars_disabled()
    logging.disable_progress_bar()
    disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
        # The calls above also change the setting for downloads.
        (disable_progress_bars if downloads_hidden else enable_progress_bars)()
