"""Scores in files: the tensors in safetensors format, and everything else as JSON, in one folder."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from safetensors.torch import load, save
from torch import Tensor

from focuslens.heads import Head
from focuslens.util.files import write_atomically

__all__ = ["SavedResult"]

_FORMAT = 1

_Result = TypeVar("_Result", bound="SavedResult")


class SavedResult:
    """Base of results that can be saved. A subclass is a dataclass of tensors, tuples of tensors and JSON values."""

    def save(self, directory: str | Path, **origin: Any) -> Path:
        """Write the result to a folder, and return the folder's path.

        The files are named after the class, such as ``contextual_scores.safetensors`` and ``contextual_scores.json``. A
        folder can hold one result of each class.

        Args:
            directory: The folder, which is created if it does not exist.
            **origin: JSON values that say where the result comes from, such as ``model=model.description``.
        """
        directory, name = Path(directory), _file_name(type(self))
        tensors: dict[str, Tensor] = {}
        entries: dict[str, Any] = {}
        for field in fields(cast("Any", self)):
            entries[field.name] = _packed(field.name, getattr(self, field.name), tensors)
        content = save({key: tensor.detach().cpu().contiguous().clone() for key, tensor in tensors.items()})
        facts = {
            "format": _FORMAT,
            "kind": type(self).__name__,
            "sha256": hashlib.sha256(content).hexdigest(),
            "fields": entries,
            "origin": origin,
        }
        described = json.dumps(facts, indent=1, allow_nan=False).encode()
        write_atomically(directory / f"{name}.safetensors", content)
        write_atomically(directory / f"{name}.json", described)
        return directory

    @classmethod
    def load(cls: type[_Result], directory: str | Path) -> _Result:
        """Read a result from a folder that :meth:`save` wrote.

        Raises:
            FileNotFoundError: If the folder has no result of this class.
            ValueError: If the files are not of this class or version, or do not belong together.
        """
        directory, name = Path(directory), _file_name(cls)
        paths = {suffix: directory / f"{name}.{suffix}" for suffix in ("json", "safetensors")}
        for path in paths.values():
            if not path.is_file():
                raise FileNotFoundError(
                    f"{directory} holds no {path.name}; is it a folder that {cls.__name__}.save wrote?"
                )
        try:
            facts = json.loads(paths["json"].read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{paths['json']} is not JSON ({error}); save the result again") from error
        if not isinstance(facts, dict) or (facts.get("format"), facts.get("kind")) != (_FORMAT, cls.__name__):
            raise ValueError(
                f"{paths['json']} does not describe {cls.__name__} in the format {_FORMAT}, which this version reads"
            )
        content = paths["safetensors"].read_bytes()
        if hashlib.sha256(content).hexdigest() != facts["sha256"]:
            raise ValueError(
                f"the files of {name} in {directory} do not belong together: one was changed, or a save was cut off"
            )
        entries, tensors = cast("dict[str, Any]", facts["fields"]), load(content)
        known = {field.name: field for field in fields(cast("Any", cls))}
        missing = [
            field.name
            for field in known.values()
            if field.name not in entries and field.default is MISSING and field.default_factory is MISSING
        ]
        unknown = sorted(set(entries) - set(known))
        if missing or unknown:
            raise ValueError(
                f"{paths['json']} is of another version: it lacks {', '.join(missing) or 'nothing'}, and has "
                f"{', '.join(unknown) or 'nothing'} in addition"
            )
        return cls(**{key: _unpacked(key, entry, tensors) for key, entry in entries.items()})


def _file_name(kind: type) -> str:
    """Name of the files of a class, such as ``contextual_scores`` for ``ContextualScores``."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", kind.__name__).lower()


def _packed(name: str, value: Any, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """JSON entry of a field. Tensors of samples differ in the last axis alone, so they are stored as one tensor."""
    if isinstance(value, Tensor):
        tensors[name] = value
        return {"is": "tensor"}
    if isinstance(value, tuple) and value:
        items = cast("tuple[Any, ...]", value)
        if all(isinstance(item, Tensor) for item in items):
            tensors[name] = torch.cat(items, dim=-1)
            return {"is": "tensors", "lengths": [item.shape[-1] for item in items]}
        if all(isinstance(item, Head) for item in items):
            return {"is": "heads", "value": [list(item) for item in items]}
    return {"is": "value", "value": value}


def _unpacked(name: str, entry: dict[str, Any], tensors: dict[str, Tensor]) -> Any:
    if entry["is"] == "tensor":
        return tensors[name]
    if entry["is"] == "tensors":
        return tuple(part.clone() for part in tensors[name].split(entry["lengths"], dim=-1))
    if entry["is"] == "heads":
        return tuple(Head(layer, head) for layer, head in entry["value"])
    return _tuples(entry["value"])


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value  # pyright: ignore[reportUnknownVariableType]
