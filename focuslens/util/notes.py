"""Kinds of warning."""

from __future__ import annotations

__all__ = ["MinorWarning"]


class MinorWarning(UserWarning):
    """Warning about a detail that changes results little. Commands show it with ``--verbose`` only."""
