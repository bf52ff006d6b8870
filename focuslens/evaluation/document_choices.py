"""Parts of prompts that self-focus chooses, for many samples."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, cast, overload

from focuslens.interventions.self_focus import Choice, SelfFocus
from focuslens.model.batching import BATCH_TOKENS, RunOptions, map_batches, require_fitting
from focuslens.model.execution import Executor, executor_for
from focuslens.prompts.answers import require_samples
from focuslens.prompts.gold import Gold, gold_documents
from focuslens.prompts.sample import MultiDocSample
from focuslens.prompts.spans import require_spans
from focuslens.util.frames import rows_frame
from focuslens.util.progress import progress_bar
from focuslens.util.statistics import Interval, bootstrap_mean

if TYPE_CHECKING:
    import pandas as pd

    from focuslens.model.focus_model import FocusModel
    from focuslens.prompts.batch import EncodedPrompt

__all__ = ["Choices", "choices"]


@dataclass(frozen=True)
class Choices:
    """Choice of self-focus for each sample.

    Attributes:
        choices: The choices.
        gold: Index of the gold document per sample, a tuple of several, or ``None`` for none.
        sample_ids: ``MultiDocSample.id`` of each sample.
        question_ids: ``MultiDocSample.question_id`` of each sample.
    """

    choices: tuple[Choice, ...]
    gold: tuple[Gold, ...]
    sample_ids: tuple[str, ...]
    question_ids: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.choices)

    def to_frame(self) -> pd.DataFrame:
        """Data frame with one row per sample and part, with the columns of :meth:`Choice.to_frame`."""
        rows: list[dict[str, Any]] = [
            {"sample_id": sample, "question_id": question, "is_gold": row["part"] in gold_documents(gold), **row}
            for sample, question, gold, choice in zip(
                self.sample_ids, self.question_ids, self.gold, self.choices, strict=True
            )
            for row in cast("list[dict[str, Any]]", choice.to_frame().to_dict("records"))
        ]
        return rows_frame(rows, {"share": "share of the attention to all parts, 0 to 1"})

    def right(self) -> list[bool]:
        """Whether a gold document is among the chosen parts, per sample with a gold document."""
        return [
            not set(gold_documents(gold)).isdisjoint(choice.chosen)
            for choice, gold in zip(self.choices, self.gold, strict=True)
            if gold_documents(gold)
        ]

    def accuracy(self, *, seed: int = 0) -> Interval:
        """Share of samples with a gold document among the chosen parts, with a 95 % interval over questions.

        Samples without a gold document are left out. A prompt that the gate leaves alone counts as wrong.

        Raises:
            ValueError: If no sample has a gold document.
        """
        groups = [id for id, gold in zip(self.question_ids, self.gold, strict=True) if gold_documents(gold)]
        if not groups:
            raise ValueError("no sample has a gold document (gold_index), so no choice is right or wrong")
        return bootstrap_mean([float(right) for right in self.right()], groups=groups, seed=seed)


@overload
def choices(
    model: FocusModel | Executor,
    samples: Iterable[MultiDocSample],
    focus: SelfFocus,
    *,
    max_new_tokens: int = ...,
    batch_tokens: int = ...,
    progress: bool | None = ...,
) -> Choices: ...
@overload
def choices(
    model: FocusModel | Executor,
    samples: Iterable[MultiDocSample],
    focus: Sequence[SelfFocus],
    *,
    max_new_tokens: int = ...,
    batch_tokens: int = ...,
    progress: bool | None = ...,
) -> list[Choices]: ...
def choices(
    model: FocusModel | Executor,
    samples: Iterable[MultiDocSample],
    focus: SelfFocus | Sequence[SelfFocus],
    *,
    max_new_tokens: int = 100,
    batch_tokens: int = BATCH_TOKENS,
    progress: bool | None = None,
) -> Choices | list[Choices]:
    """Choose documents of the long prompt of each sample, without generating a focused response.

    Args:
        model: The model, or an executor that runs the model in other processes.
        samples: The samples.
        focus: Self-focus with ``parts="document"``; or several, which share a run of each prompt, and give one result
            each.
        max_new_tokens: Maximum length of a whole answer, if the rows of a response choose.
        batch_tokens: Maximum number of prompt tokens per batch; halved when memory runs out.
        progress: Whether to show a progress bar; :mod:`focuslens.util.progress` describes the default.

    Raises:
        ValueError: If there are no samples, the parts are not documents, or a prompt does not fit the context.
    """
    every = [focus] if isinstance(focus, SelfFocus) else list(focus)
    for one in every:
        if one.parts != "document":
            raise ValueError(
                f"parts is {one.parts!r}; choices are compared with gold documents, so it must be 'document'"
            )
    executor, sample_list = executor_for(model), require_samples(samples)
    options = RunOptions(max_new_tokens, batch_tokens, progress)
    prompts = [executor.encode(sample.prompt()) for sample in sample_list]
    require_spans(sample_list, prompts, ("document",))
    names, lengths = [sample.id for sample in sample_list], [len(prompt.tokens) for prompt in prompts]
    require_fitting(names, lengths, executor.shape.n_ctx)
    run = partial(_choose, every=every, max_new_tokens=max_new_tokens)
    found: dict[int, list[Choice]] = {}
    with progress_bar("choices", len(prompts), show=options.progress) as bar:
        for batch, made in map_batches(executor, run, prompts, names, lengths, options.batch_tokens):
            found.update(zip(batch, made, strict=True))
            bar.update(len(batch))
    results = [
        Choices(
            tuple(found[i][k] for i in range(len(prompts))),
            tuple(sample.gold for sample in sample_list),
            tuple(names),
            tuple(sample.question_id for sample in sample_list),
        )
        for k in range(len(every))
    ]
    return results[0] if isinstance(focus, SelfFocus) else results


def _choose(
    model: FocusModel, prompts: Sequence[EncodedPrompt], budget: int, *, every: Sequence[SelfFocus], max_new_tokens: int
) -> list[list[Choice]]:
    """Choices of each self-focus, per prompt."""
    del budget
    prefix = replace(model.prefill(list(prompts), hold_last=True), measured={})
    made = [focus.choose(model, prefix, max_new_tokens) for focus in every]
    return [[own[i] for own in made] for i in range(len(prompts))]
