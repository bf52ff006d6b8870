"""Run the unmodified ``eval.py`` of a HELMET checkout on machines without ``pkg_resources`` and flash attention.

Usage: ``python helmet_eval.py CHECKOUT TOKENS [OPTION ...]``. OPTION is any option of ``eval.py``. The tokens of each
response are appended to the file TOKENS as one JSON line. HELMET needs ``pkg_resources``, which setuptools no longer
has, to compare versions. It also uses flash attention unless the model's path contains "yarn".
"""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from packaging.version import parse

__all__ = ["stand_in_for_pkg_resources"]


def stand_in_for_pkg_resources() -> ModuleType:
    """A module with the one function of ``pkg_resources`` that HELMET uses."""
    module = ModuleType("pkg_resources")
    vars(module)["parse_version"] = parse
    return module


def main(checkout: str, tokens: str, options: list[str]) -> None:
    """Run ``eval.py``, and write the tokens of each generated response to a file."""
    from transformers import GenerationMixin

    sys.modules["pkg_resources"] = stand_in_for_pkg_resources()
    mixin: Any = GenerationMixin
    generate = mixin.generate

    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        made = generate(self, *args, **kwargs)
        with Path(tokens).open("a") as file:
            file.write(json.dumps(made["sequences"][0, kwargs["input_ids"].shape[1] :].tolist()) + "\n")
        return made

    mixin.generate = watched
    sys.path.insert(0, checkout)
    sys.dont_write_bytecode = True
    sys.argv = ["eval.py", *options]
    runpy.run_path(str(Path(checkout) / "eval.py"), run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
