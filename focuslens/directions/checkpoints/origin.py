"""Comparison of two models: the model that directions were trained on, and the model that they are added to."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from focuslens.directions.checkpoints.source import Checkpoint
from focuslens.interventions.directions import FocusDirections

__all__ = ["origin_lines", "origin_of", "warn_of_another_model"]


def origin_of(directions: FocusDirections) -> dict[str, Any]:
    """Provenance of directions, without the losses of their training."""
    return {name: value for name, value in directions.provenance.items() if name != "losses"}


def warn_of_another_model(base: Checkpoint, directions: FocusDirections) -> None:
    """Warn if the directions were trained on a model other than the base. Other code refuses a different shape."""
    origin = directions.origin
    if origin is None or _same(origin, base):
        return
    warnings.warn(
        f"the directions were made on {_origin_text(directions)}, and are put into {_base_text(base)}: a vector means "
        "nothing in another model. If they are the same model under two names, all is well",
        stacklevel=3,
    )


def origin_lines(base: Checkpoint, directions: FocusDirections) -> list[str]:
    """Lines for the model card about the origins of the base and of the directions."""
    lines = [f"- Base: `{base.name}`" + (f", commit `{base.commit}`." if base.commit else ".")]
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
    """Whether two names belong to the same model. If only one is a directory, only the last parts are compared."""
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
    return f"`{directions.origin}`{f' at `{revision}`' if revision else ''}{sizes}"


def _base_text(base: Checkpoint) -> str:
    shape = base.shape
    return (
        f"`{base.name}`{f' at `{base.commit}`' if base.commit else ''} (n_layers = {shape.n_layers}, n_heads = "
        f"{shape.n_heads}, n_key_value_heads = {shape.n_key_value_heads}, d_head = {shape.d_head})"
    )


def _text(entry: Any, name: str) -> str:
    return str(entry.get(name) or "") if isinstance(entry, Mapping) else ""  # pyright: ignore[reportUnknownArgumentType, reportUnknownMemberType]
