"""Conversion of GGUF files into checkpoints in Hugging Face format, once per file, in the cache folder."""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from filelock import FileLock, Timeout
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from focuslens.model.sources.gguf_config import ROTARY_FACTORS, complete_config
from focuslens.model.sources.gguf_file import ORIGIN, GgufFile, check_gguf, gguf_folder, read_gguf
from focuslens.model.sources.gguf_vocabulary import gguf_tokenizer, stop_tokens
from focuslens.util.files import umask, versions, write_json
from focuslens.util.library_bars import library_bars
from focuslens.util.notes import announce

__all__ = ["converted_gguf"]

_RULES = 1
"""Version of the conversion. A checkpoint that was converted under other rules is converted again."""

_LOG = logging.getLogger(__name__)


def converted_gguf(path: str | Path) -> Path:
    """Directory of the checkpoint that a GGUF file holds, converted in the first call.

    The weights are dequantised by transformers into float32, which holds their values exactly. The directory has the
    file's SHA-256 as its name, and appears when it is complete. Two processes that ask at once get one conversion.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is cut off or one of several parts, or if its architecture, an entry or its vocabulary
            cannot be expressed in Hugging Face format.
        OSError: If the cache folder cannot be written, or is full.
    """
    path = Path(path).resolve()
    check_gguf(path)
    digest = GgufFile(path, {}, {}, {}).sha256
    target = gguf_folder() / digest
    if _is_complete(target):
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with _locked(target.with_suffix(".lock"), path):
        if not _is_complete(target):
            _convert(path, digest, target)
    return target


def _is_complete(target: Path) -> bool:
    try:
        return json.loads((target / ORIGIN).read_text(encoding="utf-8"))["rules"] == _RULES
    except (OSError, ValueError, KeyError, TypeError):
        return False


@contextmanager
def _locked(lock: Path, path: Path) -> Generator[None]:
    """Hold a lock, and say so if another process holds it. The system frees the lock of a killed process."""
    held = FileLock(lock)
    try:
        held.acquire(timeout=0)
    except Timeout:
        _LOG.info("another process is converting %s; waiting for it", path.name)
        held.acquire()
    try:
        yield
    finally:
        held.release()


def _convert(path: Path, digest: str, target: Path) -> None:
    gguf = read_gguf(path)
    _require_room(gguf, target.parent)
    announce(
        _LOG,
        f"converting {path.name} ({gguf.quantization}) once: {4 * sum(gguf.elements.values()) / 1e6:.0f} MB in "
        f"float32, in {target.parent}",
    )
    for abandoned in target.parent.glob(f".{target.name}.*"):  # of a killed process: the lock is held
        shutil.rmtree(abandoned, ignore_errors=True)
    draft = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    try:
        _write(gguf, draft)
        origin = {"file": path.name, "sha256": digest, "quantization": gguf.quantization}
        write_json(draft / ORIGIN, {**origin, "rules": _RULES, "versions": versions()})
        if target.exists():  # under earlier rules
            shutil.rmtree(target)
        _share(draft)
        draft.rename(target)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise


def _share(directory: Path) -> None:
    """Give a folder and its files the default permissions. Temporary folders and weights are private at first."""
    for file in directory.iterdir():
        file.chmod(0o666 & ~umask())
    directory.chmod(0o777 & ~umask())


def _require_room(gguf: GgufFile, folder: Path) -> None:
    needed, free = 4 * sum(gguf.elements.values()), shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(
            f"{gguf.path.name} needs {needed / 1e9:.1f} GB in {str(folder)!r} once it is dequantised, and "
            f"{free / 1e9:.1f} GB are free; set FOCUSLENS_CACHE to a folder on a larger disk, or run focuslens cache "
            "--clear"
        )


def _write(gguf: GgufFile, directory: Path) -> None:
    """Write tokenizer, configuration and weights of a GGUF file in Hugging Face format."""
    tokenizer = gguf_tokenizer(gguf)  # the vocabulary first: it is quick, and most often the reason to refuse
    config = complete_config(_config(gguf), gguf)
    plain = _dequantised(gguf, config)
    # A quantised model would refuse to be saved. These weights are not quantised any more.
    for mark in ("hf_quantizer", "quantization_method", "is_quantized"):
        if hasattr(plain, mark):
            delattr(plain, mark)
    if hasattr(plain.config, "quantization_config"):
        del plain.config.quantization_config
    vars(plain.config).pop("_model_name_or_path", None)
    stops = stop_tokens(gguf)
    first, padding = (gguf.metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("bos", "padding"))
    plain.config.bos_token_id, plain.config.pad_token_id = first, padding
    plain.config.eos_token_id = stops[0] if len(stops) == 1 else stops or None
    plain.generation_config = GenerationConfig(
        bos_token_id=first, eos_token_id=plain.config.eos_token_id, pad_token_id=padding
    )
    with library_bars():
        plain.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def _config(gguf: GgufFile) -> Any:
    try:
        config = cast("Any", AutoConfig).from_pretrained(str(gguf.path.parent), gguf_file=gguf.path.name)
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{gguf.path.name} holds a model of the architecture {gguf.architecture!r}, which this version of "
            f"transformers cannot read from GGUF files ({reason}); a later version may: "
            "pip install --upgrade transformers"
        ) from error
    config.architectures = None
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def _dequantised(gguf: GgufFile, config: Any) -> Any:
    """The plain Hugging Face model in float32, with every tensor of the file and no other.

    Raises:
        ValueError: If a weight is missing in the file, or a tensor of the file is none of the model's weights.
    """
    name = gguf.path.name
    with library_bars():
        try:
            plain, loaded = cast("Any", AutoModelForCausalLM).from_pretrained(
                str(gguf.path.parent), gguf_file=name, config=config, dtype=torch.float32, output_loading_info=True
            )
        except (RuntimeError, ValueError, KeyError, NotImplementedError) as error:
            if "out of memory" in str(error) or "can't allocate" in str(error):
                raise
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ValueError(f"transformers cannot read the weights of {name} ({reason})") from error
    wrong = {kind: sorted(map(str, loaded.get(kind) or ())) for kind in ("missing_keys", "mismatched_keys")}
    if any(wrong.values()):
        raise ValueError(f"{name} does not hold the weights of a {type(plain).__name__}: {_shortened(wrong)}")
    held = sum(count for tensor, count in gguf.elements.items() if tensor != ROTARY_FACTORS)
    expected = sum(parameter.numel() for parameter in plain.parameters())
    if held != expected:
        raise ValueError(
            f"{name} holds {held:,} weights and a {type(plain).__name__} of its configuration {expected:,}, so another "
            "model would be computed. Open the model in Hugging Face's format instead"
        )
    return plain.eval()


def _shortened(wrong: Mapping[str, list[str]]) -> str:
    parts = [
        f"{len(names)} {kind.removesuffix('_keys')} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for kind, names in wrong.items()
        if names
    ]
    return "; ".join(parts)
