"""Inputs that all artefacts of one model share: the model, its questions, its ranking of heads and its directions.

Slow results are stored in the folder of results as soon as they are computed, so that a killed run can resume.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from focuslens.data.selection import SYNTHETIC, SampleSelection, open_selections
from focuslens.directions.gold_responses import responses_path
from focuslens.directions.training import train_focus_directions
from focuslens.evaluation import Interval, Setting, Sweep, bootstrap_mean, resampled_means, run_sweep
from focuslens.heads import Head
from focuslens.hooks import Intervention
from focuslens.interventions.directions import FocusDirections, open_directions
from focuslens.model.batching import RunOptions
from focuslens.model.execution import Executor
from focuslens.model.focus_model import FocusModel
from focuslens.prompts.sample import MultiDocSample, prompts_digest
from focuslens.prompts.template import PromptTemplate
from focuslens.scores.contextual_scores import ContextualScores, by_outcome
from focuslens.studies.paper.scored import score_in_chunks
from focuslens.studies.paper.settings import PaperSettings
from focuslens.util.files import versions, without_folders, write_json
from focuslens.util.refused_runs import same_run, without_defaults

__all__ = ["Part", "Study"]

Part: TypeAlias = Literal["train", "validation", "test"]
_PARTS: tuple[Part, ...] = get_args(Part)


@dataclass(frozen=True)
class Study:
    """Reproduction of the paper for one model.

    Attributes:
        settings: Settings of the reproduction.
        out: Folder of the results.
        data_file: Path of the file of questions; by default the file that ``settings`` names.
        haystack: Directory of essays and needles; by default the directory that ``settings`` names.
        progress: Whether to show progress bars; :mod:`focuslens.util.progress` describes the default.
        pool: Executor of sweeps, scores and training; by default the model in this process. The decomposition of
            directions always runs in this process.
    """

    settings: PaperSettings
    out: Path
    data_file: Path | None = None
    haystack: Path | None = None
    progress: bool | None = None
    pool: Executor | None = None

    @cached_property
    def executor(self) -> Executor:
        """Executor of the model: ``pool`` if there is a pool, otherwise the model in this process."""
        return self.model if self.pool is None else self.pool

    @cached_property
    def model(self) -> FocusModel:
        """The model, opened in this process."""
        return FocusModel.from_pretrained(self.settings.model, **self.settings.model_options)

    def selection(self, part: Part) -> SampleSelection:
        """Selection of the samples of one part.

        The validation questions of a file are taken out of the file's training half. If the settings give no number of
        validation questions, a fifth of the training half is taken.
        """
        data = self.settings.data
        questions: dict[Part, int | None] = {"train": data.train, "validation": data.validation, "test": data.test}
        # Result files can be published, and the folders of this machine are nobody's business.
        name = data.file if data.file == SYNTHETIC else Path(data.file).name
        return SampleSelection(
            name,
            num_documents=data.documents,
            gold_positions=tuple(place - 1 for place in data.gold_positions),
            part=part,
            questions=questions[part],
            every_position=data.every_position,
            validation=0.2 if data.validation is None else data.validation,
            seed=self.settings.seed,
            distractors=data.distractors,
            template=None if data.template is None else PromptTemplate.load(data.template),
            path=self.data_file if name == data.file or self.data_file is not None else Path(data.file),
        )

    def samples(self, part: Part, questions: int | None = None) -> Sequence[MultiDocSample]:
        """Samples of one part of the data, or of its first ``questions`` questions."""
        samples = self._samples[part]
        if questions is None:
            return samples
        first = set(list(dict.fromkeys(sample.question_id for sample in samples))[:questions])
        return [sample for sample in samples if sample.question_id in first]

    def training_samples(self, questions: int | None) -> Sequence[MultiDocSample]:
        """Training samples of another number of questions, none of which is a validation question."""
        if questions is None:
            return self.samples("train")
        (samples,) = open_selections([replace(self.selection("train"), questions=questions)])
        return samples

    def interval(self, part: Part, values: Tensor, sample_ids: Sequence[str]) -> Interval | None:
        """Mean over samples with its interval over questions, or ``None`` if all values are NaN.

        NaN values are left out. The interval is over questions, because samples of the same question are not
        independent.

        Args:
            part: Part that contains the samples.
            values: One value per sample.
            sample_ids: ``MultiDocSample.id`` of each sample.
        """
        known, questions = self._known(part, rearrange(values, "sample -> sample 1"), sample_ids)
        if not questions:
            return None
        return bootstrap_mean(known[:, 0].tolist(), groups=questions, seed=self.settings.seed)

    def resampled(
        self, part: Part, values: Float[Tensor, "sample layer head"], sample_ids: Sequence[str]
    ) -> Float[np.ndarray, "resample column"]:
        """Mean per head on resamples of a part's questions (see :func:`resampled_means`). Columns are heads, by layer.

        Samples with NaN values are left out.
        """
        by_head = rearrange(values, "sample layer head -> sample (layer head)")
        known, questions = self._known(part, by_head, sample_ids)
        return resampled_means(known.numpy(), groups=questions, seed=self.settings.seed)

    def _known(
        self, part: Part, values: Float[Tensor, "sample column"], sample_ids: Sequence[str]
    ) -> tuple[Float[Tensor, "known column"], list[str]]:
        """Values of the samples without NaN values, and the question id of each of these samples."""
        questions, known = {sample.id: sample.question_id for sample in self.samples(part)}, ~values.isnan().any(dim=1)
        return values[known], [
            questions[id] for id, is_known in zip(sample_ids, known.tolist(), strict=True) if is_known
        ]

    @cached_property
    def _samples(self) -> dict[Part, Sequence[MultiDocSample]]:
        return dict(zip(_PARTS, open_selections(map(self.selection, _PARTS)), strict=True))

    def header(self, key: str, *sections: str) -> dict[str, Any]:
        """Origin of an artefact as JSON values: the model, the prompts, and the settings that the artefact depends on.

        The model's description includes a digest of the weights. Different weights therefore give different headers.

        Args:
            key: Key of the artefact.
            sections: Names of the sections of the settings that the artefact depends on.
        """
        shared = ("name", "model", "model_options", "data", "max_new_tokens", "seed")
        all_settings = asdict(self.settings)
        if self.settings.data.template is None:  # results of earlier versions have no such entry
            del all_settings["data"]["template"]
        inputs: dict[str, str] = {}
        if "directions" in sections and self.settings.directions.source != "train":
            inputs["directions_sha256"] = self.directions.digest
        if "retrieval" in sections and self.settings.retrieval.haystack != "synthetic":
            inputs["haystack_sha256"] = self._haystack_digest
        return {
            "artefact": key,
            "model": self.executor.description,
            "settings": without_folders({name: all_settings[name] for name in (*shared, *sections)}),
            "prompts_sha256": self._prompts,
            **inputs,
            "versions": versions(),
        }

    @cached_property
    def _prompts(self) -> dict[str, str]:
        return {part: prompts_digest(samples) for part, samples in self._samples.items()}

    @cached_property
    def _haystack_digest(self) -> str:
        """SHA-256 of the files of essays and needles."""
        digest, folder = hashlib.sha256(), self.haystack or Path(self.settings.retrieval.haystack)
        for path in sorted(path for path in folder.iterdir() if path.is_file()):
            digest.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
        return digest.hexdigest()

    def folder(self, key: str) -> Path:
        """Folder of an artefact's files."""
        return self.out / key

    def scores(
        self,
        part: Part,
        case: Literal["long", "gold"],
        interventions: Sequence[Intervention] = (),
        questions: int | None = None,
    ) -> ContextualScores:
        """Contextual scores of one part's prompts, or of the prompts of its first ``questions`` questions.

        Finished chunks are stored, and read again when a run resumes.
        """
        descriptions = [intervention.describe() for intervention in interventions]
        some = {} if questions is None else {"questions": questions}
        folder = self.kept(f"{part}-{case}", part=part, case=case, interventions=descriptions, **some)
        samples = self.samples(part, questions)
        return score_in_chunks(self.executor, samples, case, folder, self.run_options(), interventions)

    def run_options(self, max_new_tokens: int | None = None) -> RunOptions:
        """Options of a model run. By default, ``max_new_tokens`` is the value in the settings."""
        length = self.settings.max_new_tokens if max_new_tokens is None else max_new_tokens
        return RunOptions(length, self.settings.batch_tokens, self.progress)

    def kept(self, name: str, *sections: str, **made_of: Any) -> Path:
        """Folder of stored measurements. The folder's name includes a digest of everything that determines them.

        Args:
            name: Name of the measurements.
            sections: Sections of the settings that the measurements depend on.
            made_of: Further JSON values that the measurements depend on.
        """
        return self.out / "measured" / f"{name}-{_short({**self.header('scores', *sections), **made_of}, 16)}"

    def scores_by_case(self, part: Part, interventions: Sequence[Intervention] = ()) -> dict[str, ContextualScores]:
        """Contextual scores of the cases ``long``, ``correct``, ``wrong`` and ``gold``, in the order of Table 1."""
        long, gold = (self.scores(part, case, interventions) for case in ("long", "gold"))
        return {"long": long, **by_outcome(long, gold), "gold": gold}

    @cached_property
    def ranked_on(self) -> ContextualScores:
        """Contextual scores of the training questions, on which heads are ranked, with their chance level."""
        return self.scores("train", "long").with_chance(self.executor, self.samples("train"))

    @cached_property
    def ranking(self) -> list[Head]:
        """All heads by mean relevant score on training questions, best first; stored in ``ranking.json``.

        The file also has the share that even attention would give to the relevant document.
        """
        ranking, share = self.ranked_on.ranking(), self.ranked_on.even_share()
        chance = {} if share is None else {"chance": share}
        heads = [list(head) for head in ranking]
        write_json(self.out / "ranking.json", {**self.header("ranking"), "heads": heads, **chance})
        return ranking

    def sweep(self, key: str, part: Part, settings: Sequence[Setting], questions: int | None = None) -> Sweep:
        """Evaluate one part's samples, or those of its first ``questions`` questions, under every setting.

        A killed run resumes from the stored records.
        """
        some = {} if questions is None else {"questions_of_the_sweep": questions}
        return run_sweep(
            self.executor,
            self.samples(part, questions),
            settings,
            max_new_tokens=self.settings.max_new_tokens,
            batch_tokens=self.settings.batch_tokens,
            out=self.folder(key) / f"{part}-{self._digest(settings)}.jsonl",
            data={**self.selection(part).describe(), **some},
            seed=self.settings.seed,
            progress=self.progress,
        )

    def _digest(self, settings: Sequence[Setting]) -> str:
        """Digest of a sweep's settings. Different settings get different files of records."""
        return _short([self.header("sweep"), [setting.describe() for setting in settings]])

    @cached_property
    def directions(self) -> FocusDirections:
        """Directions at the site that the settings name."""
        return self.directions_at(self.settings.directions.site)

    def directions_at(self, site: Literal["rotary", "projection"], rank: int = 0) -> FocusDirections:
        """Directions at one site, trained or read from the directory that the settings name.

        Trained directions are stored, and read again when a run resumes. Directions with a rank, which depend on the
        question, are trained by the answers, for the heads on which they are compared with others.

        Raises:
            ValueError: If directions from a directory do not act at ``site``.
        """
        settings = self.settings.directions
        if settings.source != "train" and not rank:
            given = open_directions(settings.source)
            if given.site != site:
                raise ValueError(f"the directions in {settings.source} act at the {given.site} site, not at {site!r}")
            return given
        epochs, learning_rate = settings.epochs, settings.learning_rate
        if rank:
            epochs, learning_rate = self.settings.focus.epochs, self.settings.focus.learning_rate
        heads = self.ranking[: max(self.settings.focus.steered) if rank else settings.heads]
        made_of = {**self.header("directions", "directions"), "site": site, "heads": [list(head) for head in heads]}
        if rank:
            made_of |= {"rank": rank, "objective": "answer", "epochs": epochs, "learning_rate": learning_rate}
        folder = self.out / "directions" / (f"{site}-rank-{rank}" if rank else site)
        stored = _stored_directions(folder, made_of)
        if stored is not None:
            return stored
        trained = train_focus_directions(
            self.model if rank else self.executor,
            self.samples("train"),
            heads,
            site=site,
            prompts=settings.prompts,
            epochs=epochs,
            learning_rate=learning_rate,
            rank=rank,
            objective="answer" if rank else "score",
            max_new_tokens=self.settings.max_new_tokens,
            seed=self.settings.seed,
            memory_gb=settings.memory_gb,
            batch_tokens=self.settings.batch_tokens,
            checkpoint=folder / f"checkpoint-{_short(made_of)}.pt",
            data=self.selection("train").describe(),
            progress=self.progress,
        )
        # The old record is deleted first, because a run killed during ``save`` would leave it beside new vectors.
        (folder / "made_of.json").unlink(missing_ok=True)
        trained.save(folder)
        write_json(folder / "made_of.json", made_of)
        checkpoint = folder / f"checkpoint-{_short(made_of)}.pt"
        for unfinished in (checkpoint, responses_path(checkpoint)):
            unfinished.unlink(missing_ok=True)
        return trained


def _short(content: Any, digits: int = 12) -> str:
    """First hexadecimal digits of the SHA-256 of a JSON value."""
    return hashlib.sha256(json.dumps(without_defaults(content), sort_keys=True).encode()).hexdigest()[:digits]


def _stored_directions(folder: Path, made_of: Mapping[str, Any]) -> FocusDirections | None:
    path = folder / "made_of.json"
    if not path.is_file() or not same_run(json.loads(path.read_text()), made_of):
        return None
    return FocusDirections.load(folder)
