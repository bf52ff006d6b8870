"""Notes to the user: a kind of warning, and announcements of work that costs time or disk."""

from __future__ import annotations

import logging
import sys

from focuslens.util.progress import progress_bars_disabled

__all__ = ["MinorWarning", "announce"]


class MinorWarning(UserWarning):
    """Warning about a detail that changes results little. Commands show it with ``--verbose`` only."""


def announce(logger: logging.Logger, message: str) -> None:
    """Log a message at level INFO. If the level is off, as in notebooks, print it to standard error.

    Commands with ``--quiet`` and programs that disable progress bars get no message.
    """
    if logger.isEnabledFor(logging.INFO):
        logger.info("%s", message)
    elif not progress_bars_disabled():
        sys.stderr.write(f"{message}\n")
