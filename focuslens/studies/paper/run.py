"""Reproduction of all artefacts of one model, in order. Finished artefacts are not computed again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

from focuslens.studies.paper import (
    anatomy,
    attribution,
    faithfulness,
    focus,
    heads,
    retrieval,
    split_softmax,
    steered_scores,
    steering,
)
from focuslens.studies.paper.artefact import Artefact, load_artefact, save_artefact
from focuslens.studies.paper.page import write_index
from focuslens.studies.paper.study import Study
from focuslens.util.files import versions, without_folders

__all__ = ["ARTEFACTS", "reproduce"]

ARTEFACTS: dict[str, ModuleType] = {
    module.KEY: module
    for module in (heads, split_softmax, steering, steered_scores, retrieval, anatomy, attribution, faithfulness, focus)
}
"""Module of each artefact, by the artefact's key. Runs and pages use this order."""


def reproduce(
    study: Study, keys: Sequence[str] = (), *, say: Callable[[str], None] = lambda text: None
) -> list[Artefact]:
    """Reproduce artefacts, and write the page of all finished artefacts.

    Args:
        study: The model and its settings.
        keys: Keys of the artefacts to reproduce; by default all keys of :data:`ARTEFACTS`.
        say: Function that receives progress messages.

    Returns:
        All finished artefacts, including those of earlier runs.

    Raises:
        ValueError: If a key is unknown.
    """
    unknown = [key for key in keys if key not in ARTEFACTS]
    if unknown:
        raise ValueError(f"there is no artefact {unknown[0]!r}; there are {', '.join(ARTEFACTS)}")
    chosen = list(keys) or list(ARTEFACTS)
    if retrieval.KEY in chosen:
        retrieval.check(study)
    if study.settings.directions.source != "train" and any("directions" in ARTEFACTS[key].SECTIONS for key in chosen):
        _ = study.directions  # read now, because an unreadable file should fail before the slow work
    artefacts: list[Artefact] = []
    for key in chosen:
        make(study, key, say)
        artefacts = show(study)
    return artefacts


def show(study: Study) -> list[Artefact]:
    """Write the page of all finished artefacts, and return these artefacts."""
    loaded = [
        load_artefact(study.folder(key), study.header(key, *module.SECTIONS))
        for key, module in ARTEFACTS.items()
        # The header of an artefact that was never made could need files that nobody has given.
        if (study.folder(key) / "artefact.json").is_file()
    ]
    finished = [artefact for artefact in loaded if artefact is not None]
    write_index(study.out / "index.html", f"Focus Directions, on {study.settings.name}", _facts(study), finished)
    return finished


def make(study: Study, key: str, say: Callable[[str], None]) -> Artefact:
    """Load one artefact if it is finished; otherwise reproduce it."""
    module = ARTEFACTS[key]
    header = study.header(key, *module.SECTIONS)
    finished = load_artefact(study.folder(key), header)
    if finished is not None:
        say(f"{key}: already there")
        return finished
    say(f"{key} ...")
    # An older artefact with different settings must not count as finished while the run overwrites its files.
    (study.folder(key) / "artefact.json").unlink(missing_ok=True)
    artefact: Artefact = module.run(study)
    save_artefact(study.folder(key), artefact, header)
    for finding in artefact.findings:
        say(f"  {f'[{finding.verdict}] ' if finding.verdict else ''}{finding.text}")
    return artefact


def _facts(study: Study) -> dict[str, str]:
    settings, description = study.settings, study.executor.description
    shape = study.executor.shape
    choice = settings.data.distractors
    distractors = "" if choice == "random" else f", distractors by {choice}"
    sizes = ", ".join(f"{len(study.samples(part))} {part}" for part in ("train", "validation", "test"))
    return {
        "model": f"{without_folders(settings.model)}: {shape.n_layers} layers of {shape.n_heads} heads, "
        f"d_head {shape.d_head}; weights {description['weights']}, {description['dtype']} on {description['device']}",
        "questions": f"{Path(settings.data.file).name}: {sizes} samples of {settings.data.documents} documents, gold "
        f"document at positions {', '.join(map(str, settings.data.gold_positions))}{distractors}",
        "directions": settings.directions.source,
        "seed": str(settings.seed),
        "versions": ", ".join(f"{name} {number}" for name, number in versions().items()),
        "paper": "Zhu et al., Focus Directions Make Your Language Models Pay More Attention to Relevant Contexts, "
        "arXiv 2503.23306; tables marked as reported are from the paper, for Llama-3.2-3B-Instruct",
    }


def results_folder(name: str) -> Path:
    """Default folder of a model's results."""
    return Path("runs") / "paper" / name
