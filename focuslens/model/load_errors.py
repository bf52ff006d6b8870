"""One-line error messages for checkpoints that cannot be loaded. Each message names the model, the fault and a remedy.

Hugging Face's libraries report these faults in long messages. Some of the messages name neither the model nor a remedy.
Errors that this module does not recognise are raised unchanged.
"""

from __future__ import annotations

import json
import re
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from focuslens.model.exported import base_of

__all__ = ["explained_errors", "require_checkpoint", "require_decoder"]

_NO_DECODER = re.compile(
    r"(For(MaskedLM|SequenceClassification|TokenClassification|QuestionAnswering|PreTraining)|(?<!LMHead)Model)$"
)
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "spiece.model")


def require_checkpoint(name: str) -> None:
    """Check that a local directory contains a checkpoint in Hugging Face format. Names on the hub are not checked.

    Raises:
        FileNotFoundError: If the directory does not exist, or does not contain ``config.json`` and a tokenizer.
    """
    directory = Path(name)
    if not directory.is_dir():
        if name.startswith(("/", "./", "../", "~")) or directory.is_file():
            hint = "; the directory that holds it may be meant" if directory.is_file() else ""
            raise FileNotFoundError(
                f"there is no directory {name!r}; a model is a local directory or a name on the hub{hint}"
            )
        return
    if not (directory / "config.json").is_file():
        raise FileNotFoundError(
            f"the directory {name!r} holds no config.json; a model's directory holds config.json, a tokenizer and "
            "weights, as save_pretrained writes them"
        )
    if not any((directory / file).is_file() for file in _TOKENIZERS):
        raise FileNotFoundError(
            f"the directory {name!r} holds no tokenizer (tokenizer.json); save it beside the weights with "
            "tokenizer.save_pretrained"
        )


def require_decoder(config: Any, name: str) -> None:
    """Check that a checkpoint's architecture is a decoder-only language model.

    Raises:
        ValueError: If the architecture is an encoder-decoder model or cannot generate text.
    """
    architectures = list(config.architectures or [])
    if getattr(config, "is_encoder_decoder", False):
        kind = "an encoder-decoder model"
    elif architectures and all(_NO_DECODER.search(architecture) for architecture in architectures):
        kind = "a model that generates no text"
    else:
        return
    raise ValueError(
        f"{name!r} has the architecture {', '.join(architectures) or config.model_type}, {kind}; it must be a "
        "decoder-only language model (LlamaForCausalLM, Qwen2ForCausalLM, ...)"
    )


@contextmanager
def explained_errors(name: str, revision: str | None = None) -> Generator[None]:
    """Replace known errors in a ``with`` block that loads a model. The new errors name the model and a remedy.

    Raises:
        PermissionError: If access to the model has not been granted.
        FileNotFoundError: If the model or the revision does not exist, or the hub cannot be reached.
        ValueError: If transformers or TransformerLens does not support the architecture, or if the weights cannot be
            read or do not fit the configuration.
    """
    try:
        yield
    except StrictDataclassError as error:  # no subclass of ValueError
        message = " ".join(str(error).split())
        raise ValueError(f"the configuration of {name!r} is not valid: {message}") from error
    except (OSError, ValueError, RuntimeError, SafetensorError, UnpicklingError, EOFError) as error:
        explanation = (
            _hub_error(name, revision, error) or _architecture_error(name, error) or _weights_error(name, error)
        )
        if explanation is None:
            raise
        raise explanation from error


def _hub_error(name: str, revision: str | None, error: Exception) -> Exception | None:
    """Error that explains a failed request to the hub; ``None`` if ``error`` has another cause."""
    from huggingface_hub import errors

    causes = list(_causes(error))

    def caused_by(*kinds: type[BaseException]) -> bool:
        return any(isinstance(cause, kinds) for cause in causes)

    if caused_by(errors.GatedRepoError):
        return PermissionError(
            f"the model {name!r} is gated: ask for access at https://huggingface.co/{name}, then log in with "
            "'hf auth login' or set HF_TOKEN"
        )
    if caused_by(errors.RevisionNotFoundError):
        return FileNotFoundError(
            f"the model {name!r} has no revision {revision!r} on the hub; name a branch, tag or commit"
        )
    if caused_by(errors.RepositoryNotFoundError):
        return FileNotFoundError(
            f"there is no model {name!r} on the hub, and no such directory here; a private one needs 'hf auth login' "
            "or HF_TOKEN"
        )
    if caused_by(errors.HFValidationError):
        return FileNotFoundError(
            f"there is no directory {name!r}, and a name on the hub has the form OWNER/NAME, such as "
            "'meta-llama/Llama-3.2-3B-Instruct'"
        )
    if caused_by(errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
        return FileNotFoundError(
            f"there is no directory {name!r}, and the hub cannot be reached to look for a model of that name; check "
            "the name and the network (HF_HUB_OFFLINE), or download the model on a machine with a network: "
            f"hf download {name}"
        )
    return None


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and all exceptions in its chain of causes and contexts."""
    visited: set[int] = set()
    pending: list[BaseException | None] = [error]
    while pending:
        cause = pending.pop()
        if cause is not None and id(cause) not in visited:
            visited.add(id(cause))
            yield cause
            pending += [cause.__cause__, cause.__context__]


def _architecture_error(name: str, error: Exception) -> ValueError | None:
    """Error that explains an unsupported architecture; ``None`` if ``error`` has another cause."""
    message = str(error)
    if model_type := re.search(r"model type `(\S+)` but Transformers does not recognize", message):
        return ValueError(
            f"{name!r} has the type {model_type[1]!r}, which this version of transformers does not know; a later "
            "version may: pip install --upgrade transformers"
        )
    if "trust_remote_code" in message and ("custom code" in message or "to be executed" in message):
        return ValueError(_own_code(name))
    if "Could not determine supported architecture" in message or "nsupported architecture" in message:
        return ValueError(
            f"{name!r} has the architecture {_architectures(name)}, for which TransformerLens has no adapter; Llama, "
            "Mistral, Qwen2, Qwen3 and most other decoder-only models have one"
        )
    return None


def _own_code(name: str) -> str:
    """Error message for a checkpoint that contains code, which is not run unless the user says so."""
    base = base_of(name)
    other = "" if base is None else f", or open {base!r}, its base, and steer it with the directions"
    return (
        f"{name!r} contains Python code of its own, which its config.json names (auto_map), and which can do anything "
        "that you can do on this machine; if you trust it, pass trust_remote_code=True (--trust-remote-code in the "
        f"shell){other}"
    )


def _weights_error(name: str, error: Exception) -> ValueError | None:
    """Error that explains weights that cannot be read or do not fit; ``None`` if ``error`` has another cause."""
    message = " ".join(str(error).split())
    if isinstance(error, SafetensorError | UnpicklingError | EOFError) or "PytorchStreamReader" in message:
        return ValueError(
            f"the weights of {name!r} cannot be read ({message}): the download may have been cut off, or the file is a "
            "Git LFS pointer; download the checkpoint again"
        )
    if isinstance(error, RuntimeError) and ("ignore_mismatched_sizes" in message or "size mismatch" in message):
        return ValueError(
            f"the weights of {name!r} do not have the shapes that its config.json declares; they belong to different "
            "models, or config.json was changed: download the checkpoint again"
        )
    return None


def _architectures(name: str) -> str:
    """Names of the architectures in a local checkpoint's configuration, for an error message."""
    path = Path(name) / "config.json"
    architectures = json.loads(path.read_text(encoding="utf-8")).get("architectures") if path.is_file() else None
    return ", ".join(architectures or ["unknown"])
