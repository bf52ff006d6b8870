"""Atomic writing of a steered checkpoint, with copies of the tokenizer and other small files of the base."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from focuslens.directions.checkpoints.origin import origin_lines, origin_of
from focuslens.directions.checkpoints.shards import open_shard
from focuslens.directions.checkpoints.source import CONFIG, INDEX, TENSOR_SUFFIXES, Checkpoint
from focuslens.directions.checkpoints.tokenizers import TOKENIZER_CONFIG, tokenizer_config
from focuslens.interventions import FocusSteering
from focuslens.util.files import umask, versions, without_folders, write_json

__all__ = ["LeftOut", "require_writable", "write_index", "write_steered"]

_CARD, _RECORD = "README.md", "focuslens.json"
_TRAINING = re.compile(
    r"training_args\.bin|trainer_state\.json|(optimizer|scheduler|scaler|rng_state|random_states)(_\d+)?\.(pt|pth|bin|pkl)"
)


@dataclass
class LeftOut:
    """Files and directories of the base checkpoint that were not copied.

    Attributes:
        weights: Files and directories that contain other copies of the weights. These copies would not be steered.
        training: Files for resuming the training of the base, such as ``optimizer.pt``.
    """

    weights: list[str] = field(default_factory=list[str])
    training: list[str] = field(default_factory=list[str])


def require_writable(out: Path, source: str | Path) -> None:
    """Check in advance that the new checkpoint can be written to ``out``.

    Raises:
        FileExistsError: If ``out`` exists and is not an empty directory, or if one of its parents is not a directory.
        ValueError: If ``out`` is a symbolic link, contains the working directory, or is inside ``source``.
    """
    if out.is_symlink():
        raise ValueError(f"{out} is a symbolic link, which a new directory would replace; name {out.resolve()} itself")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} is not an empty directory; name a new one")
    place = out.resolve()
    if place in (Path.cwd(), *Path.cwd().parents):
        raise ValueError(f"{out} is the working directory or contains it, and cannot be replaced; name a new directory")
    if Path(source).is_dir() and Path(source).resolve() in place.parents:
        raise ValueError(f"{out} lies inside {source}, the checkpoint that is read; name a directory outside it")
    above = next(parent for parent in place.parents if parent.exists())
    if not above.is_dir():
        raise FileExistsError(f"{out} cannot be made: {above} is not a directory")


@contextmanager
def write_steered(
    base: Checkpoint, steering: FocusSteering, out: Path, config: Mapping[str, Any], chapter: Sequence[str]
) -> Generator[tuple[Path, LeftOut]]:
    """Context manager that creates a temporary directory, into which the ``with`` block writes the weights.

    At the end of the block, all other files are added, and the directory is renamed to ``out``. If an error occurs, the
    directory is deleted.

    Args:
        base: Base checkpoint.
        steering: Steering, which is described in ``focuslens.json``.
        out: Final directory, already checked by :func:`require_writable`.
        config: Content of the new ``config.json``.
        chapter: Lines of the model card to insert before the text of the base's card.

    Yields:
        The temporary directory and a :class:`LeftOut`, which is filled at the end of the block.
    """
    tokenizer = tokenizer_config(base)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial, left_out = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}.")), LeftOut()
    try:
        yield partial, left_out
        write_json(partial / CONFIG, _without_origin(config))
        _copy_rest(base, partial, left_out)
        if tokenizer is not None:
            write_json(partial / TOKENIZER_CONFIG, _without_origin(tokenizer))
        write_json(partial / _RECORD, _record(base, steering))
        chapter = [*chapter, "", *origin_lines(base, steering.directions)]
        (partial / _CARD).write_text(_card(base.directory, chapter), encoding="utf-8")
        for directory in (partial, *(path for path in partial.rglob("*") if path.is_dir())):
            directory.chmod(0o777 & ~umask())  # replaces permissions set by mkdtemp or copied by copytree
        if out.exists():
            out.rmdir()  # safe, because ``require_writable`` accepts only an empty directory
        partial.replace(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _without_origin(config: Mapping[str, Any]) -> dict[str, Any]:
    """Configuration in which the place that it was loaded from has no folders of this machine."""
    places = ("_name_or_path", "name_or_path")
    return {key: without_folders(value) if key in places else value for key, value in config.items()}


def write_index(directory: Path, names: Sequence[str]) -> None:
    """Write the index of a checkpoint with several weight files."""
    shards = [open_shard(directory / name) for name in names]
    places = {tensor: shard.path.name for shard in shards for tensor in shard.tensors}
    total = sum(shard.data_size for shard in shards)
    write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))})


def _record(base: Checkpoint, steering: FocusSteering) -> dict[str, Any]:
    return {
        "base": base.label,
        "revision": base.revision,
        "commit": base.commit,
        "steering": steering.describe(),
        "directions": origin_of(steering.directions),
        "versions": versions(),
    }


def _copy_rest(base: Checkpoint, out: Path, left_out: LeftOut) -> None:
    """Copy the remaining files and directories of the base, such as ``additional_chat_templates``.

    Files with weights or training state are not copied. They are listed in ``left_out``.
    """
    weights = {shard.path for shard in base.shards}
    for path in sorted(base.directory.iterdir()):
        if path.name in (INDEX, CONFIG, _CARD, _RECORD) or path.name.startswith(".") or path in weights:
            continue
        if _TRAINING.fullmatch(path.name):
            left_out.training.append(path.name)
        elif _is_weights(path):
            left_out.weights.append(f"{path.name}/" if path.is_dir() else path.name)
        elif path.is_dir():
            shutil.copytree(path, out / path.name, copy_function=shutil.copyfile, ignore=shutil.ignore_patterns(".*"))
        else:
            shutil.copyfile(path, out / path.name)


def _is_weights(path: Path) -> bool:
    """Whether a path is a weight file, judged by its name, or a directory that contains a weight file."""
    if path.is_dir():
        return any(_is_weights(inner) for inner in path.rglob("*") if not inner.is_dir())
    return path.suffix in TENSOR_SUFFIXES or path.name.endswith(".index.json")


def _card(directory: Path, chapter: Sequence[str]) -> str:
    """Model card of the base, with the lines of ``chapter`` between the metadata and the text."""
    card = directory / _CARD
    text = card.read_text(encoding="utf-8") if card.is_file() else ""
    front, _, body = text[4:].partition("\n---\n") if text.startswith("---\n") else ("", "", text)
    lines = [*(["---", front, "---", ""] if front else []), *chapter, "", body.strip()]
    return "\n".join(lines).rstrip() + "\n"
