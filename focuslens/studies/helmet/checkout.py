"""A checkout of HELMET (princeton-nlp/HELMET): its own code, imported from where it lies and left as it is."""

from __future__ import annotations

import hashlib
import importlib
import logging
import random
import sys
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from types import ModuleType
from typing import Any

from yaml import YAMLError

__all__ = ["Checkout", "open_checkout"]

_MODULES = ("arguments", "utils", "data", "model_utils", "eval")
_PACKAGES = {"pytrec_eval": "pytrec-eval-terrier", "rouge_score": "rouge-score"}
_WHERE = "git clone https://github.com/princeton-nlp/HELMET, and name its folder with --helmet"


@dataclass(frozen=True, eq=False)
class Checkout:
    """HELMET's modules, and what is asked of them.

    Attributes:
        root: Its folder.
        modules: ``arguments``, ``data``, ``eval``, ``model_utils`` and ``utils``, which are in no ``sys.modules``.
        digest: Of the files they were imported from.
    """

    root: Path
    modules: Mapping[str, ModuleType]
    digest: str

    def parse(self, options: Sequence[str]) -> Any:
        """What HELMET's own parser makes of the options of its ``eval.py``.

        Raises:
            ValueError: If it refuses them, or cannot read a configuration that they name.
        """
        said, given = StringIO(), sys.argv
        sys.argv = ["eval.py", *options]
        try:
            with redirect_stderr(said), _quiet():
                return self.modules["arguments"].parse_arguments()
        except SystemExit as error:
            lines = said.getvalue().strip().splitlines()
            raise ValueError(
                f"HELMET's own parser refuses the options: {lines[-1] if lines else error}; its arguments.py has "
                "those that there are"
            ) from error
        except (YAMLError, TypeError) as error:
            raise ValueError(
                f"HELMET's parser cannot read the options {' '.join(options[:2])} ({' '.join(str(error).split())}); a "
                "configuration is a YAML file of names and values, like those in its configs/"
            ) from error
        finally:
            sys.argv = given

    def load(self, args: Any, dataset: str, test_file: str, demo_file: str) -> dict[str, Any]:
        """HELMET's ``load_data`` in the state of chance in which its ``eval.py`` calls it.

        Raises:
            ValueError: If it cannot load the data.
        """
        with _same_chance(args.seed), _quiet():
            try:
                return self.modules["data"].load_data(args, dataset, test_file, demo_file)
            except Exception as error:  # whatever its loaders, the hub and its libraries raise
                raise ValueError(_unloadable(dataset, test_file, error)) from error

    def prepare(self, reader: Any, item: dict[str, Any], data: Mapping[str, Any]) -> Any:
        """A sample as HELMET's ``HFModel`` prepares it: its tokens, after chat template and truncation of the context.

        Args:
            reader: Has the attributes of an ``HFModel`` that count: ``tokenizer``, ``max_length``,
                ``generation_max_length``, ``use_chat_template`` and ``system_message``.
            item: The sample; its ``context`` is what it is cut to, where it is cut.
            data: What :meth:`load` gave.
        """
        return self.modules["model_utils"].HFModel.prepare_inputs(reader, item, data)

    def evaluate(self, args: Any, model: Any, data: Mapping[str, Any]) -> Path:
        """HELMET's ``run_test`` over data that are loaded already: its metrics, in its files; gives the file's path."""
        module = self.modules["eval"]

        def loaded(*_: Any) -> Mapping[str, Any]:
            return data

        def silent(rows: Any, **_: Any) -> Any:
            return rows

        instead = {"load_data": loaded, "tqdm": silent}
        with _same_chance(args.seed), _quiet(), _replaced(module, instead):
            return Path(module.run_test(args, model, args.datasets, args.test_files, args.demo_files))


def open_checkout(folder: str | Path) -> Checkout:
    """Import a checkout's modules without changing it, ``sys.modules``, ``sys.path`` or logging.

    Raises:
        FileNotFoundError: If there is none.
        ImportError: If a package that HELMET's code imports is not installed.
    """
    root = Path(folder).resolve()
    missing = [name for name in _MODULES if not (root / f"{name}.py").is_file()]
    if missing:
        what = f"has no {missing[0]}.py" if root.is_dir() else "is no folder"
        raise FileNotFoundError(f"{folder} {what}, so it is no checkout of HELMET: {_WHERE}")
    contents = b"".join((root / f"{name}.py").read_bytes() for name in sorted(_MODULES))
    try:
        with _importing(root), _quiet():
            modules = {name: importlib.import_module(name) for name in _MODULES}
    except ImportError as error:
        package = _PACKAGES.get(str(error.name), str(error.name))
        raise ImportError(
            f"HELMET's code needs {error.name} ({error}): pip install 'focuslens[helmet]', or pip install {package}"
        ) from error
    return Checkout(root, modules, hashlib.sha256(contents).hexdigest()[:16])


def _unloadable(dataset: str, test_file: str, error: Exception) -> str:
    said = f"HELMET cannot load the data of {dataset} ({type(error).__name__}: {error})"
    if test_file:
        return f"{said}; its file {test_file} may be of another form, or cut off"
    script = "script" in str(error).lower() or "trust_remote_code" in str(error)
    remedy = "pip install 'datasets<4', which runs the scripts that this data set is loaded by; " if script else ""
    return f"{said}; it takes them from the Hugging Face hub: {remedy}be online once, or have them in its cache"


@contextmanager
def _importing(root: Path) -> Generator[None]:
    """Names as general as ``data`` and ``utils`` belong to the checkout, until the block ends."""
    before = {name: sys.modules.pop(name) for name in _MODULES if name in sys.modules}
    writes, path = sys.dont_write_bytecode, list(sys.path)
    sys.dont_write_bytecode = True
    sys.path.insert(0, str(root))
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path[:] = path
        sys.dont_write_bytecode = writes
        for name in _MODULES:
            sys.modules.pop(name, None)
        sys.modules.update(before)


@contextmanager
def _quiet() -> Generator[None]:
    """HELMET's modules set up logging for all of Python, and log whole prompts."""
    root, disabled = logging.getLogger(), logging.root.manager.disable
    handlers, level = list(root.handlers), root.level
    logging.disable(logging.INFO)
    try:
        yield
    finally:
        logging.disable(disabled)
        root.handlers[:] = handlers
        root.setLevel(level)


@contextmanager
def _same_chance(seed: int) -> Generator[None]:
    """Python's random numbers from a seed on; what was drawn before goes on where it was when the block ends."""
    import numpy as np

    state, arrays = random.getstate(), np.random.get_state()  # noqa: NPY002  (HELMET draws from the global generator)
    random.seed(seed)
    try:
        yield
    finally:
        random.setstate(state)
        np.random.set_state(arrays)  # noqa: NPY002


@contextmanager
def _replaced(module: ModuleType, instead: Mapping[str, Any]) -> Generator[None]:
    """Other values for some names of a module, until the block ends."""
    before = {name: vars(module)[name] for name in instead}
    vars(module).update(instead)
    try:
        yield
    finally:
        vars(module).update(before)
