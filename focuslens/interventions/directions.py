"""Focus directions that can be saved and shared: vectors with their heads, site and provenance."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import torch
from jaxtyping import Float
from safetensors.torch import load, save
from torch import Tensor

from focuslens.heads import Head, HeadList, as_heads, check_heads
from focuslens.interventions.low_rank import LowRank, check_matrices
from focuslens.util.files import write_atomically
from focuslens.util.frames import rows_frame
from focuslens.util.html import bar, card, details, shorten, table
from focuslens.util.shipped import shipped_directions, shipped_names

if TYPE_CHECKING:
    import pandas as pd

    from focuslens.heads import ModelShape

__all__ = ["FocusDirections", "Site", "open_directions"]

Site: TypeAlias = Literal["rotary", "projection"]
"""Site where vectors are added: after the rotary embedding (``hook_rot_q``) or before it (``hook_q``, ``hook_k``)."""

_VECTORS, _CONFIG = "directions.safetensors", "directions.json"
_PLAIN, _LOW_RANK = 1, 2
"""Format of the files of one vector per head, and of files that also contain ``u`` and ``v``."""

_PUBLISHED = "published files, "
_SHOWN = 20


@dataclass(frozen=True, eq=False)
class FocusDirections:
    """Focus directions: one query vector per head and, for the projection site, one key vector per head.

    With ``u`` and ``v``, the query vector of a head depends on the query ``q`` to which it is added:
    ``d_Q(q) = query + U V^T q``.

    Args:
        heads: The heads, best first if there is a ranking.
        query: ``d_Q`` of each head; the constant part of ``d_Q(q)`` if there are ``u`` and ``v``.
        key: ``d_K`` of each head, or ``None``. ``d_K`` has no effect at the rotary site (see :class:`FocusSteering`).
        site: Site of the vectors. A vector that was trained at one site has no meaning at the other site.
        provenance: Model, data, settings, seed and versions of the training.
        u: ``U`` of each head, or ``None`` if the query vectors are constant.
        v: ``V`` of each head, or ``None`` if the query vectors are constant.

    Raises:
        ValueError: If shapes do not match, a vector is not finite, a head occurs twice, or the site is unknown.
    """

    heads: tuple[Head, ...]
    query: Float[Tensor, "n d_head"]
    key: Float[Tensor, "n d_head"] | None
    site: Site
    provenance: Mapping[str, Any] = field(default_factory=dict[str, Any])
    u: Float[Tensor, "n d_head rank"] | None = None
    v: Float[Tensor, "n d_head rank"] | None = None

    def __init__(
        self,
        heads: Iterable[tuple[int, int]],
        query: Float[Tensor, "n d_head"],
        key: Float[Tensor, "n d_head"] | None = None,
        site: Site = "rotary",
        provenance: Mapping[str, Any] | None = None,
        u: Float[Tensor, "n d_head rank"] | None = None,
        v: Float[Tensor, "n d_head rank"] | None = None,
    ) -> None:
        chosen = as_heads(heads)
        if len(set(chosen)) < len(chosen):
            raise ValueError("a head is named more than once; give one direction per head")
        if site not in get_args(Site):
            raise ValueError(f"site is {site!r}; it must be one of {', '.join(get_args(Site))}")
        for name, vectors in (("query", query), ("key", key)):
            if vectors is None and name == "key":
                continue
            if not isinstance(vectors, Tensor):
                kind = type(vectors).__name__
                raise TypeError(f"{name} is a {kind}; it must be a tensor [n, d_head], such as torch.as_tensor({name})")
            if vectors.ndim != 2 or len(vectors) != len(chosen):
                n = len(chosen)
                raise ValueError(f"{name} has shape {tuple(vectors.shape)}; for {n} heads it must be ({n}, d_head)")
            if not vectors.isfinite().all():
                raise ValueError(f"{name} holds values that are not finite")
        if key is not None and key.shape != query.shape:
            raise ValueError(f"query is {tuple(query.shape)} and key {tuple(key.shape)}; they must have the same shape")
        check_matrices(query, u, v)
        object.__setattr__(self, "heads", chosen)
        # The tensors are copied, so that later edits by the caller do not change this object.
        for name, values in (("query", query), ("key", key), ("u", u), ("v", v)):
            object.__setattr__(self, name, None if values is None else values.detach().float().cpu().clone())
        object.__setattr__(self, "site", site)
        object.__setattr__(self, "provenance", dict(provenance or {}))

    def __len__(self) -> int:
        return len(self.heads)

    def __repr__(self) -> str:
        norms = self.query.norm(dim=1)
        key = ("" if self.key is None else " with key vectors") + (f", rank {self.rank}" if self.rank else "")
        spread = f", norms of d_Q {float(norms.min()):.2f} to {float(norms.max()):.2f}" if len(self) else ""
        return (
            f"FocusDirections({len(self)} heads at the {self.site} site{key}, d_head {self.d_head}{spread}: "
            f"{HeadList(self.heads)!r})"
        )

    def _repr_html_(self) -> str:
        losses, norms = self.losses, self.query.norm(dim=1).tolist()
        key = None if self.key is None else self.key.norm(dim=1).tolist()
        product = None if self.u is None else self.product_norms.tolist()
        trained = losses is not None and len(losses) > 0
        rows = [
            (
                str(head),
                bar(norms[i], full=max(norms)),
                *(() if key is None else (float(key[i]),)),
                *(() if product is None else (float(product[i]),)),
                *((-float(losses[0, i]), -float(losses[-1, i])) if losses is not None and trained else ()),
            )
            for i, head in enumerate(self.heads[:_SHOWN])
        ]
        columns = ("head", "norm of d_Q", *(() if key is None else ("norm of d_K",)))
        columns += () if product is None else ("norm of U V^T",)
        columns += ("score, first epoch", "score, last epoch") if trained else ()
        shown = f", the first {_SHOWN} shown" if len(self) > _SHOWN else ""
        provenance = [
            (name, shorten(json.dumps(value, default=str), 160))
            for name, value in self.provenance.items()
            if name != "losses"
        ]
        rank = f", rank {self.rank}" if self.rank else ""
        title = f"Focus directions of {len(self)} heads at the {self.site} site, d_head {self.d_head}{rank}{shown}"
        return card(title, table(columns, rows), details("How they were made", table(("", ""), provenance)))

    @property
    def d_head(self) -> int:
        """Length of each vector."""
        return self.query.shape[1]

    @property
    def rank(self) -> int:
        """Rank of ``U V^T``; 0 if the query vectors are constant."""
        return 0 if self.u is None else self.u.shape[2]

    @property
    def product_norms(self) -> Float[Tensor, "n"]:
        """Frobenius norm of ``U V^T`` of each head."""
        if self.u is None or self.v is None:
            return torch.zeros(len(self))
        return (self.u.double() @ self.v.double().mT).flatten(1).norm(dim=1).float()

    def at(self, queries: Float[Tensor, "*rows n d_head"]) -> Float[Tensor, "*rows n d_head"]:
        """``d_Q(q)`` of each head at queries of these heads, which were recorded at :attr:`site`."""
        if self.u is None or self.v is None:
            return self.query.expand_as(queries)
        return self.query + LowRank(self.u, self.v)(queries.float().cpu())

    @property
    def origin(self) -> str | None:
        """Name of the model that the directions were trained on; ``None`` if the provenance does not name a model."""
        source, model = str(self.provenance.get("source", "")), self.provenance.get("model")
        if source.startswith(_PUBLISHED):
            return source.removeprefix(_PUBLISHED).replace("_", "/", 1)
        return str(model["name"]) if isinstance(model, Mapping) and "name" in model else None  # pyright: ignore[reportUnknownArgumentType]

    @property
    def losses(self) -> Float[Tensor, "epoch n"] | None:
        """Mean training loss ``-S_C`` of each head in each epoch; ``None`` if the provenance contains no losses."""
        recorded = self.provenance.get("losses")
        return None if recorded is None else torch.tensor(recorded)

    def to_frame(self) -> pd.DataFrame:
        """Data frame with one row per head: norms of ``d_Q``, of ``d_K`` (NaN without key vectors) and of ``U V^T``."""
        key = [math.nan] * len(self) if self.key is None else self.key.norm(dim=1).tolist()
        columns = (self.heads, self.query.norm(dim=1).tolist(), key, self.product_norms.tolist())
        names = ("query_norm", "key_norm", "product_norm")
        rows = [
            {"layer": head.layer, "head": head.head} | dict(zip(names, norms, strict=True))
            for head, *norms in zip(*columns, strict=True)
        ]
        return rows_frame(rows, dict.fromkeys(names, "norm, units of the activations"), ("layer", "head", *names))

    @property
    def digest(self) -> str:
        """SHA-256 of heads, site, rank and vectors, which identifies a set of directions in result files."""
        kind = [self.site, self.heads, *([self.rank] if self.rank else [])]
        content = hashlib.sha256(json.dumps(kind).encode())
        for vectors in (self.query, self.key, self.u, self.v):
            content.update(b"" if vectors is None else vectors.contiguous().numpy().tobytes())
        return content.hexdigest()

    def select(self, heads: Iterable[tuple[int, int]]) -> FocusDirections:
        """Directions of ``heads``, in the order of ``heads``.

        Raises:
            ValueError: If a head has no direction.
        """
        chosen = as_heads(heads)
        place = {head: i for i, head in enumerate(self.heads)}
        missing = [head for head in chosen if head not in place]
        if missing:
            raise ValueError(
                f"no direction for {', '.join(map(str, missing))}; there are {len(self)} heads: {self.heads[:5]}..."
            )
        rows = torch.tensor([place[head] for head in chosen], dtype=torch.long)
        provenance = dict(self.provenance)
        if self.losses is not None:
            provenance["losses"] = self.losses[:, rows].tolist()
        key, u, v = (None if x is None else x[rows] for x in (self.key, self.u, self.v))
        return FocusDirections(chosen, self.query[rows], key, self.site, provenance, u, v)

    def require_shape(self, shape: ModelShape) -> None:
        """Check that these directions fit the shape of a model.

        Raises:
            ValueError: If the head size, layers or heads do not fit.
        """
        if self.d_head != shape.d_head:
            raise ValueError(
                f"directions have d_head = {self.d_head}, the model has {shape.d_head}: they belong to a "
                "different model"
            )
        recorded = self.provenance.get("shape", {})
        for name, value in recorded.items():
            actual = getattr(shape, name, None)
            if actual != value:
                raise ValueError(f"directions are of a model with {name} = {value}, this one has {actual}")
        try:
            check_heads(self.heads, shape.n_layers, shape.n_heads)
        except ValueError as error:
            raise ValueError(f"directions are of another model: {error}") from error

    def save(self, directory: str | Path) -> Path:
        """Write ``directions.safetensors`` and ``directions.json`` to a directory, and return the directory's path.

        If the directory does not exist, it is created.
        """
        directory = Path(directory)
        named = {"query": self.query, "key": self.key, "u": self.u, "v": self.v}
        vectors = {name: x.contiguous() for name, x in named.items() if x is not None}
        config = {
            # Earlier versions would ignore ``u`` and ``v``, and refuse the other format.
            "format": _LOW_RANK if self.rank else _PLAIN,
            "site": self.site,
            "d_head": self.d_head,
            "heads": [list(head) for head in self.heads],
            "sha256": self.digest,
            "provenance": self.provenance,
        }
        contents = {_VECTORS: save(vectors), _CONFIG: json.dumps(config, indent=2).encode()}
        for name, content in contents.items():
            write_atomically(directory / name, content)
        return directory

    @classmethod
    def load(cls, source: str | Path, *, revision: str | None = None) -> FocusDirections:
        """Load directions from a directory written by :meth:`save`, or from the Hugging Face hub (``user/name``).

        Directions of a small real model ship with the package under its name, ``smollm2-135m-instruct``. They act at
        the rotary site; ``docs/real-models.md`` says how they were trained.

        Raises:
            FileNotFoundError: If the directory or repository does not exist, or if a file is missing from it.
            ValueError: If the format is not supported, or if the two files do not belong together.
        """
        directory = shipped_directions(source) or Path(source)
        if not directory.is_dir():
            directory = _download(str(source), revision)
        for name in (_VECTORS, _CONFIG):
            if not (directory / name).is_file():
                raise FileNotFoundError(
                    f"{directory} holds no {name}; is it a directory written by FocusDirections.save?"
                )
        config = json.loads((directory / _CONFIG).read_text())
        vectors = load((directory / _VECTORS).read_bytes())
        if config.get("format") != (_LOW_RANK if "u" in vectors else _PLAIN):
            raise ValueError(
                f"{directory / _CONFIG} has format {config.get('format')!r}; this version reads format {_PLAIN}, and "
                f"format {_LOW_RANK} if there are u and v"
            )
        heads = [Head(*head) for head in config["heads"]]
        key, u, v = (vectors.get(name) for name in ("key", "u", "v"))
        loaded = cls(heads, vectors["query"], key, config["site"], config["provenance"], u, v)
        if loaded.digest != config.get("sha256"):
            raise ValueError(
                f"{_VECTORS} and {_CONFIG} in {directory} do not belong together: one was changed, or a save into it "
                "was cut off"
            )
        return loaded

    def push_to_hub(self, repository: str, *, private: bool = False, token: str | None = None) -> str:
        """Upload the directions to a repository on the Hugging Face hub, and return the repository's URL.

        If the repository does not exist, it is created.
        """
        from tempfile import TemporaryDirectory

        from huggingface_hub import HfApi

        api = HfApi(token=token)
        address = str(api.create_repo(repository, private=private, exist_ok=True))
        with TemporaryDirectory() as directory:
            api.upload_folder(repo_id=repository, folder_path=self.save(directory))
        return address

    @classmethod
    def from_published(cls, directory: str | Path) -> FocusDirections:
        """Load the paper authors' files ``head_q_directions_LAYER.pth`` and ``head_k_directions_LAYER.pth``.

        Each file contains the vectors ``[n_heads, d_head]`` of one layer, for the rotary site.

        Raises:
            FileNotFoundError: If the directory has no query files, or if the query or key file of a layer is missing.
            ValueError: If a file does not contain a matrix, or if the files differ in shape.
        """
        directory = Path(directory)
        names = [re.fullmatch(r"head_q_directions_(\d+)\.pth", path.name) for path in directory.glob("*.pth")]
        layers = sorted(int(name[1]) for name in names if name)
        if not layers:
            raise FileNotFoundError(
                f"{directory} holds no head_q_directions_LAYER.pth; name a 'direction_relevant' directory"
            )
        if layers != list(range(len(layers))):
            missing = min(set(range(layers[-1])) - set(layers))
            raise FileNotFoundError(f"{directory} holds no head_q_directions_{missing}.pth, but later layers")
        query = [_published(directory / f"head_q_directions_{layer}.pth") for layer in layers]
        key = [_published(directory / f"head_k_directions_{layer}.pth") for layer in layers]
        if len({tuple(vectors.shape) for vectors in (*query, *key)}) > 1:
            raise ValueError(f"the files in {directory} differ in shape; they must all be (n_heads, d_head)")
        n_heads, d_head = query[0].shape
        shape = {"n_layers": len(layers), "n_heads": n_heads, "d_head": d_head}
        heads = [Head(layer, head) for layer in layers for head in range(n_heads)]
        provenance = {"source": f"{_PUBLISHED}{directory.parent.name}", "shape": shape}
        return cls(heads, torch.cat(query), torch.cat(key), "rotary", provenance)


def open_directions(source: str | Path) -> FocusDirections:
    """Load directions in the format of this package or of the paper's authors.

    Args:
        source: Directory with files in either format, repository on the Hugging Face hub (``user/name``), or name of
            directions that ship with the package.

    Raises:
        FileNotFoundError: If the directory or repository does not exist, or if a file is missing from it.
        ValueError: If the format is not supported, or if the files do not belong together.
    """
    if any(Path(source).glob("head_q_directions_*.pth")):
        return FocusDirections.from_published(source)
    name = str(source)
    known = Path(source).is_dir() or shipped_directions(source) is not None
    if not known and (name.count("/") != 1 or name.startswith((".", "/", "~"))):
        raise FileNotFoundError(
            f"there is no directory {name!r}; directions are a directory, USER/NAME on the hub, or the name of those "
            f"that ship with FocusLens ({', '.join(shipped_names('directions'))})"
        )
    return FocusDirections.load(source)


def _published(path: Path) -> Float[Tensor, "n_heads d_head"]:
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} holds no {path.name}")
    try:
        vectors = torch.load(path, map_location="cpu", weights_only=True)
    except (UnpicklingError, EOFError, RuntimeError) as error:
        raise ValueError(
            f"{path} cannot be read as a tensor; the download may have been cut off, or the file may be a Git LFS "
            "pointer: fetch it with 'git lfs pull', or download it again"
        ) from error
    if not isinstance(vectors, Tensor) or vectors.ndim != 2:
        raise ValueError(f"{path} does not hold a tensor [n_heads, d_head]")
    return vectors.detach().float()


def _download(repository: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    from focuslens.util.library_bars import library_bars

    try:
        with library_bars():
            return Path(snapshot_download(repository, revision=revision, allow_patterns=[_VECTORS, _CONFIG]))
    except (HFValidationError, OSError) as error:
        raise FileNotFoundError(f"{repository} is neither a directory nor a repository on the hub: {error}") from error
