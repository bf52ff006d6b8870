"""Names of models: the embedded model, known models, GGUF files, directories, and names on the hub."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from focuslens.model.sources.known_models import KNOWN_MODELS, fetched_gguf

__all__ = ["EMBEDDED", "checkpoint_path", "is_gguf", "is_known", "shown_name"]

EMBEDDED = "demo"
"""Name of the model that ships with the package."""


def is_gguf(name: str) -> bool:
    """Whether a name is that of a GGUF file on this machine, which may not exist."""
    return name.lower().endswith(".gguf") and not Path(name).is_dir()


def is_known(name: str) -> bool:
    """Whether a name is that of the embedded model or a known model, and not of a directory here."""
    return name == EMBEDDED or (name in KNOWN_MODELS and not Path(name).is_dir())


def checkpoint_path(
    name: str, *, gguf_file: str | None = None, original: bool = False, revision: str | None = None
) -> str:
    """Absolute path of a model's checkpoint in Hugging Face format, or its name on the hub.

    GGUF files are converted and known models are downloaded if this has not been done before.

    Args:
        name: Name of the embedded model or of a known model, GGUF file, directory, or name on the hub.
        gguf_file: GGUF file in the directory or in the repository on the hub.
        original: Whether to take the original of a known model from the hub.
        revision: Branch, tag or commit on the hub.

    Raises:
        FileNotFoundError: If a file does not exist or cannot be downloaded.
        ValueError: If a GGUF file cannot be converted, or ``original`` is true and the model is not a known one.
    """
    if original:
        if name not in KNOWN_MODELS:
            raise ValueError(f"original is for the known models ({', '.join(KNOWN_MODELS)}), and the model is {name!r}")
        return KNOWN_MODELS[name].original
    if gguf_file is not None:
        return _converted(_gguf_of(name, gguf_file, revision))
    if is_gguf(name):
        return _converted(Path(name))
    if name == EMBEDDED:
        return str((Path(str(resources.files("focuslens"))) / "assets" / EMBEDDED).resolve())
    if is_known(name):
        return _converted(fetched_gguf(KNOWN_MODELS[name]))
    return str(Path(name).resolve()) if Path(name).is_dir() else name


def _converted(path: Path) -> str:
    from focuslens.model.sources.gguf_conversion import converted_gguf

    return str(converted_gguf(path).resolve())


def _gguf_of(name: str, gguf_file: str, revision: str | None) -> Path:
    """A GGUF file in a directory or in a repository on the hub, downloaded if need be."""
    if Path(name).is_dir():
        return Path(name) / gguf_file
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(name, gguf_file, revision=revision))


def shown_name(name: str, gguf_file: str | None = None) -> str:
    """Name of a model in files that can be published: the last component of a path, or the name on the hub."""
    if gguf_file is not None:
        return Path(gguf_file).name
    local = is_gguf(name) or Path(name).is_dir() or Path(name).is_absolute()
    return Path(name).resolve().name if local else name
