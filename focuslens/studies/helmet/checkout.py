"""Checkout of HELMET (princeton-nlp/HELMET). The code is imported from the checkout without any changes."""

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
    """Modules of a HELMET checkout, with methods that call HELMET's functions.

    Attributes:
        root: Folder of the checkout.
        modules: The modules ``arguments``, ``data``, ``eval``, ``model_utils`` and ``utils``, by name. None of these
            modules is in ``sys.modules``.
        digest: Digest of the modules' source files.
    """

    root: Path
    modules: Mapping[str, ModuleType]
    digest: str

    def parse(self, options: Sequence[str]) -> Any:
        """Parse options of HELMET's ``eval.py`` with HELMET's parser.

        Raises:
            ValueError: If the parser rejects the options, or cannot read the configuration that the options name.
        """
        stderr, original_argv = StringIO(), sys.argv
        sys.argv = ["eval.py", *options]
        try:
            with redirect_stderr(stderr), _quiet():
                return self.modules["arguments"].parse_arguments()
        except SystemExit as error:
            lines = stderr.getvalue().strip().splitlines()
            raise ValueError(
                f"HELMET's own parser refuses the options: {lines[-1] if lines else error}; its arguments.py lists "
                "all options"
            ) from error
        except (YAMLError, TypeError) as error:
            raise ValueError(
                f"HELMET's parser cannot read the options {' '.join(options[:2])} ({' '.join(str(error).split())}); a "
                "configuration is a YAML file of names and values, like those in its configs/"
            ) from error
        finally:
            sys.argv = original_argv

    def load(self, args: Any, dataset: str, test_file: str, demo_file: str) -> dict[str, Any]:
        """Load a data set with HELMET's ``load_data``, using the same random state as HELMET's ``eval.py``.

        Raises:
            ValueError: If HELMET cannot load the data.
        """
        with _random_state(args.seed), _quiet():
            try:
                return self.modules["data"].load_data(args, dataset, test_file, demo_file)
            except Exception as error:  # HELMET's loaders, the hub and libraries raise errors of any type
                raise ValueError(_unloadable(dataset, test_file, error)) from error

    def prepare(self, reader: Any, item: dict[str, Any], data: Mapping[str, Any]) -> Any:
        """Tokenize a sample with HELMET's ``HFModel``, which applies the chat template and truncates the context.

        Args:
            reader: Object with these attributes of an ``HFModel``: ``tokenizer``, ``max_length``,
                ``generation_max_length``, ``use_chat_template`` and ``system_message``.
            item: The sample. Truncation changes ``item["context"]`` in place.
            data: The result of :meth:`load`.
        """
        return self.modules["model_utils"].HFModel.prepare_inputs(reader, item, data)

    def evaluate(self, args: Any, model: Any, data: Mapping[str, Any]) -> Path:
        """Run HELMET's ``run_test`` on loaded data, and return the path of the result file."""
        module = self.modules["eval"]

        def loaded(*_: Any) -> Mapping[str, Any]:
            return data

        def silent(rows: Any, **_: Any) -> Any:
            return rows

        replacements = {"load_data": loaded, "tqdm": silent}
        with _random_state(args.seed), _quiet(), _replaced(module, replacements):
            return Path(module.run_test(args, model, args.datasets, args.test_files, args.demo_files))


def open_checkout(folder: str | Path) -> Checkout:
    """Import the modules of a HELMET checkout.

    ``sys.modules``, ``sys.path``, the configuration of logging and the checkout's files stay unchanged.

    Raises:
        FileNotFoundError: If the folder is not a checkout of HELMET.
        ImportError: If HELMET's code imports a package that is not installed.
    """
    root = Path(folder).resolve()
    missing = [name for name in _MODULES if not (root / f"{name}.py").is_file()]
    if missing:
        problem = f"has no {missing[0]}.py" if root.is_dir() else "is not a folder"
        raise FileNotFoundError(f"{folder} {problem}, so it is not a checkout of HELMET: {_WHERE}")
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
    problem = f"HELMET cannot load the data of {dataset} ({type(error).__name__}: {error})"
    if test_file:
        return f"{problem}; the file {test_file} may be in the wrong format or cut off"
    script = "script" in str(error).lower() or "trust_remote_code" in str(error)
    remedy = "pip install 'datasets<4', which runs this data set's loading script; " if script else ""
    return f"{problem}; they come from the Hugging Face hub: {remedy}connect to it once, or fill its cache"


@contextmanager
def _importing(root: Path) -> Generator[None]:
    """Make module names such as ``data`` and ``utils`` refer to the checkout until the block ends."""
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
    """Silence logging up to ``INFO`` until the block ends, because HELMET logs whole prompts.

    HELMET's modules also configure the root logger. Its previous configuration is restored when the block ends.
    """
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
def _random_state(seed: int) -> Generator[None]:
    """Seed Python's random generator. When the block ends, restore the states of Python's and NumPy's generators."""
    import numpy as np

    state, arrays = random.getstate(), np.random.get_state()  # noqa: NPY002  (HELMET draws from the global generator)
    random.seed(seed)
    try:
        yield
    finally:
        random.setstate(state)
        np.random.set_state(arrays)  # noqa: NPY002


@contextmanager
def _replaced(module: ModuleType, replacements: Mapping[str, Any]) -> Generator[None]:
    """Replace attributes of a module until the block ends."""
    before = {name: vars(module)[name] for name in replacements}
    vars(module).update(replacements)
    try:
        yield
    finally:
        vars(module).update(before)
