"""Effect of a focus direction on attention logits at the rotary site, by the content and the position of the keys.

At the rotary site, ``alpha * d_Q`` adds the bias ``alpha * b`` to the logit of a key. The bias is the same for every
query::

    b(p, kappa) = scale * d_Q . R(p) kappa = scale * (R(p)^T d_Q) . kappa

Here, ``kappa`` is the key vector before the rotary embedding, which is called the *content* of the key. ``R(p)`` is the
rotation at the key's absolute position ``p``. ``scale`` is the factor that multiplies the query-key products, usually
``1 / sqrt(d_head)``. Softmax ignores a constant that is added to all logits of a row. Therefore, only differences of
``b`` between keys matter. All biases in this module are in logits, for ``alpha = 1``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from einops import einsum, rearrange, reduce
from jaxtyping import Float, Float64, Int
from torch import Tensor

from focuslens.directions.activations import LayerHeads
from focuslens.directions.head_keys import HeadKeys
from focuslens.heads import Head, check_heads
from focuslens.hooks import Hook, hook_name
from focuslens.interventions.directions import FocusDirections
from focuslens.model.rotary import Rotary, rotate
from focuslens.prompts.batch import EncodedPrompt
from focuslens.util.progress import track

if TYPE_CHECKING:
    from focuslens.model.focus_model import FocusModel

__all__ = [
    "Decomposition",
    "HeadKeys",
    "collect_keys",
    "decompose",
    "decompose_heads",
    "frequency_energy",
    "logit_bias",
    "position_bias",
    "token_preferences",
]


@dataclass(frozen=True)
class Decomposition:
    """Variance of the bias ``b`` (see :func:`logit_bias`) over the positions and contents of keys, in three components.

    All four values are in squared logits, for ``alpha = 1``. For any other strength, multiply them by ``alpha ** 2``.

    Attributes:
        total: Variance of ``b``, which is the sum of the three components.
        content: Variance over the contents of keys, after averaging ``b`` over positions.
        position: Variance over positions, after averaging ``b`` over the contents of keys.
        interaction: Remaining variance. It is zero if the difference in ``b`` between any two keys at the same position
            does not depend on the position.
    """

    total: float
    content: float
    position: float
    interaction: float


def frequency_energy(
    vectors: Float[Tensor, "n d_head"], *, adjacent_pairs: bool = False, rotary_dim: int | None = None
) -> Float64[Tensor, "n pair"]:
    """Share of each vector's squared norm in each rotary pair. Each row sums to 1.

    Columns are ordered from the fastest rotary pair to the slowest. If some dimensions are not rotated, one last column
    contains their total share.

    Args:
        vectors: Vectors before or after the rotary embedding. Both have the same shares, because a rotation preserves
            the norm of each pair.
        adjacent_pairs: Whether the pairs are the dimensions (0, 1), (2, 3), ..., as in GPT-J. By default, the pairs are
            the dimensions (i, i + rotary_dim / 2), as in most Hugging Face models.
        rotary_dim: Number of rotated dimensions. Rotated dimensions come first. By default, all dimensions are rotated.

    Raises:
        ValueError: If ``rotary_dim`` is odd, less than 2 or greater than ``d_head``, or if a vector is zero.
    """
    d_head = vectors.shape[1]
    rotary_dim = d_head if rotary_dim is None else rotary_dim
    if rotary_dim % 2 or not 2 <= rotary_dim <= d_head:
        raise ValueError(f"rotary_dim is {rotary_dim}; it must be an even number from 2 to d_head = {d_head}")
    energy = vectors.double().square()
    total = reduce(energy, "n d_head -> n 1", "sum")
    if not total.all():
        raise ValueError(f"vector {int(total[:, 0].argmin())} is zero, so its energy has no shares")
    order = "(pair two)" if adjacent_pairs else "(two pair)"
    shares = [reduce(energy[:, :rotary_dim], f"n {order} -> n pair", "sum", two=2)]
    if rotary_dim < d_head:
        shares.append(reduce(energy[:, rotary_dim:], "n d_head -> n 1", "sum"))
    return torch.cat(shares, dim=1) / total


@torch.no_grad()
def collect_keys(
    model: FocusModel,
    prompts: Iterable[str | EncodedPrompt],
    heads: Iterable[tuple[int, int]],
    max_keys: int = 10_000,
    *,
    seed: int = 0,
    progress: bool | None = None,
) -> dict[Head, HeadKeys]:
    """Collect the keys that each head reads on some prompts. The keys are taken before the rotary embedding.

    The keys are returned on the CPU. Query heads that share a key-value head have the same keys. No attention matrix of
    shape ``[T, T]`` is stored, where ``T`` is the length of a prompt.

    Args:
        model: The model.
        prompts: Prompts, run one at a time.
        heads: Query heads whose keys are collected.
        max_keys: Maximum number of keys per head. If the prompts have more tokens in total, ``max_keys`` of the tokens
            are drawn uniformly at random.
        seed: Seed of the random draw.
        progress: Whether to show a progress bar; :mod:`focuslens.util.progress` describes the default.

    Raises:
        ValueError: If there are no prompts or heads, if ``max_keys`` is less than 1, if a head does not exist or is
            listed twice, if a prompt does not fit into the context, or if the model has no supported rotary embedding.
    """
    encoded = [model.encode(prompt) for prompt in prompts]
    chosen = check_heads(heads, model.shape.n_layers, model.shape.n_heads)
    if not encoded or not chosen:
        raise ValueError(f"there are {len(encoded)} prompts and {len(chosen)} heads; give at least one of each")
    if max_keys < 1:
        raise ValueError(f"max_keys is {max_keys}; it must be at least 1")
    positions = _draw([len(prompt.tokens) for prompt in encoded], max_keys, seed)
    groups = LayerHeads.group(chosen, model.shape)
    drawn = [(prompt, at) for prompt, at in zip(encoded, positions, strict=True) if len(at)]
    tracked = track(drawn, "keys of heads", unit="prompt", show=progress)
    contents_by_prompt = [_contents(model, prompt, groups, at) for prompt, at in tracked]
    tokens = torch.cat([prompt.tokens[at] for prompt, at in zip(encoded, positions, strict=True)])
    keys: dict[Head, HeadKeys] = {}
    for group in groups:
        contents = torch.cat([by_layer[group.layer] for by_layer in contents_by_prompt])
        for head, read in zip(group.heads, group.reads, strict=True):
            keys[Head(group.layer, head)] = HeadKeys(contents[:, read], tokens, torch.cat(positions))
    return {head: keys[head] for head in chosen}


def logit_bias(
    direction: Float[Tensor, "d_head"],
    contents: Float[Tensor, "key d_head"],
    positions: Int[Tensor, "key"],
    rotary: Rotary,
    scale: float,
) -> Float64[Tensor, "key"]:
    """Bias ``b`` that a direction adds to the logit of each key at ``alpha = 1``.

    Args:
        direction: Query vector ``d_Q`` at the rotary site.
        contents: Keys before the rotary embedding.
        positions: Absolute position of each key.
        rotary: Rotary tables of the layer. The query and key norms of ``rotary`` are not applied.
        scale: Factor that multiplies the query-key products.

    Raises:
        ValueError: If there are no keys, if the numbers of positions and keys differ, or if a position is outside the
            rotary tables.
    """
    if len(positions) != len(contents):
        raise ValueError(f"there are {len(positions)} positions for {len(contents)} keys; give one for each")
    readers = _readers(direction, rotary, positions, scale)
    return einsum(readers, contents.double().cpu(), "key d_head, key d_head -> key")


def decompose(
    direction: Float[Tensor, "d_head"],
    contents: Float[Tensor, "key d_head"],
    positions: Int[Tensor, "pos"],
    rotary: Rotary,
    scale: float,
) -> Decomposition:
    """Two-way functional ANOVA (analysis of variance) of ``b(p, kappa)``, over all pairs of a key and a position.

    Let ``u(p) = scale * R(p)^T d_Q``. The statistics of ``u`` are taken over positions, and the statistics of
    ``kappa`` over keys. All statistics are computed in double precision::

        content = Var(mean(u) . kappa)    position = Var(u(p) . mean(kappa))    interaction = trace(Cov(u) Cov(kappa))

    In a text, the content and the position of a key are not independent: a BOS token, for example, is always at
    position 0. Therefore, the variance of :func:`logit_bias` over the keys of a text differs from ``total``.

    Args:
        direction: Query vector ``d_Q`` at the rotary site.
        contents: Keys before the rotary embedding, with equal weights.
        positions: Absolute positions, with equal weights. Every key is combined with every position.
        rotary: Rotary tables of the layer. The query and key norms of ``rotary`` are not applied.
        scale: Factor that multiplies the query-key products.

    Raises:
        ValueError: If there are no keys or positions, or if a position is outside the rotary tables.
    """
    readers, contents = _readers(direction, rotary, positions, scale), _require_keys(contents)
    reader, content = readers.mean(dim=0), contents.mean(dim=0)
    by_position, by_content = (readers - reader) @ content, (contents - content) @ reader
    parts = {
        "content": float(by_content.square().mean()),
        "position": float(by_position.square().mean()),
        # The interaction is (u - mean u) . (kappa - mean kappa). Its factors are independent of each other.
        "interaction": float((_covariance(readers) * _covariance(contents)).sum()),
    }
    return Decomposition(total=sum(parts.values()), **parts)


def position_bias(
    direction: Float[Tensor, "d_head"],
    mean_content: Float[Tensor, "d_head"],
    rotary: Rotary,
    positions: Int[Tensor, "pos"],
    scale: float,
) -> Float64[Tensor, "pos"]:
    """Bias ``b`` of a key with the content ``mean_content`` at each absolute position.

    If ``mean_content`` is the mean over several keys, the result is the mean of their biases, because ``b`` is linear.

    Raises:
        ValueError: If there are no positions, or if a position is outside the rotary tables.
    """
    return _readers(direction, rotary, positions, scale) @ mean_content.double().cpu()


def token_preferences(
    direction: Float[Tensor, "d_head"],
    contents: Float[Tensor, "key d_head"],
    token_ids: Int[Tensor, "key"],
    rotary: Rotary,
    positions: Int[Tensor, "pos"],
    scale: float,
    min_count: int = 5,
    *,
    tokenizer: Any | None = None,
) -> pd.DataFrame:
    """Preference of a direction for each token: ``b``, averaged over positions and over the token's occurrences.

    Args:
        direction: Query vector ``d_Q`` at the rotary site.
        contents: Keys before the rotary embedding.
        token_ids: Token id of each key.
        rotary: Rotary tables of the layer. The query and key norms of ``rotary`` are not applied.
        positions: Absolute positions to average over, with equal weights.
        scale: Factor that multiplies the query-key products.
        min_count: Minimum number of occurrences of a token. Rarer tokens are left out.
        tokenizer: Tokenizer that decodes the tokens for a ``text`` column. With ``None``, this column is left out.

    Returns:
        Table with the columns ``token``, ``count`` and ``mean_bias``, sorted by ``mean_bias`` in descending order. The
        table is empty if no token occurs ``min_count`` times.

    Raises:
        ValueError: If there are no keys or positions, if the numbers of tokens and keys differ, or if a position is
            outside the rotary tables.
    """
    if len(token_ids) != len(contents):
        raise ValueError(f"there are {len(token_ids)} tokens for {len(contents)} keys; give one for each")
    bias = _require_keys(contents) @ _readers(direction, rotary, positions, scale).mean(dim=0)
    keys = pd.DataFrame({"token": token_ids.cpu().numpy(), "bias": bias.numpy()})
    frame = keys.groupby("token", as_index=False).agg(count=("bias", "size"), mean_bias=("bias", "mean"))
    frame = frame[frame["count"] >= min_count].sort_values("mean_bias", ascending=False, kind="stable")
    if tokenizer is not None:
        frame["text"] = [tokenizer.decode([token]) for token in frame["token"].tolist()]
    return frame.reset_index(drop=True)


def decompose_heads(
    model: FocusModel,
    directions: FocusDirections,
    keys: Mapping[Head, HeadKeys],
    positions: Int[Tensor, "pos"] | None = None,
) -> pd.DataFrame:
    """Run :func:`decompose` for every head in ``keys``, and return the results as a table.

    Args:
        model: Model from which the keys were collected.
        directions: Directions of this model at the rotary site. If they have a rank, only their constant part is
            decomposed; see :func:`attention_shift` for the other.
        keys: Keys of each head, from :func:`collect_keys`.
        positions: Absolute positions, with equal weights. By default, a head's positions range from 0 to the largest
            position of its keys.

    Returns:
        Table with the columns ``layer``, ``head``, ``total``, ``content``, ``position``, ``interaction`` and
        ``in_place``. ``in_place`` is the variance of :func:`logit_bias` over the keys, with each key at its original
        position. All variances are in squared logits, for ``alpha = 1``.

    Raises:
        ValueError: If the directions are not for the rotary site, do not fit the model, or lack a head in ``keys``.
    """
    if directions.site != "rotary":
        raise ValueError(
            f"directions are of the {directions.site!r} site; they add the same bias for every query only at the "
            "rotary site"
        )
    directions.require_shape(model.shape)
    rows: list[dict[str, Any]] = []
    for head, vector in zip(keys, directions.select(keys).query, strict=True):
        own = keys[head]
        places = torch.arange(int(own.positions.max()) + 1) if positions is None else positions
        rotary = model.backend.rotary(head.layer, int(max(places.max(), own.positions.max())) + 1)
        scale = model.backend.scale(head.layer)
        parts = decompose(vector, own.contents, places, rotary, scale)
        in_place = logit_bias(vector, own.contents, own.positions, rotary, scale).var(correction=0)
        rows.append({**head._asdict(), **vars(parts), "in_place": float(in_place)})
    return pd.DataFrame(rows)


def _readers(
    direction: Float[Tensor, "d_head"], rotary: Rotary, positions: Int[Tensor, "pos"], scale: float
) -> Float64[Tensor, "pos d_head"]:
    """Vector ``u(p) = scale * R(p)^T d_Q`` per position. A key ``kappa`` at ``p`` gets the bias ``u(p) . kappa``."""
    if not len(positions):
        raise ValueError("there are no positions; give at least one")
    if int(positions.min()) < 0 or int(positions.max()) >= len(rotary.cos):
        raise ValueError(
            f"positions go from {int(positions.min())} to {int(positions.max())}; the rotary tables have 0 to "
            f"{len(rotary.cos) - 1}"
        )
    cos, sin = (table.double().cpu()[positions.cpu()] for table in (rotary.cos, rotary.sin))
    direction = scale * rearrange(direction.double().cpu(), "d_head -> 1 1 d_head").expand(len(positions), 1, -1)
    # The transpose of a rotation is the rotation by the opposite angle.
    rotated = rotate(direction, cos, -sin, adjacent_pairs=rotary.adjacent_pairs)
    return rearrange(rotated, "pos 1 d_head -> pos d_head")


def _require_keys(contents: Float[Tensor, "key d_head"]) -> Float64[Tensor, "key d_head"]:
    if not len(contents):
        raise ValueError("there are no keys; give at least one")
    return contents.double().cpu()


def _covariance(x: Float64[Tensor, "n d_head"]) -> Float64[Tensor, "d_head d_head_"]:
    centred = x - x.mean(dim=0)
    return einsum(centred, centred, "n i, n j -> i j") / len(x)


def _draw(lengths: Sequence[int], most: int, seed: int) -> list[Int[Tensor, "chosen"]]:
    """Positions to use in each prompt, in ascending order.

    If the prompts have more than ``most`` positions in total, ``most`` of the positions are drawn uniformly at random.
    """
    total = sum(lengths)
    drawn = torch.arange(total)
    if total > most:
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randperm(total, generator=generator)[:most].sort().values
    starts = torch.tensor([0, *lengths]).cumsum(0).tolist()
    return [drawn[(drawn >= start) & (drawn < end)] - start for start, end in pairwise(starts)]


def _contents(
    model: FocusModel, prompt: EncodedPrompt, groups: Sequence[LayerHeads], positions: Int[Tensor, "chosen"]
) -> dict[int, Float[Tensor, "chosen kv_head d_head"]]:
    """Keys of one prompt before the rotary embedding, by layer, for the key-value heads of each group."""
    projected: dict[int, Tensor] = {}

    def record(group: LayerHeads) -> Any:
        def observe(keys: Float[Tensor, "batch pos head d_head"], hook: Any) -> None:
            projected[group.layer] = keys[0, positions.to(keys.device)][:, list(group.key_value_heads)]

        return observe

    observers: list[Hook] = [(hook_name(group.layer, "hook_k"), record(group)) for group in groups]
    model.observe(prompt.tokens, observers)
    norms = {layer: model.backend.rotary(layer, 1).key_norm for layer in projected}
    return {
        layer: (keys if (norm := norms[layer]) is None else norm(keys)).float().cpu()
        for layer, keys in projected.items()
    }
