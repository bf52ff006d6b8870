"""All artefacts of one model, one after the other; what is finished is not done again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

from focuslens.studies.paper import anatomy, attribution, heads, retrieval, split_softmax, steered_scores, steering
from focuslens.studies.paper.artefact import Artefact, load_artefact, save_artefact
from focuslens.studies.paper.page import write_index
from focuslens.studies.paper.study import Study
from focuslens.util.files import versions

__all__ = ["ARTEFACTS", "reproduce"]

ARTEFACTS: dict[str, ModuleType] = {
    module.KEY: module for module in (heads, split_softmax, steering, steered_scores, retrieval, anatomy, attribution)
}
"""Every artefact by its key, in the order in which they are made and shown."""


def reproduce(
    study: Study, keys: Sequence[str] = (), *, say: Callable[[str], None] = lambda text: None
) -> list[Artefact]:
    """Make artefacts, by default all, and the page that shows all that are there.

    Args:
        study: The model and its settings.
        keys: Which; all of :data:`ARTEFACTS` where there are none.
        say: Is told what is being done.

    Raises:
        ValueError: If a key is unknown.
    """
    unknown = [key for key in keys if key not in ARTEFACTS]
    if unknown:
        raise ValueError(f"there is no artefact {unknown[0]!r}; there are {', '.join(ARTEFACTS)}")
    wanted = list(keys) or list(ARTEFACTS)
    if retrieval.KEY in wanted:
        retrieval.check(study)
    if study.settings.directions.source != "train" and any("directions" in ARTEFACTS[key].SECTIONS for key in wanted):
        _ = study.directions  # what cannot be read is better known now than after the work
    shown: list[Artefact] = []
    for key in wanted:
        make(study, key, say)
        shown = show(study)
    return shown


def show(study: Study) -> list[Artefact]:
    """Write the page of the artefacts that are there, and give them."""
    finished = [load_artefact(study.folder(key), study.header(key, *one.SECTIONS)) for key, one in ARTEFACTS.items()]
    shown = [one for one in finished if one is not None]
    write_index(study.out / "index.html", f"Focus Directions, on {study.settings.name}", _facts(study), shown)
    return shown


def make(study: Study, key: str, say: Callable[[str], None]) -> Artefact:
    """One artefact: read if it is there, else made."""
    module = ARTEFACTS[key]
    header = study.header(key, *module.SECTIONS)
    found = load_artefact(study.folder(key), header)
    if found is not None:
        say(f"{key}: already there")
        return found
    say(f"{key} ...")
    # Pictures and tables are about to change: what was finished under other settings is so no more.
    (study.folder(key) / "artefact.json").unlink(missing_ok=True)
    made: Artefact = module.run(study)
    save_artefact(study.folder(key), made, header)
    for one in made.findings:
        say(f"  {f'[{one.verdict}] ' if one.verdict else ''}{one.text}")
    return made


def _facts(study: Study) -> dict[str, str]:
    settings, description = study.settings, study.executor.description
    shape = study.executor.shape
    sizes = ", ".join(f"{len(study.samples(part))} {part}" for part in ("train", "validation", "test"))
    return {
        "model": f"{settings.model}: {shape.n_layers} layers of {shape.n_heads} heads, d_head {shape.d_head}; "
        f"weights {description['weights']}, {description['dtype']} on {description['device']}",
        "questions": f"{settings.data.file}: {sizes} samples of {settings.data.documents} documents, gold document at "
        f"positions {', '.join(map(str, settings.data.gold_positions))}",
        "directions": settings.directions.source,
        "seed": str(settings.seed),
        "versions": ", ".join(f"{name} {number}" for name, number in versions().items()),
        "paper": "Zhu et al., Focus Directions Make Your Language Models Pay More Attention to Relevant Contexts, "
        "arXiv 2503.23306; tables marked as reported are its own, for Llama-3.2-3B-Instruct",
    }


def results_folder(name: str) -> Path:
    """Where a model's results go by default."""
    return Path("runs") / "paper" / name
