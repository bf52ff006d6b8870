"""What holds for every test: shapes are checked, nothing reaches for the network, nothing opens a window."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import hypothesis
import jaxtyping
import pytest

if TYPE_CHECKING:
    from focuslens import FocusModel, MultiDocSample
    from tests.support.browser import Browser

pytest_plugins = ["pytester", "tests.support.processor_time"]

# Before torch is first imported. On tiny models a second thread only waits for the first; and several processes test at
# once. Processes that tests start have one thread too.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "agg"

# Before focuslens is first imported: from here on beartype checks every jaxtyping shape in the package. An int is a
# float to it, as it is to pyright (the numeric tower of PEP 484).
jaxtyping.install_import_hook("focuslens", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")

# The first call of a function that uses torch is slow, and a failure has to come back when the suite is run again.
hypothesis.settings.register_profile("focuslens", deadline=None, derandomize=True)
hypothesis.settings.load_profile("focuslens")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put files with slow tests first, so that processes that share the tests end together."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_collection_finish() -> None:
    """Let garbage collections pass over what imports left: most of a million objects, of which none will be garbage."""
    gc.collect()
    gc.freeze()


class Checkpoints(Protocol):
    """Directory of a tiny random checkpoint of ``checkpoints.CHECKPOINTS``, built when it is first asked for."""

    def __call__(self, name: str) -> Path: ...


class LoadModel(Protocol):
    """A checkpoint as a FocusModel; the same object for the same arguments, so a test must leave it as it was."""

    def __call__(self, name: str, backend: str = ..., **settings: Any) -> FocusModel: ...


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    """``checkpoint("llama")`` is the directory of that tiny random checkpoint; see ``checkpoints.CHECKPOINTS``."""
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
        pytest.param(
            "hooked",
            marks=pytest.mark.skipif(
                int(version("transformer-lens").split(".")[0]) >= 4, reason="TransformerLens 4 has no HookedTransformer"
            ),
        ),
        "bridge",
    ],
    scope="session",
)
def backend(request: pytest.FixtureRequest) -> str:
    """Both kinds of TransformerLens model, the ones that the installed version has."""
    return request.param


@pytest.fixture(scope="session")
def load_model(checkpoint: Checkpoints) -> LoadModel:
    """``load_model("qwen2", backend, dtype="bfloat16")`` opens a tiny checkpoint on the CPU, once a session."""
    loaded: dict[Any, FocusModel] = {}

    def load(name: str, backend: str = "bridge", **settings: Any) -> FocusModel:
        from focuslens import FocusModel
        from tests.support.processor_time import shared_work

        key = (name, backend, *sorted(settings.items()))
        if key not in loaded:
            options: dict[str, Any] = {"backend": backend, "device": "cpu", **settings}
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
    """Types and shapes go unchecked, as they do for users: a bad argument meets the package's own errors."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="session")
def paper_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Questions in a file, and a haystack."""
    from tests.support.paper_runs import write_files

    return write_files(tmp_path_factory.mktemp("files"))


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """A headless Chromium without a network; where there is none, tests that need it are skipped."""
    from tests.support.browser import chromium

    with chromium() as opened:
        yield opened


@pytest.fixture(scope="session")
def recorded_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What every command leaves behind on a tiny model; a test that changes it works on a copy."""
    from tests.support.recorded_runs import run_everything

    return run_everything(tmp_path_factory.mktemp("run"))
