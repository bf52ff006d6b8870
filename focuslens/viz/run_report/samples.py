"""Samples and model of a run, reopened from their descriptions in the run's files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from focuslens.data.selection import SampleSelection
from focuslens.model.focus_model import FocusModel
from focuslens.prompts.sample import MultiDocSample, prompts_digest
from focuslens.util.places import remembered_place

__all__ = ["UnavailableError", "reopen_model", "reopen_samples"]

_BACKENDS: dict[str, Any] = {"HookedTransformer": "hooked", "TransformerBridge": "bridge"}


class UnavailableError(Exception):
    """Failure to reopen the samples, model or directions of a run. The message gives the cause and a remedy."""


def reopen_samples(header: Mapping[str, Any], file: Path | None = None) -> list[MultiDocSample]:
    """Reopen the samples of a sweep from their description.

    Args:
        header: Header of the sweep.
        file: Path of the data file, if it differs from the name in the header.

    Raises:
        UnavailableError: If the samples cannot be opened, or their prompts differ from those of the run.
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
            f"the samples are those of {name}, which is not here; give its path with --data"
        ) from error
    except ValueError as error:
        raise UnavailableError(f"the samples cannot be drawn from {name} as it is here ({error})") from error
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
    """Reopen the model of a run, or return ``given`` if it is this model.

    Args:
        description: Description of the model in the run's files.
        name: Name or directory of the model, if it differs from the name in the description.
        device: Device to load the model on.
        given: A loaded model, which may be the model of the run.

    Raises:
        UnavailableError: If the model cannot be opened, or its weights, dtype, backend, prompt format, stop tokens or
            other settings of decoding differ from those of the run.
    """
    if given is not None and _same(given, description):
        return given
    place = remembered_place(description)
    wanted = name or str(place or description.get("name"))
    try:
        model = FocusModel.from_pretrained(wanted, device=device, **_options(description))
    except Exception as error:
        # Loading fails in many ways (missing directory, no network, too little memory). The report then has no views.
        raise UnavailableError(
            f"the model is {description.get('name')}, which could not be opened ({type(error).__name__}: "
            f"{' '.join(str(error).replace(wanted, Path(wanted).name).split())[:200]}); say where it is with --model"
        ) from error
    if not _same(model, description):
        raise UnavailableError(
            f"the model {Path(wanted).name} is not the one of the run: its weights, dtype, prompt format or decoding "
            "differ; say with --model where the run's own model is"
        )
    return model


def _options(description: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments for ``FocusModel.from_pretrained``, according to a model's description."""
    return {
        # Also without stop strings in the description, because the model then had none.
        "stop_strings": description.get("decoding", {}).get("stop_strings", ()),
        "stop_tokens": description.get("stop_tokens"),
        "dtype": description.get("dtype", "float32"),
        "backend": _BACKENDS.get(str(description.get("backend"))),
        **{name: description.get(name) for name in ("chat", "chat_template_kwargs", "revision", "n_ctx")},
    }


def _same(model: FocusModel, description: Mapping[str, Any]) -> bool:
    keys = ("weights", "dtype", "backend", "prompt_format", "stop_tokens", "decoding")
    return all(model.description.get(key) == description.get(key) for key in keys)
