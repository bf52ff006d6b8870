"""What all artefacts of one model share: the model, its questions, its ranking of heads, its directions.

Everything that takes long is kept in the results' folder as it is made, so that a killed run goes on from there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from focuslens.data.selection import SampleSelection, open_selections
from focuslens.directions.training import train_focus_directions
from focuslens.evaluation import Interval, Setting, Sweep, bootstrap_mean, resampled_means, run_sweep
from focuslens.heads import Head
from focuslens.hooks import Intervention
from focuslens.interventions.directions import FocusDirections, open_directions
from focuslens.model.execution import Executor, InProcess
from focuslens.model.focus_model import FocusModel
from focuslens.prompts.prompt import MultiDocSample, prompts_digest
from focuslens.scores.contextual import ContextualScores, by_outcome
from focuslens.studies.paper.scored import How, score_in_chunks
from focuslens.studies.paper.settings import PaperSettings
from focuslens.util.files import versions, write_json

__all__ = ["Part", "Study"]

Part: TypeAlias = Literal["train", "validation", "test"]
_PARTS: tuple[Part, ...] = get_args(Part)


@dataclass(frozen=True)
class Study:
    """One model's reproduction.

    Attributes:
        settings: What is run.
        out: The results' folder.
        data_file: Where the questions lie, if not at the settings' own name.
        haystack: Where the essays lie, if not at the settings' own name.
        progress: Show progress bars; by default where someone may watch.
        pool: Runs sweeps, scores and training; by default the model does. What looks into single heads' keys opens the
            model in this process too.
    """

    settings: PaperSettings
    out: Path
    data_file: Path | None = None
    haystack: Path | None = None
    progress: bool | None = None
    pool: Executor | None = None

    @cached_property
    def executor(self) -> Executor:
        """What runs the model."""
        return InProcess(self.model) if self.pool is None else self.pool

    @cached_property
    def model(self) -> FocusModel:
        """The model, in this process."""
        return FocusModel.from_pretrained(self.settings.model, **self.settings.model_options)

    def selection(self, part: Part) -> SampleSelection:
        """The choice of one part's samples.

        Validation questions of a file are taken out of its training half: a fifth of it where the settings give no
        number.
        """
        data = self.settings.data
        questions: dict[Part, int | None] = {"train": data.train, "validation": data.validation, "test": data.test}
        return SampleSelection(
            data.file,
            num_documents=data.documents,
            gold_positions=tuple(place - 1 for place in data.gold_positions),
            part=part,
            questions=questions[part],
            every_position=data.every_position,
            validation=0.2 if data.validation is None else data.validation,
            seed=self.settings.seed,
            path=self.data_file,
        )

    def samples(self, part: Part) -> Sequence[MultiDocSample]:
        """The samples of one part."""
        return self._samples[part]

    def interval(self, part: Part, values: Tensor, sample_ids: Sequence[str]) -> Interval | None:
        """The mean of one value a sample with its interval over questions, without those that are NaN.

        Samples of one question are not independent. ``None`` where no value is left.
        """
        known, questions = self._known(part, rearrange(values, "sample -> sample 1"), sample_ids)
        if not questions:
            return None
        return bootstrap_mean(known[:, 0].tolist(), groups=questions, seed=self.settings.seed)

    def resampled(
        self, part: Part, values: Float[Tensor, "sample layer head"], sample_ids: Sequence[str]
    ) -> Float[np.ndarray, "resample column"]:
        """Means of all heads, layer by layer, on resamples of a part's questions; see :func:`resampled_means`."""
        by_head = rearrange(values, "sample layer head -> sample (layer head)")
        known, questions = self._known(part, by_head, sample_ids)
        return resampled_means(known.numpy(), groups=questions, seed=self.settings.seed)

    def _known(
        self, part: Part, values: Float[Tensor, "sample column"], sample_ids: Sequence[str]
    ) -> tuple[Float[Tensor, "known column"], list[str]]:
        """The values of samples that are not NaN, and their questions."""
        questions, keep = {sample.id: sample.question_id for sample in self.samples(part)}, ~values.isnan().any(dim=1)
        return values[keep], [questions[one] for one, kept in zip(sample_ids, keep.tolist(), strict=True) if kept]

    @cached_property
    def _samples(self) -> dict[Part, Sequence[MultiDocSample]]:
        return dict(zip(_PARTS, open_selections(map(self.selection, _PARTS)), strict=True))

    def header(self, key: str, *sections: str) -> dict[str, Any]:
        """What an artefact was made of: the model, its questions, and the sections of the settings that it depends on.

        The model is described by its weights, so that results of other weights are not taken for these.
        """
        shared = ("name", "model", "model_options", "data", "max_new_tokens", "seed")
        everything = asdict(self.settings)
        inputs: dict[str, str] = {}
        if "directions" in sections and self.settings.directions.source != "train":
            inputs["directions_sha256"] = self.directions.digest
        if "retrieval" in sections and self.settings.retrieval.haystack != "synthetic":
            inputs["haystack_sha256"] = self._haystack_digest
        return {
            "artefact": key,
            "model": self.executor.description,
            "settings": {name: everything[name] for name in (*shared, *sections)},
            "prompts_sha256": self._prompts,
            **inputs,
            "versions": versions(),
        }

    @cached_property
    def _prompts(self) -> dict[str, str]:
        return {part: prompts_digest(samples) for part, samples in self._samples.items()}

    @cached_property
    def _haystack_digest(self) -> str:
        """Tells the essays and needles from others."""
        digest, folder = hashlib.sha256(), self.haystack or Path(self.settings.retrieval.haystack)
        for path in sorted(one for one in folder.iterdir() if one.is_file()):
            digest.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
        return digest.hexdigest()

    def folder(self, key: str) -> Path:
        """Where an artefact's files go."""
        return self.out / key

    def scores(
        self, part: Part, case: Literal["long", "gold"], interventions: Sequence[Intervention] = ()
    ) -> ContextualScores:
        """Contextual scores of one part's prompts, made in chunks that are kept."""
        described = [one.describe() for one in interventions]
        folder = self.kept(f"{part}-{case}", part=part, case=case, interventions=described)
        return score_in_chunks(self.executor, self.samples(part), case, folder, self.how(), interventions)

    def how(self, max_new_tokens: int | None = None) -> How:
        """How the model is run, with responses of the settings' length where no other is given."""
        return {
            "max_new_tokens": self.settings.max_new_tokens if max_new_tokens is None else max_new_tokens,
            "batch_tokens": self.settings.batch_tokens,
            "progress": self.progress,
        }

    def kept(self, name: str, *sections: str, **made_of: Any) -> Path:
        """The folder of measurements, whose name tells what they are made of from anything else.

        Args:
            name: What they are.
            sections: Of the settings, those that they depend on.
            made_of: What else they depend on, as JSON.
        """
        return self.out / "measured" / f"{name}-{_short({**self.header('scores', *sections), **made_of}, 16)}"

    def scores_by_case(self, part: Part, interventions: Sequence[Intervention] = ()) -> dict[str, ContextualScores]:
        """Scores of the cases ``long``, ``correct``, ``wrong`` and ``gold``, in the order of Table 1."""
        long, gold = (self.scores(part, case, interventions) for case in ("long", "gold"))
        return {"long": long, **by_outcome(long, gold), "gold": gold}

    @cached_property
    def ranking(self) -> list[Head]:
        """All heads by their relevant score on training questions, best first."""
        ranking = self.scores("train", "long").ranking()
        write_json(self.out / "ranking.json", {**self.header("ranking"), "heads": [list(head) for head in ranking]})
        return ranking

    def sweep(self, key: str, part: Part, settings: Sequence[Setting]) -> Sweep:
        """Accuracy under every setting, with records that a killed run continues."""
        return run_sweep(
            self.executor,
            self.samples(part),
            settings,
            max_new_tokens=self.settings.max_new_tokens,
            batch_tokens=self.settings.batch_tokens,
            out=self.folder(key) / f"{part}-{self._digest(settings)}.jsonl",
            data=self.selection(part).describe(),
            seed=self.settings.seed,
            progress=self.progress,
        )

    def _digest(self, settings: Sequence[Setting]) -> str:
        """Tells these settings from others, whose records stay where they are."""
        return _short([self.header("sweep"), [setting.describe() for setting in settings]])

    @cached_property
    def directions(self) -> FocusDirections:
        """The directions that the settings name."""
        return self.directions_at(self.settings.directions.site)

    def directions_at(self, site: Literal["rotary", "projection"]) -> FocusDirections:
        """Directions trained at one site, or read from where the settings say.

        Raises:
            ValueError: If directions are read and act at another site.
        """
        wanted = self.settings.directions
        if wanted.source != "train":
            found = open_directions(wanted.source)
            if found.site != site:
                raise ValueError(f"the directions in {wanted.source} act at the {found.site} site, not at {site!r}")
            return found
        heads = self.ranking[: wanted.heads]
        made_of = {**self.header("directions", "directions"), "site": site, "heads": [list(head) for head in heads]}
        folder = self.out / "directions" / site
        kept = _kept_directions(folder, made_of)
        if kept is not None:
            return kept
        made = train_focus_directions(
            self.executor,
            self.samples("train"),
            heads,
            site=site,
            prompts=wanted.prompts,
            epochs=wanted.epochs,
            learning_rate=wanted.learning_rate,
            max_new_tokens=self.settings.max_new_tokens,
            seed=self.settings.seed,
            memory_gb=wanted.memory_gb,
            batch_tokens=self.settings.batch_tokens,
            checkpoint=folder / f"checkpoint-{_short(made_of)}.pt",
            data=self.selection("train").describe(),
            progress=self.progress,
        )
        (folder / "made_of.json").unlink(
            missing_ok=True
        )  # it must never stand beside vectors that it does not describe
        made.save(folder)
        write_json(folder / "made_of.json", made_of)
        (folder / f"checkpoint-{_short(made_of)}.pt").unlink(missing_ok=True)
        return made


def _short(content: Any, digits: int = 12) -> str:
    """A digest that tells some JSON from other."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:digits]


def _kept_directions(folder: Path, made_of: Mapping[str, Any]) -> FocusDirections | None:
    path = folder / "made_of.json"
    if not path.is_file() or json.loads(path.read_text()) != json.loads(json.dumps(made_of)):
        return None
    return FocusDirections.load(folder)
