"""Fixtures for all tests. Tests run with shape checks, without network access and without opening windows."""

from __future__ import annotations

import atexit
import gc
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import hypothesis
import jaxtyping
import pytest

pytest.register_assert_rewrite("tests.support.type_checks")

from tests.support import type_checks  # noqa: E402
from tests.support.versions import needs_hooked  # noqa: E402

if TYPE_CHECKING:
    from focuslens import FocusModel, MultiDocSample
    from tests.support.browser import Browser

pytest_plugins = ["pytester", "tests.support.processor_time", "tests.support.type_checks"]

# Set before torch is first imported, also for subprocesses of the tests. The models are too small to gain from a second
# thread, and several test processes run at once.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
# Test processes share one empty cache, so that every configuration is verified once per run of the tests.
if "FOCUSLENS_CACHE" not in os.environ:
    os.environ["FOCUSLENS_CACHE"] = tempfile.mkdtemp(prefix="focuslens-tests-")
    atexit.register(shutil.rmtree, os.environ["FOCUSLENS_CACHE"], ignore_errors=True)
os.environ["MPLBACKEND"] = "agg"

# Installed before focuslens is first imported, so that beartype checks every jaxtyping shape in the package. With the
# numeric tower of PEP 484, beartype accepts an int where a float is annotated, like pyright.
type_checks.install("focuslens", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")

# No deadline, because the first call of a function that uses torch is slow. Derandomized, so that a failure recurs when
# the suite is run again.
hypothesis.settings.register_profile("focuslens", deadline=None, derandomize=True)
hypothesis.settings.load_profile("focuslens")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "download: needs a real model, downloaded into the folder that FOCUSLENS_REAL_MODELS names"
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run files with slow tests first, so that parallel test processes finish at about the same time.

    Tests of real models are skipped unless ``FOCUSLENS_REAL_MODELS`` names the folder for the models.
    """
    if not os.environ.get("FOCUSLENS_REAL_MODELS"):
        no_models = pytest.mark.skip(reason="FOCUSLENS_REAL_MODELS names no folder for models; see make test-real")
        for item in items:
            if item.get_closest_marker("download"):
                item.add_marker(no_models)
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_collection_finish() -> None:
    """Exclude objects created by imports from garbage collection: most of a million objects that are never freed."""
    gc.collect()
    gc.freeze()


class Checkpoints(Protocol):
    """Directory of a tiny random checkpoint in ``checkpoints.CHECKPOINTS``, built on first use."""

    def __call__(self, name: str) -> Path: ...


class LoadModel(Protocol):
    """A tiny checkpoint as a FocusModel. Equal arguments return the same object, so a test must leave it unchanged."""

    def __call__(self, name: str, backend: str = ..., **settings: Any) -> FocusModel: ...


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    """``checkpoint("llama")`` is the directory of the checkpoint of that name in ``checkpoints.CHECKPOINTS``."""
    from tests.support.checkpoints import build_checkpoint
    from tests.support.processor_time import shared_work

    built: dict[str, Path] = {}

    def directory(name: str) -> Path:
        if name not in built:
            with shared_work():
                built[name] = build_checkpoint(name, tmp_path_factory.mktemp(name))
        return built[name]

    return directory


@pytest.fixture(
    params=[
        pytest.param("hooked", marks=needs_hooked),
        "bridge",
    ],
    scope="session",
)
def backend(request: pytest.FixtureRequest) -> str:
    """Each kind of TransformerLens model that the installed version supports."""
    return request.param


@pytest.fixture(scope="session")
def load_model(checkpoint: Checkpoints) -> LoadModel:
    """``load_model("qwen2", backend, dtype="bfloat16")`` loads a tiny checkpoint on the CPU, once per session."""
    loaded: dict[Any, FocusModel] = {}

    def load(name: str, backend: str = "bridge", **settings: Any) -> FocusModel:
        from focuslens import FocusModel
        from tests.support.processor_time import shared_work

        key = (name, backend, *sorted(settings.items()))
        if key not in loaded:
            # Random responses contain new lines by chance, and plain transformers would go on.
            options: dict[str, Any] = {"backend": backend, "device": "cpu", "stop_strings": (), **settings}
            with shared_work():
                loaded[key] = FocusModel.from_pretrained(str(checkpoint(name)), **options)
        return loaded[key]

    return load


@pytest.fixture
def tiny_model(load_model: LoadModel, backend: str) -> FocusModel:
    """The tiny random Llama on each backend."""
    return load_model("llama", backend)


@pytest.fixture(scope="session")
def samples() -> list[MultiDocSample]:
    """Four multi-document samples of unequal length (6, 6, 6 and 4 documents)."""
    from tests.support.checkpoints import multidoc_samples

    return multidoc_samples()


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Disable type and shape checks, which users do not have, so that bad arguments reach the package's own errors."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="session")
def paper_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a question file and haystack text."""
    from tests.support.paper_runs import write_files

    return write_files(tmp_path_factory.mktemp("files"))


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """A headless Chromium without network access. Tests that need it are skipped if Chromium is not installed."""
    from tests.support.browser import chromium

    with chromium() as opened:
        yield opened


@pytest.fixture(scope="session")
def recorded_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output folder of every command on a tiny model. A test that changes files must copy the folder first."""
    from tests.support.recorded_runs import run_everything

    return run_everything(tmp_path_factory.mktemp("run"))
