"""What keeps a checkpoint from being opened, told in one line: what was asked for, what is wrong, what would be right.

Hugging Face's libraries tell of the same failures at length, and of some in words that name neither the model nor what
to do. What is not among them is passed on as it is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ["require_checkpoint", "require_decoder", "told_errors"]

_NO_DECODER = re.compile(
    r"(For(MaskedLM|SequenceClassification|TokenClassification|QuestionAnswering|PreTraining)|(?<!LMHead)Model)$"
)
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "spiece.model")


def require_checkpoint(name: str) -> None:
    """Refuse a path to nothing, and a directory that is no checkpoint in Hugging Face format.

    Raises:
        FileNotFoundError: If there is no such directory, or it lacks what a checkpoint has.
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
    """Refuse architectures that generate no text, or not by one decoder.

    Raises:
        ValueError: If the checkpoint's is one of them.
    """
    architectures = list(config.architectures or [])
    if getattr(config, "is_encoder_decoder", False):
        kind = "an encoder-decoder"
    elif architectures and all(_NO_DECODER.search(one) for one in architectures):
        kind = "no decoder that generates text"
    else:
        return
    raise ValueError(
        f"{name!r} is of the architecture {', '.join(architectures) or config.model_type}, {kind}; heads that read a "
        "context are those of a decoder-only language model (LlamaForCausalLM, Qwen2ForCausalLM, ...)"
    )


@contextmanager
def told_errors(name: str, revision: str | None = None) -> Generator[None]:
    """Errors of opening a model, in this package's words.

    Raises:
        PermissionError: If access to the model has to be granted.
        FileNotFoundError: If there is no such model or revision, or the hub cannot be reached.
        ValueError: If the architecture is unknown to transformers or to TransformerLens.
    """
    try:
        yield
    except (OSError, ValueError) as error:
        told = _from_hub(name, revision, error) or _architecture(name, error)
        if told is None:
            raise
        raise told from error


def _from_hub(name: str, revision: str | None, error: Exception) -> Exception | None:
    from huggingface_hub import errors

    chain = list(_causes(error))

    def caused_by(*kinds: type[BaseException]) -> bool:
        return any(isinstance(one, kinds) for one in chain)

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
            "the name and the network (HF_HUB_OFFLINE), or download it where there is one: hf download " + name
        )
    return None


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error and what led to it."""
    seen: set[int] = set()
    following: list[BaseException | None] = [error]
    while following:
        one = following.pop()
        if one is not None and id(one) not in seen:
            seen.add(id(one))
            yield one
            following += [one.__cause__, one.__context__]


def _architecture(name: str, error: Exception) -> ValueError | None:
    said = str(error)
    if found := re.search(r"model type `(\S+)` but Transformers does not recognize", said):
        return ValueError(
            f"{name!r} is of the type {found[1]!r}, which this transformers does not know; a later one may: "
            "pip install --upgrade transformers"
        )
    if "Could not determine supported architecture" in said or "nsupported architecture" in said:
        return ValueError(
            f"{name!r} is of the architecture {_declared(name)}, for which TransformerLens has no adapter; Llama, "
            "Mistral, Qwen2, Qwen3 and most other decoder-only models have one"
        )
    return None


def _declared(name: str) -> str:
    """The architecture that a local checkpoint's configuration names."""
    path = Path(name) / "config.json"
    declared = json.loads(path.read_text(encoding="utf-8")).get("architectures") if path.is_file() else None
    return ", ".join(declared or ["unknown"])
