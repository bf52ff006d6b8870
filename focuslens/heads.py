"""Attention heads: names, rankings and random draws."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, SupportsIndex, overload

from jaxtyping import Float
from torch import Tensor

from focuslens.util.checks import checked_integer
from focuslens.util.html import Markup, card, details, table
from focuslens.util.ranking_files import FORMS, write_ranking
from focuslens.util.rankings import read_ranking

__all__ = [
    "Head",
    "HeadKind",
    "HeadList",
    "ModelShape",
    "Sparsity",
    "as_heads",
    "check_heads",
    "heads_by_layer",
    "load_ranking",
    "random_heads",
    "rank_heads",
    "save_ranking",
    "sparsity",
    "top_heads",
    "whole_prompt_heads",
]


class Head(NamedTuple):
    """Query head, identified by its layer and its index within the layer. Both are counted from 0.

    A ``Head`` equals the plain tuple ``(layer, head)``.
    """

    layer: int
    head: int

    def __str__(self) -> str:
        return f"L{self.layer}H{self.head}"


@dataclass(frozen=True)
class HeadKind:
    """Kind of the attention heads of a layer. Its text is, for example, ``full`` or ``window 512, sink-gated``.

    Attributes:
        window: Maximum number of tokens that a head attends to, including the row's own token; ``None`` for no limit.
        chunk: Length of the chunks of a prompt, in tokens, outside of which a head sees nothing; ``None`` for none.
        sink: Whether each head has a sink: one further logit that takes attention and has no value.
        rotary: Whether queries and keys are rotated. Heads without rotation cannot tell positions.
    """

    window: int | None = None
    chunk: int | None = None
    sink: bool = False
    rotary: bool = True

    def __str__(self) -> str:
        reach = "full" if self.window is None else f"window {self.window}"
        reach = reach if self.chunk is None else f"chunk {self.chunk}"
        return ", ".join((reach, *(("sink-gated",) if self.sink else ()), *(() if self.rotary else ("no rotary",))))

    @property
    def plain(self) -> bool:
        """Whether the heads are those of most models: full, rotary and without a sink."""
        return self == HeadKind()

    def sees(self, n_tokens: int | None = None) -> bool:
        """Whether a row at the end of ``n_tokens`` tokens sees all of them; without a number, of any prompt."""
        limits = [limit for limit in (self.window, self.chunk) if limit is not None]
        return not limits or (n_tokens is not None and n_tokens <= min(limits))


@dataclass(frozen=True)
class ModelShape:
    """Model dimensions that interventions and scores depend on."""

    n_layers: int
    n_heads: int
    n_key_value_heads: int
    d_head: int
    d_model: int
    d_vocab: int
    n_ctx: int

    def key_value_head(self, head: int) -> int:
        """Index, within the layer, of the key-value head that the query head ``head`` uses."""
        return head // (self.n_heads // self.n_key_value_heads)


class HeadList(list[Head]):
    """List of heads, such as a ranking, with a readable representation. A slice of a ``HeadList`` is a ``HeadList``."""

    @overload
    def __getitem__(self, index: SupportsIndex) -> Head: ...
    @overload
    def __getitem__(self, index: slice) -> HeadList: ...
    def __getitem__(self, index: SupportsIndex | slice) -> Head | HeadList:
        selection = super().__getitem__(index)
        return HeadList(selection) if isinstance(selection, list) else selection

    def __repr__(self) -> str:
        names = [str(head) for head in self[:_SHOWN]]
        rest = f", ... {len(self)} heads" if len(self) > _SHOWN else ""
        return f"[{', '.join(names)}{rest}]"

    def _repr_html_(self) -> str:
        layers = heads_by_layer(self)
        rows = [(layer, ", ".join(f"H{head}" for head in sorted(indices))) for layer, indices in layers.items()]
        order = " ".join(f"{i}. {head}" for i, head in enumerate(self[:_SHOWN], start=1))
        rest = f" ... {len(self)}" if len(self) > _SHOWN else ""
        ranking = Markup(f"<div>{order}{rest}</div>")
        return card(f"{len(self)} heads", ranking, details("By layer", table(("layer", "heads"), rows)))


_SHOWN = 40
"""Maximum number of heads in the representation of a ``HeadList``."""


def as_heads(pairs: Iterable[tuple[int, int]]) -> tuple[Head, ...]:
    """Convert ``(layer, head)`` pairs to a tuple of :class:`Head`. NumPy integers become Python integers.

    Raises:
        TypeError: If ``pairs`` does not consist of pairs of integers.
    """
    if isinstance(pairs, str) or not isinstance(pairs, Iterable):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"heads is {pairs!r}; {_PAIRS}")
    return tuple(_as_head(pair) for pair in pairs)


_PAIRS = "heads are (layer, head) pairs, both counted from 0, such as [(12, 3), (14, 0)]"


def _as_head(pair: Any) -> Head:
    try:
        layer, head = pair
        return Head(checked_integer(layer, "layer"), checked_integer(head, "head"))
    except (TypeError, ValueError) as error:
        raise TypeError(f"{pair!r} is not a head; {_PAIRS}") from error


def rank_heads(scores: Float[Tensor, "layer head"]) -> HeadList:
    """All heads, highest score first. Ties are broken by layer, then by head index.

    Raises:
        ValueError: If a score is NaN, for example because every response was empty.
    """
    _check_scores(scores)
    if scores.isnan().any():
        raise ValueError(
            "scores contain NaN, so there is no ranking: no response was scored, or the model's numbers overflowed"
        )
    order = scores.flatten().argsort(descending=True, stable=True).tolist()
    return HeadList(Head(*divmod(index, scores.shape[1])) for index in order)


def _check_scores(scores: Any) -> None:
    if not isinstance(scores, Tensor) or scores.ndim != 2:
        what = f"has the shape {tuple(scores.shape)}" if isinstance(scores, Tensor) else f"is a {type(scores).__name__}"
        raise TypeError(f"scores {what}; it must be a tensor [layer, head], such as the mean() of contextual scores")


def top_heads(scores: Float[Tensor, "layer head"], k: int) -> HeadList:
    """The ``k`` heads with the highest scores, best first. Ties are broken as in :func:`rank_heads`.

    Raises:
        ValueError: If ``k`` is negative or larger than the number of heads, or a score is NaN.
    """
    ranking = rank_heads(scores)
    if not 0 <= k <= len(ranking):
        raise ValueError(f"k is {k}; the model has {len(ranking)} heads")
    return ranking[:k]


def random_heads(
    n_layers: int, n_heads: int, k: int, *, exclude: Iterable[tuple[int, int]] = (), seed: int = 0
) -> HeadList:
    """Draw ``k`` distinct heads uniformly from all heads that are not excluded, as a control for contextual heads.

    If two draws have the same seed and exclusions, the smaller draw is a prefix of the larger draw.

    Raises:
        ValueError: If ``k`` is negative, or fewer than ``k`` heads remain after the exclusions.
    """
    excluded = set(as_heads(exclude))
    pool = [Head(layer, head) for layer in range(n_layers) for head in range(n_heads)]
    pool = [head for head in pool if head not in excluded]
    if not 0 <= k <= len(pool):
        raise ValueError(f"cannot draw {k} random heads: {len(pool)} are left of {n_layers * n_heads}")
    random.Random(seed).shuffle(pool)
    return HeadList(pool[:k])


def heads_by_layer(heads: Iterable[tuple[int, int]]) -> dict[int, list[int]]:
    """Head indices by layer. Layers are in ascending order. The indices of a layer are in the order of ``heads``."""
    grouped: defaultdict[int, list[int]] = defaultdict(list)
    for layer, head in heads:
        grouped[layer].append(head)
    return dict(sorted(grouped.items()))


def check_heads(heads: Iterable[tuple[int, int]], n_layers: int, n_heads: int) -> tuple[Head, ...]:
    """Convert ``(layer, head)`` pairs to a tuple of :class:`Head`, and check that every head exists and occurs once.

    Raises:
        TypeError: If ``heads`` does not consist of pairs of integers.
        ValueError: If a head occurs twice, or does not exist in a model with ``n_layers`` layers of ``n_heads`` heads.
    """
    checked = as_heads(heads)
    for layer, head in checked:
        if not (0 <= layer < n_layers and 0 <= head < n_heads):
            raise ValueError(
                f"head ({layer}, {head}) does not exist: the model has layers 0 to {n_layers - 1} "
                f"with heads 0 to {n_heads - 1}"
            )
    if len(set(checked)) < len(checked):
        duplicates = sorted({head for head in checked if checked.count(head) > 1})
        raise ValueError(f"heads named more than once: {', '.join(map(str, duplicates))}")
    return checked


def whole_prompt_heads(
    heads: Iterable[tuple[int, int]], kinds: Sequence[HeadKind], n_tokens: int | None = None
) -> HeadList:
    """The heads that can see a whole prompt, in their order. Heads with a window or chunks are left out.

    Args:
        heads: ``(layer, head)`` pairs, such as a ranking.
        kinds: Kind of the heads of each layer: :attr:`FocusModel.head_kinds`.
        n_tokens: Length of the prompt and its response, in tokens. A window of this length or more sees the whole
            prompt. By default, no window does.

    Raises:
        ValueError: If a head is in a layer without a kind.
    """
    checked = as_heads(heads)
    for head in checked:
        if not 0 <= head.layer < len(kinds):
            raise ValueError(f"head {head} is in layer {head.layer}, and there are kinds of {len(kinds)} layers")
    return HeadList(head for head in checked if kinds[head.layer].sees(n_tokens))


@dataclass(frozen=True)
class Sparsity:
    """Number of heads with a score above a threshold, and the layers of these heads (section 2.2 of the paper).

    Attributes:
        threshold: Threshold for a head's relevant contextual score.
        count: Number of heads with a score above the threshold.
        fraction: ``count`` divided by the total number of heads.
        layers: First and last layer that contain a counted head; ``None`` if no head is counted.
    """

    threshold: float
    count: int
    fraction: float
    layers: tuple[int, int] | None

    def __str__(self) -> str:
        where = f"layers {self.layers[0]} to {self.layers[1]}" if self.layers else "no layer"
        return f"> {self.threshold:g}: {self.count} heads ({self.fraction:.1%}), {where}"


def sparsity(
    scores: Float[Tensor, "layer head"], thresholds: Sequence[float] = (0.2, 0.1, 0.05)
) -> tuple[Sparsity, ...]:
    """Number of heads with a score strictly above each threshold, and the layers of these heads."""
    _check_scores(scores)
    rows: list[Sparsity] = []
    for threshold in thresholds:
        above = scores > threshold
        layers = above.any(dim=1).nonzero().flatten().tolist()
        count = int(above.sum())
        rows.append(Sparsity(threshold, count, count / above.numel(), (layers[0], layers[-1]) if layers else None))
    return tuple(rows)


def load_ranking(path: str | Path, *, shape: ModelShape | None = None) -> HeadList:
    """Read a ranking of heads, best first, from a file, or one that ships with the package by the model's name.

    The ranking of ``smollm2-135m-instruct`` ships with the package; ``docs/real-models.md`` says how it was made. A
    JSON file contains a list ``[[layer, head], ...]``, which is the format of the paper's authors, or an object with
    such a list under the key ``"heads"``, which is the format of ``focuslens heads``. These published formats are read
    too:

    * **QRHead** (``configs/*.yaml``): ``attn_head_set: "13-16,12-12"``, as layer and head.
    * **DySCO** (``dysco_cfgs/*.yaml``): ``selected_heads: "[(17,24),(14,31)]"``.
    * **CoRe** (``head_data/*.json``): ``{"0-0": score, ...}``; the head with the largest score comes first.
    * **Retrieval heads** (``head_score/*.json``): ``{"0-0": [scores], ...}``; the largest mean comes first.
    * **PASTA** (``config/*.json``): ``{"layer": [heads], ...}``, in the order of the file.
    * **DuoAttention** (``attn_patterns/*/*``, the directory or its ``full_attention_heads.tsv``): one row per layer and
      one column per key-value head; the largest value comes first. All query heads of a key-value head follow each
      other. Key-value heads with the value 0 are left out.

    Heads are counted from 0 in all of them. Query heads are meant in all but the last.

    Args:
        path: The file, the directory of a pattern, or the name of a ranking that ships with the package.
        shape: Sizes of the model, ``model.shape``, which DuoAttention's format needs.

    Raises:
        FileNotFoundError: If there is neither a file nor a ranking of this name.
        ValueError: If the file is in none of the formats, or in DuoAttention's and ``shape`` is not given, or does not
            fit.
    """
    group = None if shape is None else shape.n_heads // shape.n_key_value_heads
    heads = HeadList(Head(layer, head) for layer, head in read_ranking(path, group))
    if shape is not None:
        check_heads(heads, shape.n_layers, shape.n_heads)
    return heads


def save_ranking(
    ranking: Iterable[tuple[int, int]], path: str | Path, *, form: str = "focuslens", shape: ModelShape | None = None
) -> None:
    """Write a ranking of heads, best first, in FocusLens's form or in that of another program.

    * ``focuslens``: a JSON list ``[[layer, head], ...]``, which is also the format of the paper's authors.
    * ``qrhead``: a YAML file with ``attn_head_set: "13-16,12-12"``, the configuration of QRHead. It uses all heads of
      the set, so write the best heads alone, e.g. ``ranking[:16]``.
    * ``duoattention``: a directory with ``full_attention_heads.tsv`` and ``config.json``, as DuoAttention's
      ``load_attn_pattern`` reads it. There is one value per key-value head, because DuoAttention keeps or drops the
      keys that query heads share. A key-value head has the rank of the best of its query heads. The values are evenly
      spaced from 1 for the best, so DuoAttention's sparsity of 0.5 keeps the better half. Key-value heads without a
      head in the ranking have the value 0. The configuration has the sink of 128 and the recent window of 256 tokens of
      DuoAttention's own pattern for Llama 3.1.

    :func:`load_ranking` reads all of them.

    Args:
        ranking: The heads, best first, such as ``scores.ranking()``.
        path: The file, or the directory in the form ``duoattention``.
        form: The form.
        shape: Sizes of the model, ``model.shape``, which the form ``duoattention`` needs.

    Raises:
        ValueError: If ``form`` is unknown, a head does not exist or occurs twice, the ranking is empty, or ``shape`` is
            missing.
    """
    heads = as_heads(ranking)
    if form not in FORMS:
        raise ValueError(f"form is {form!r}; it must be one of {', '.join(FORMS)}")
    if not heads:
        raise ValueError("the ranking is empty; there is nothing to write")
    if shape is None:
        if form == "duoattention":
            raise ValueError("the form 'duoattention' has one value per key-value head; pass shape=model.shape")
        write_ranking(check_heads(heads, *(1 + max(place) for place in zip(*heads, strict=True))), Path(path), form)
        return
    groups = shape.n_key_value_heads
    sizes = {"n_layers": shape.n_layers, "n_groups": groups, "group": shape.n_heads // groups}
    write_ranking(check_heads(heads, shape.n_layers, shape.n_heads), Path(path), form, **sizes)
