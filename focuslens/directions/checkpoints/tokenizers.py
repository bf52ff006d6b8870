"""Tokenizer configuration of a steered checkpoint, with an explicit class. The default class varies by model type."""

from __future__ import annotations

import json
from typing import Any, cast

from focuslens.directions.checkpoints.source import Checkpoint

__all__ = ["TOKENIZER_CONFIG", "tokenizer_config"]

TOKENIZER_CONFIG = "tokenizer_config.json"
_FILES = (TOKENIZER_CONFIG, "tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json")


def tokenizer_config(base: Checkpoint) -> dict[str, Any] | None:
    """Content of the base's ``tokenizer_config.json``, with the class that ``AutoTokenizer`` chooses for the base.

    For some model types, such as Qwen2, ``AutoTokenizer`` overrides the class in this file. Therefore, the same files
    could load as a different tokenizer if the steered checkpoint has a different ``model_type``.

    Returns:
        The configuration, or ``None`` if the base has no tokenizer or if its tokenizer has custom code.

    Raises:
        ValueError: If the base's tokenizer cannot be loaded.
    """
    if not any((base.directory / name).is_file() for name in _FILES):
        return None
    path = base.directory / TOKENIZER_CONFIG
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if config.get("auto_map"):
        return None
    return {**config, "tokenizer_class": _class_of(base)}


def _class_of(base: Checkpoint) -> str:
    from transformers import AutoConfig, AutoTokenizer

    config: Any = AutoConfig.for_model(**base.config)
    config.name_or_path = base.name  # AutoTokenizer has special cases for some hub names
    loading = cast("Any", AutoTokenizer)
    try:
        return type(loading.from_pretrained(str(base.directory), config=config, trust_remote_code=False)).__name__
    except (OSError, ValueError, ImportError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(
            f"the tokenizer of {base.name} cannot be opened, so its class is not known ({error}); repair its files, or "
            "move them away to continue without a tokenizer"
        ) from error
