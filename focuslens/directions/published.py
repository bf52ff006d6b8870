"""Statistics of the directions and head rankings that the paper's authors published. Model weights are not needed."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from torch import Tensor

from focuslens.directions.anatomy import frequency_energy
from focuslens.heads import Head, check_heads, load_ranking
from focuslens.interventions.directions import FocusDirections

__all__ = [
    "INITIAL_STD",
    "PublishedModel",
    "compare_published",
    "depth_profile",
    "frequency_profile",
    "head_table",
    "initial_norm",
    "load_published",
    "load_published_ranking",
    "rebin",
    "shared_by_chance",
    "summarize_published",
]

INITIAL_STD = 0.01
"""Standard deviation of the normal distribution from which the authors drew the initial vectors of their training."""

_DIRECTIONS, _RANKINGS = "head_features", "contextual_heads_scores_full_seq"
_DRAWS = 2000


@dataclass(frozen=True, eq=False)
class PublishedModel:
    """Directions and head ranking that the paper's authors published for one model.

    Attributes:
        name: Name of the model's folder.
        directions: Focus directions of all heads, at the rotary site.
        ranking: Heads in descending order of their relevant contextual score.
        sources: SHA-256 of every source file, keyed by the file's path relative to the folder that was loaded.
    """

    name: str
    directions: FocusDirections
    ranking: tuple[Head, ...]
    sources: Mapping[str, str]

    @property
    def n_layers(self) -> int:
        """Number of layers."""
        return 1 + max(head.layer for head in self.directions.heads)

    @property
    def n_heads(self) -> int:
        """Number of query heads per layer."""
        return 1 + max(head.head for head in self.directions.heads)

    @property
    def label(self) -> str:
        """Model name without the owner: ``Llama-3.2-3B-Instruct`` for ``meta-llama_Llama-3.2-3B-Instruct``."""
        return self.name.partition("_")[2] or self.name

    def top(self, k: int) -> tuple[Head, ...]:
        """First ``k`` heads of the ranking.

        Raises:
            ValueError: If ``k`` is not between 1 and the number of ranked heads.
        """
        if not 1 <= k <= len(self.ranking):
            raise ValueError(
                f"top is {k}; the ranking of {self.name} has {len(self.ranking)} heads: give 1 to {len(self.ranking)}"
            )
        return self.ranking[:k]


def load_published_ranking(path: str | Path, n_layers: int | None = None, n_heads: int | None = None) -> list[Head]:
    """Read a ranking ``[[layer, head], ...]``, best head first, from one of the authors' ``relevant_heads.json`` files.

    Args:
        path: Path of the file.
        n_layers: Number of layers of the model, if known.
        n_heads: Number of query heads per layer, if known.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If the file is not a ranking, or if the ranking is empty, lists a head twice, or lists a head that
            does not exist.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {path}")
    ranking = load_ranking(path)
    if not ranking:
        raise ValueError(f"{path} contains an empty ranking")
    try:
        check_heads(
            ranking,
            1 + max(head.layer for head in ranking) if n_layers is None else n_layers,
            1 + max(head.head for head in ranking) if n_heads is None else n_heads,
        )
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return ranking


def load_published(directory: str | Path) -> list[PublishedModel]:
    """Read the directions and rankings of all models in a folder with the authors' layout, sorted by model name.

    For each model, the folder contains the files
    ``head_features/MODEL/direction_relevant/head_{q,k}_directions_LAYER.pth`` and
    ``contextual_heads_scores_full_seq/MODEL/relevant_heads.json``.

    Raises:
        FileNotFoundError: If a folder or a file is missing.
        ValueError: If the vectors of a model differ in shape, or if a ranking is not valid (see
            :func:`load_published_ranking`).
    """
    directory = Path(directory)
    if not (directory / _DIRECTIONS).is_dir():
        raise FileNotFoundError(f"there is no folder {directory / _DIRECTIONS}; name the folder that holds it")
    folders = [path for path in (directory / _DIRECTIONS).iterdir() if path.is_dir()]
    if not folders:
        raise FileNotFoundError(f"{directory / _DIRECTIONS} contains no folder of a model")
    return [_load(directory, path.name) for path in sorted(folders, key=lambda path: path.name.casefold())]


def _load(directory: Path, name: str) -> PublishedModel:
    vectors = directory / _DIRECTIONS / name / "direction_relevant"
    if not vectors.is_dir():
        raise FileNotFoundError(f"there is no folder {vectors}")
    directions = FocusDirections.from_published(vectors)
    layers = 1 + directions.heads[-1].layer
    ranked = directory / _RANKINGS / name / "relevant_heads.json"
    ranking = load_published_ranking(ranked, layers, 1 + directions.heads[-1].head)
    files = [vectors / f"head_{part}_directions_{layer}.pth" for layer in range(layers) for part in "qk"]
    sources = {
        file.relative_to(directory).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in (ranked, *files)
    }
    return PublishedModel(name, directions, tuple(ranking), sources)


def initial_norm(d_head: int) -> float:
    """Root mean square norm of the initial vectors in the authors' training: ``0.01 * sqrt(d_head)``."""
    return INITIAL_STD * math.sqrt(d_head)


def head_table(model: PublishedModel) -> pd.DataFrame:
    """Table with one row per head, best head first.

    The columns are ``rank``, ``layer``, ``head``, ``query_norm``, ``key_norm`` and ``quarter_1`` to ``quarter_4``.
    ``rank`` counts from 1 and is missing for heads that are not in the ranking. ``query_norm`` and ``key_norm`` are the
    norms of ``d_Q`` and ``d_K``. ``quarter_1`` to ``quarter_4`` are the shares of the energy (squared norm) of ``d_Q``
    in the four quarters of the rotary pairs, fastest quarter first.
    """
    directions, ranks = model.directions, {head: rank for rank, head in enumerate(model.ranking, start=1)}
    numbers = pd.Series([ranks.get(head) for head in directions.heads], dtype="Int64", name="rank")
    frame = pd.concat((numbers, pd.DataFrame(directions.heads, columns=["layer", "head"])), axis=1)
    frame["query_norm"] = _norms(directions.query)
    frame["key_norm"] = None if directions.key is None else _norms(directions.key)
    quarters = np.stack([rebin(shares, 4) for shares in frequency_energy(directions.query).numpy()])
    for i, column in enumerate(quarters.T, start=1):
        frame[f"quarter_{i}"] = column
    return frame.sort_values("rank", kind="stable", ignore_index=True)


def frequency_profile(model: PublishedModel, top: int) -> pd.DataFrame:
    """Mean share of the energy (squared norm) of ``d_Q`` in each rotary pair, fastest pair first.

    The column ``top`` is the mean over the best ``top`` heads, and the column ``all`` is the mean over all heads.
    """
    shares = frequency_energy(model.directions.query).numpy()
    best = frequency_energy(model.directions.select(model.top(top)).query).numpy()
    return pd.DataFrame({"pair": range(shares.shape[1]), "top": best.mean(axis=0), "all": shares.mean(axis=0)})


def depth_profile(heads: Iterable[tuple[int, int]], n_layers: int, bins: int = 10) -> Float[np.ndarray, "bin"]:
    """Share of heads in equal bins of depth, from the start of the first layer (0) to the end of the last layer (1).

    Layer ``l`` covers the depths from ``l / n_layers`` to ``(l + 1) / n_layers``. If a layer overlaps several bins, its
    heads are divided among these bins in proportion to the overlap. Therefore, models with different numbers of layers
    can be compared.
    """
    counts = np.bincount([layer for layer, _ in heads], minlength=n_layers)
    return rebin(counts / counts.sum(), bins)


def rebin(mass: Float[np.ndarray, "cell"], bins: int) -> Float[np.ndarray, "bin"]:
    """Redistribute mass from cells of equal width to bins of equal width. Mass is spread evenly within a cell."""
    cumulative = np.concatenate(([0.0], np.cumsum(mass)))
    edges = np.interp(np.linspace(0, 1, bins + 1), np.linspace(0, 1, len(mass) + 1), cumulative)
    return np.diff(edges)


def summarize_published(model: PublishedModel, top: int) -> dict[str, Any]:
    """Summary statistics of a model, as one row of a table.

    The row contains the model's shape, the first and last layer of the best ``top`` heads, the minimum, median and
    maximum of the norms, and the mean energy of each quarter (see :func:`head_table`). Columns with ``top`` in their
    name describe the best ``top`` heads. Columns with ``all`` in their name describe all heads with a direction.
    ``peak_pair_top`` is the rotary pair with the largest mean share of energy, counted from 0 at the fastest pair.
    ``peak_share_top`` is this largest share.

    Raises:
        ValueError: If ``top`` is less than 1 or exceeds the number of ranked heads.
    """
    heads, table, pairs = model.top(top), head_table(model), frequency_profile(model, top)["top"].to_numpy()
    row: dict[str, Any] = {
        "model": model.name,
        "n_layers": model.n_layers,
        "n_heads": model.n_heads,
        "d_head": model.directions.d_head,
        "top": top,
        "first_layer": min(head.layer for head in heads),
        "last_layer": max(head.layer for head in heads),
        "initial_norm": initial_norm(model.directions.d_head),
    }
    for name, subset in (("top", table.head(top)), ("all", table)):
        for part in ("query", "key"):
            norms = subset[f"{part}_norm"]
            row |= {f"{part}_norm_{name}_{of}": float(norms.agg(of)) for of in ("min", "median", "max")}
        row |= {f"quarter_{i}_{name}": float(subset[f"quarter_{i}"].mean()) for i in range(1, 5)}
    return row | {"peak_pair_top": int(pairs.argmax()), "peak_share_top": float(pairs.max())}


def compare_published(models: Sequence[PublishedModel], top: int, bins: int = 10, *, seed: int = 0) -> pd.DataFrame:
    """Table of the similarity of the best heads between models, with one row per pair of models.

    ``shared`` is the number of ``(layer, head)`` pairs that are among the best ``top`` heads of both models.
    ``expected`` is the expected number of shared pairs if ``top`` heads are drawn at random from each model. ``p`` is
    the probability that such random draws share at least ``shared`` pairs. The index of a head within its layer has no
    meaning across independently trained models. Therefore, these three columns only test whether the models have a
    common ancestor. The depth columns can be used to compare any two models.

    ``depth_overlap`` is the overlap of the two depth profiles (see :func:`depth_profile`): the smaller of the two
    shares in each bin, summed over the bins. It is 1 for equal profiles. ``depth_correlation`` is the Pearson
    correlation of the profiles over the bins (NaN if a profile is flat). ``depth_overlap_chance`` is the mean overlap
    of 2,000 random draws of ``top`` heads from each model. ``depth_p`` is the share of these draws whose overlap is at
    least ``depth_overlap``.

    Raises:
        ValueError: If ``top`` is less than 1 or exceeds the number of ranked heads of a model.
    """
    columns = ["first", "second", "shared", "expected", "p"]
    columns += ["depth_overlap", "depth_overlap_chance", "depth_p", "depth_correlation"]
    rows = [_compare(a, b, top, bins, seed) for a, b in combinations(models, 2)]
    return pd.DataFrame(rows, columns=columns)


def _compare(a: PublishedModel, b: PublishedModel, top: int, bins: int, seed: int) -> tuple[Any, ...]:
    shared = len(set(a.top(top)) & set(b.top(top)))
    chances = shared_by_chance((a.n_layers, a.n_heads), (b.n_layers, b.n_heads), top)
    first, second = (depth_profile(model.top(top), model.n_layers, bins) for model in (a, b))
    overlap = float(np.minimum(first, second).sum())
    rng = np.random.default_rng(seed)
    drawn = np.minimum(_random_profiles(a, top, bins, rng), _random_profiles(b, top, bins, rng)).sum(axis=1)
    flat = min(first.std(), second.std()) < 1e-12
    return (
        a.name,
        b.name,
        shared,
        sum(number * chance for number, chance in enumerate(chances)),
        min(1.0, sum(chances[shared:])),
        overlap,
        float(drawn.mean()),
        float((drawn >= overlap - 1e-9).mean()),
        math.nan if flat else float(np.corrcoef(first, second)[0, 1]),
    )


def shared_by_chance(first: tuple[int, int], second: tuple[int, int], k: int) -> list[float]:
    """Probabilities of 0 to ``k`` shared ``(layer, head)`` pairs if ``k`` heads are drawn from each of two models.

    A pair can be shared only if it exists in both models. The expected number of shared pairs is
    ``k * k * common / (n_first * n_second)``. Here, ``common`` is the number of pairs that exist in both models, and
    ``n_first`` and ``n_second`` are the numbers of heads of the two models.

    Args:
        first: Number of layers and number of heads per layer of the first model.
        second: Number of layers and number of heads per layer of the second model.
        k: Number of heads drawn from each model, without replacement.
    """
    common = min(first[0], second[0]) * min(first[1], second[1])
    chances = [0.0] * (k + 1)
    # The draw from the first model contains ``reachable`` heads that exist in the second model. The draw from the
    # second model contains ``number`` of these heads.
    for reachable, chance in enumerate(_hypergeometric(math.prod(first), common, k)):
        for number, given in enumerate(_hypergeometric(math.prod(second), reachable, k)):
            chances[number] += chance * given
    return chances


def _hypergeometric(total: int, marked: int, drawn: int) -> list[float]:
    """Probabilities of 0, 1, ..., ``drawn`` marked items if ``drawn`` of ``total`` items are drawn."""
    ways = math.comb(total, drawn)
    return [math.comb(marked, n) * math.comb(total - marked, drawn - n) / ways for n in range(drawn + 1)]


def _random_profiles(
    model: PublishedModel, k: int, bins: int, rng: np.random.Generator
) -> Float[np.ndarray, "draw bin"]:
    layers = np.array([head.layer for head in model.directions.heads])
    draws = np.stack([rng.choice(len(layers), k, replace=False) for _ in range(_DRAWS)])
    parts = np.stack([rebin(layer, bins) for layer in np.eye(model.n_layers)])
    return parts[layers[draws]].mean(axis=1)


def _norms(vectors: Float[Tensor, "n d_head"]) -> Float[np.ndarray, "n"]:
    return vectors.double().norm(dim=1).numpy()
