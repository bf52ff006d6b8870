"""What several unit tests need."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import jaxtyping
import pytest

if TYPE_CHECKING:
    from browser import Browser


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Types and shapes go unchecked, as they do for users: a bad argument meets the package's own errors."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="session")
def paper_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Questions in a file, and a haystack."""
    from paper_runs import write_files

    return write_files(tmp_path_factory.mktemp("files"))


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """A headless Chromium without a network; where there is none, tests that need it are skipped."""
    from browser import chromium

    with chromium() as opened:
        yield opened


@pytest.fixture(scope="session")
def recorded_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What every command leaves behind on a tiny model; a test that changes it works on a copy."""
    from recorded_runs import run_everything

    return run_everything(tmp_path_factory.mktemp("run"))
