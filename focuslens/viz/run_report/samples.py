"""The samples, the model and the interventions of a run, opened again from what its files say of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from focuslens.data.selection import SampleSelection
from focuslens.model.focus_model import FocusModel
from focuslens.prompts.prompt import MultiDocSample, prompts_digest

__all__ = ["NotHere", "reopen_model", "reopen_samples"]

_BACKENDS: dict[str, Any] = {"HookedTransformer": "hooked", "TransformerBridge": "bridge"}


class NotHere(Exception):
    """Something that a run was made of is not on this machine; the message says what, and what would help."""


def reopen_samples(header: Mapping[str, Any], file: Path | None = None) -> list[MultiDocSample]:
    """The samples of a sweep, in its order.

    Args:
        header: The sweep's.
        file: Where the data lie now, if not at their own name.

    Raises:
        NotHere: If they cannot be had, or are others than the run's.
    """
    description = header.get("data", {})
    name = description.get("file", "a file that is not named")
    try:
        selection = SampleSelection.reopen(description, file)
    except ValueError as error:
        raise NotHere(f"the samples of {name} cannot be opened again: {error}") from error
    try:
        samples = list(selection.open())
    except FileNotFoundError as error:
        raise NotHere(f"the samples are those of {name}, which is not here; say where it is with --data") from error
    except ValueError as error:
        raise NotHere(f"the samples cannot be made of {name} as it is here ({error})") from error
    if prompts_digest(samples) != description.get("prompts_sha256"):
        raise NotHere(
            f"the samples that {name} gives now are not those of the run (their prompts differ); "
            "say with --data where the run's own file is"
        )
    return samples


def reopen_model(
    description: Mapping[str, Any],
    *,
    name: str | None = None,
    device: str | None = None,
    given: FocusModel | None = None,
) -> FocusModel:
    """The model of a run.

    Args:
        description: What the run's files say of it.
        name: Where it is now, if not at its own name.
        device: Where it is to run.
        given: A model that is open already; taken if it is the one.

    Raises:
        NotHere: If it cannot be opened, or has other weights or another prompt format than the run's.
    """
    if given is not None and _same(given, description):
        return given
    wanted = name or str(description.get("name"))
    options: dict[str, Any] = {
        "dtype": description.get("dtype", "float32"),
        "backend": _BACKENDS.get(str(description.get("backend"))),
        "device": device,
        "chat": description.get("chat"),
        "chat_template_kwargs": description.get("chat_template_kwargs"),
        "revision": description.get("revision"),
        "n_ctx": description.get("n_ctx"),
    }
    try:
        model = FocusModel.from_pretrained(wanted, **options)
    except Exception as error:
        # Whatever keeps a model from being opened (no such directory, no network, no room) keeps views from the report.
        raise NotHere(
            f"the model is {description.get('name')}, which could not be opened ({type(error).__name__}: "
            f"{' '.join(str(error).split())[:200]}); say where it is with --model"
        ) from error
    if not _same(model, description):
        raise NotHere(
            f"the model at {wanted} is not the one of the run: its weights, dtype or prompt format differ; "
            "say with --model where the run's own model is"
        )
    return model


def _same(model: FocusModel, description: Mapping[str, Any]) -> bool:
    told = ("weights", "dtype", "backend", "prompt_format", "stop_tokens")
    return all(model.description.get(key) == description.get(key) for key in told)
