"""Comparison of a base checkpoint with the model on which directions were trained."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from focuslens.directions.checkpoints.source import Checkpoint
from focuslens.interventions.directions import FocusDirections
from focuslens.util.files import without_folders

__all__ = ["origin_lines", "origin_of", "warn_of_another_model"]


def origin_of(directions: FocusDirections) -> dict[str, Any]:
    """Provenance of directions, without the training losses."""
    return without_folders({name: value for name, value in directions.provenance.items() if name != "losses"})


def warn_of_another_model(base: Checkpoint, directions: FocusDirections) -> None:
    """Warn if the name of the base differs from the name of the model on which the directions were trained.

    Differences in shape are checked by :meth:`FocusDirections.require_shape`.
    """
    origin = directions.origin
    if origin is None or _same(origin, base):
        return
    warnings.warn(
        f"the directions were made on {_origin_text(directions)}, and are added to {_base_text(base)}: a vector has no "
        "meaning in another model. If these are two names of one model, ignore this warning",
        stacklevel=3,
    )


def origin_lines(base: Checkpoint, directions: FocusDirections) -> list[str]:
    """Lines of the model card that state the origin of the base and of the directions."""
    lines = [f"- Base: `{base.label}`" + (f", commit `{base.commit}`." if base.commit else ".")]
    if directions.origin is None:
        return [*lines, f"- Directions: their model is not recorded; SHA-256 `{directions.digest}`."]
    data = directions.provenance.get("data")
    file = _text(data, "file")
    samples = f", on {data['samples']} samples" if isinstance(data, Mapping) and "samples" in data else ""
    return [
        *lines,
        f"- Directions: made on {_origin_text(directions)}{samples}{f' of `{file}`' if file else ''}; SHA-256 "
        f"`{directions.digest}`.",
        *([] if _same(directions.origin, base) else ["- These names differ; the directions may be of another model."]),
    ]


def _same(origin: str, base: Checkpoint) -> bool:
    """Whether ``origin`` and the base are the same model, judged by name.

    Two absolute paths are compared in full. Otherwise, only the last components of the names are compared.
    """
    if origin == base.name:
        return True
    source = Path(base.name)
    if source.is_dir():
        source = source.resolve()
    if source.is_absolute() and Path(origin).is_absolute():
        return source == Path(origin)
    return source.name == Path(origin).name


def _origin_text(directions: FocusDirections) -> str:
    revision, shape = _text(directions.provenance.get("model"), "revision"), directions.provenance.get("shape")
    sizes = ""
    if isinstance(shape, Mapping):
        sizes = f" ({', '.join(f'{name} = {value}' for name, value in shape.items())})"  # pyright: ignore[reportUnknownArgumentType]
    return f"`{without_folders(directions.origin)}`{f' at `{revision}`' if revision else ''}{sizes}"


def _base_text(base: Checkpoint) -> str:
    shape = base.shape
    return (
        f"`{base.label}`{f' at `{base.commit}`' if base.commit else ''} (n_layers = {shape.n_layers}, n_heads = "
        f"{shape.n_heads}, n_key_value_heads = {shape.n_key_value_heads}, d_head = {shape.d_head})"
    )


def _text(entry: Any, name: str) -> str:
    return str(entry.get(name) or "") if isinstance(entry, Mapping) else ""  # pyright: ignore[reportUnknownArgumentType, reportUnknownMemberType]
