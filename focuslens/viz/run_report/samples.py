"""Samples and model of a run, opened again from their descriptions in its files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from focuslens.data.selection import SampleSelection
from focuslens.model.focus_model import FocusModel
from focuslens.prompts.prompt import MultiDocSample, prompts_digest

__all__ = ["UnavailableError", "reopen_model", "reopen_samples"]

_BACKENDS: dict[str, Any] = {"HookedTransformer": "hooked", "TransformerBridge": "bridge"}


class UnavailableError(Exception):
    """Samples, model or directions of a run are not on this machine; the message names them and a remedy."""


def reopen_samples(header: Mapping[str, Any], file: Path | None = None) -> list[MultiDocSample]:
    """The samples of a sweep, in its order.

    Args:
        header: The sweep's.
        file: Place of the data file, if not its name.

    Raises:
        UnavailableError: If they cannot be opened, or differ from the run's.
    """
    description = header.get("data", {})
    name = description.get("file", "a file that is not named")
    try:
        selection = SampleSelection.reopen(description, file)
    except ValueError as error:
        raise UnavailableError(f"the samples of {name} cannot be opened again: {error}") from error
    try:
        samples = list(selection.open())
    except FileNotFoundError as error:
        raise UnavailableError(
            f"the samples are those of {name}, which is not here; say where it is with --data"
        ) from error
    except ValueError as error:
        raise UnavailableError(f"the samples cannot be made of {name} as it is here ({error})") from error
    if prompts_digest(samples) != description.get("prompts_sha256"):
        raise UnavailableError(
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
        description: Its description in the run's files.
        name: Place of the model, if not its name.
        device: Device to open it on.
        given: An open model; returned if it is the run's.

    Raises:
        UnavailableError: If it cannot be opened, or has other weights or another prompt format than the run's.
    """
    if given is not None and _same(given, description):
        return given
    wanted = name or str(description.get("name"))
    try:
        model = FocusModel.from_pretrained(wanted, device=device, **_options(description))
    except Exception as error:
        # Without the model (no such directory, no network, no room) the report is written all the same, without views.
        raise UnavailableError(
            f"the model is {description.get('name')}, which could not be opened ({type(error).__name__}: "
            f"{' '.join(str(error).split())[:200]}); say where it is with --model"
        ) from error
    if not _same(model, description):
        raise UnavailableError(
            f"the model at {wanted} is not the one of the run: its weights, dtype or prompt format differ; "
            "say with --model where the run's own model is"
        )
    return model


def _options(description: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of ``FocusModel.from_pretrained`` that a description records."""
    return {
        "dtype": description.get("dtype", "float32"),
        "backend": _BACKENDS.get(str(description.get("backend"))),
        **{name: description.get(name) for name in ("chat", "chat_template_kwargs", "revision", "n_ctx")},
    }


def _same(model: FocusModel, description: Mapping[str, Any]) -> bool:
    keys = ("weights", "dtype", "backend", "prompt_format", "stop_tokens")
    return all(model.description.get(key) == description.get(key) for key in keys)
