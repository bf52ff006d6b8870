"""Writers of rankings of heads, in FocusLens's form and in the forms of QRHead and DuoAttention."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from focuslens.util.files import write_atomically

__all__ = ["FORMS", "PATTERN", "write_ranking"]

FORMS = ("focuslens", "qrhead", "duoattention")
"""Forms in which a ranking can be written."""

PATTERN = "full_attention_heads.tsv"
"""File of DuoAttention: one row per layer and one column per key-value head, with values from 0 to 1."""

_SINK, _RECENT = 128, 256
"""Sizes of the sink and of the recent window, in tokens, of DuoAttention's pattern for Llama 3.1."""


def write_ranking(
    heads: Sequence[tuple[int, int]], path: Path, form: str, *, n_layers: int = 0, n_groups: int = 0, group: int = 1
) -> None:
    """Write ``(layer, head)`` pairs, best first; :func:`focuslens.save_ranking` describes the forms.

    Args:
        heads: The ranking.
        path: The file, or the directory in DuoAttention's form.
        form: One of :data:`FORMS`.
        n_layers: Number of layers, for DuoAttention's form.
        n_groups: Number of key-value heads per layer, for DuoAttention's form.
        group: Number of query heads per key-value head, for DuoAttention's form.
    """
    if form == "qrhead":
        names = ",".join(f"{layer}-{head}" for layer, head in heads)
        write_atomically(path, f'# {len(heads)} heads, best first\nattn_head_set: "{names}"\n'.encode())
    elif form == "duoattention":
        lines = ["\t".join(f"{value:.6f}" for value in row) for row in _pattern(heads, n_layers, n_groups, group)]
        path.mkdir(parents=True, exist_ok=True)
        write_atomically(path / PATTERN, ("\n".join(lines) + "\n").encode())
        write_atomically(path / "config.json", json.dumps({"sink_size": _SINK, "recent_size": _RECENT}).encode())
    else:
        write_atomically(path, json.dumps([list(head) for head in heads]).encode())


def _pattern(heads: Sequence[tuple[int, int]], n_layers: int, n_groups: int, group: int) -> list[list[float]]:
    """Value of each key-value head: evenly spaced from 1 for the best to 0 for those without a head in the ranking."""
    order = list(dict.fromkeys((layer, head // group) for layer, head in heads))
    total = n_layers * n_groups
    values = {place: 1 - rank / total for rank, place in enumerate(order)}
    return [[values.get((layer, place), 0.0) for place in range(n_groups)] for layer in range(n_layers)]
