"""Bias that directions add to attention logits, by content, position, rotary frequency and token of the key."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from focuslens.directions.anatomy import (
    HeadKeys,
    collect_keys,
    decompose_heads,
    frequency_energy,
    position_bias,
    token_preferences,
)
from focuslens.heads import Head
from focuslens.studies.paper.artefact import Finding, Piece, keep_figure
from focuslens.studies.paper.study import Study
from focuslens.util.files import write_csv
from focuslens.util.html import Cell
from focuslens.viz import Table
from focuslens.viz.anatomy import frequency_profiles, position_biases, variance_parts

__all__ = ["piece"]

_COLUMNS = (" token", ": seen", ": added (logits)")
_SHARES = ("content", "position", "interaction")


def piece(study: Study, heads: Sequence[Head], folder: Path) -> Piece:
    """Decompose the bias that the top heads' directions add to the attention logits of keys in validation prompts."""
    anatomy = study.settings.anatomy
    prompts = [sample.prompt("long") for sample in study.samples("validation")[: anatomy.samples]]
    keys = collect_keys(
        study.model, prompts, heads[: anatomy.heads], anatomy.keys, seed=study.settings.seed, progress=study.progress
    )
    frame = decompose_heads(study.model, study.directions, dict(keys), _positions(keys))
    parts, sentence = _parts(keys, frame)
    figures = (_frequencies(study, keys, folder), _biases(study, keys, folder), _variance(keys, frame, folder))
    return Piece((sentence,), figures, (parts, _tokens(study, keys)))


def _positions(keys: Mapping[Head, HeadKeys]) -> torch.Tensor:
    return torch.arange(1 + max(int(head_keys.positions.max()) for head_keys in keys.values()))


def _frequencies(study: Study, keys: Mapping[Head, HeadKeys], folder: Path) -> tuple[str, str]:
    energies: dict[str, np.ndarray] = {}
    for head, vector in zip(keys, study.directions.select(keys).query, strict=True):
        rotary = study.model.backend.rotary(head.layer, 1)
        pairs = rotary.cos.shape[-1] // 2
        energy = frequency_energy(vector[None], adjacent_pairs=rotary.adjacent_pairs, rotary_dim=2 * pairs)
        energies[str(head)] = energy[0, :pairs].numpy()
    keep_figure(frequency_profiles(energies), folder / "frequencies.png")
    rows = [(head, pair, float(share)) for head, shares in energies.items() for pair, share in enumerate(shares)]
    write_csv(folder / "frequencies.csv", ("head", "rotary pair, fastest first", "share of energy"), rows)
    caption = "Energy of each direction by rotary frequency, fastest first; 1 is an even spread."
    return caption, "frequencies.png"


def _biases(study: Study, keys: Mapping[Head, HeadKeys], folder: Path) -> tuple[str, str]:
    positions, biases = _positions(keys), {}
    for head, vector in zip(keys, study.directions.select(keys).query, strict=True):
        rotary = study.model.backend.rotary(head.layer, len(positions))
        mean = keys[head].contents.mean(dim=0)
        scale = study.model.backend.scale(head.layer)
        biases[str(head)] = position_bias(vector, mean, rotary, positions, scale).numpy()
    keep_figure(position_biases(positions.numpy(), biases), folder / "positions.png")
    rows = [(int(position), *(float(bias[i]) for bias in biases.values())) for i, position in enumerate(positions)]
    write_csv(folder / "positions.csv", ("position", *biases), rows)
    return (
        "Bias of each direction on the logit of a key with average content, by the key's position (alpha = 1).",
        "positions.png",
    )


def _variance(keys: Mapping[Head, HeadKeys], frame: pd.DataFrame, folder: Path) -> tuple[str, str]:
    names = [str(head) for head in keys]
    keep_figure(variance_parts(names, *(frame[name].to_numpy() for name in _SHARES)), folder / "variance.png")
    rows = [(name, *row) for name, row in zip(names, frame[list(_SHARES)].to_numpy().tolist(), strict=True)]
    write_csv(folder / "variance.csv", ("head", *(f"{name} (squared logits)" for name in _SHARES)), rows)
    return (
        "Shares of a key's content, its position and their interaction in the variance of the bias on its logit.",
        "variance.png",
    )


def _parts(keys: Mapping[Head, HeadKeys], frame: pd.DataFrame) -> tuple[Table, Finding]:
    rows: list[tuple[Cell, ...]] = []
    columns = [frame[name].tolist() for name in ("total", *_SHARES)]
    for head, total, *parts in zip(keys, *columns, strict=True):
        rows.append((str(head), total**0.5, *(part / total for part in parts)))
    table = Table(
        "Bias of directions on a key's logit at alpha = 1, with every content at every position: standard deviation, "
        "and shares of its variance",
        ("head", "standard deviation (logits)", *_SHARES),
        tuple(rows),
    )
    mean = float((frame["content"] / frame["total"]).mean())
    return table, Finding(
        f"Content (the token, regardless of its position) explains {100 * mean:.0f} % of the variance of the first "
        f"{len(rows)} directions' bias. The rest is position and the interaction of both."
    )


def _tokens(study: Study, keys: Mapping[Head, HeadKeys]) -> Table:
    """Table of the tokens that each head's direction favours most and least."""
    return Table(
        "Tokens that directions favour and disfavour most, their number of occurrences, and the bias on their logits "
        "at alpha = 1, averaged over positions",
        ("head", *(f"{side}{column}" for side in ("favoured", "disfavoured") for column in _COLUMNS)),
        tuple((str(head), *row) for head in keys for row in _tokens_of(study, keys, head)),
    )


def _tokens_of(study: Study, keys: Mapping[Head, HeadKeys], head: Head) -> list[tuple[Cell, ...]]:
    head_keys, positions, n = keys[head], _positions(keys), study.settings.anatomy.tokens
    rotary = study.model.backend.rotary(head.layer, len(positions))
    frame = token_preferences(
        study.directions.select([head]).query[0],
        head_keys.contents,
        head_keys.token_ids,
        rotary,
        positions,
        study.model.backend.scale(head.layer),
        tokenizer=study.model.tokenizer,
    )
    records = frame.to_dict("records")
    return [
        tuple(cell for row in pair for cell in (repr(row["text"]), int(row["count"]), float(row["mean_bias"])))
        for pair in zip(records[:n], records[::-1][:n], strict=True)
    ]
