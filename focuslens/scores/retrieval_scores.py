"""Retrieval heads: heads that copy the needle from the haystack into the response, token by token.

The method is that of "Retrieval Head Mechanistically Explains Long-Context Factuality" (Wu et al., 2024, arXiv
2404.15574). A contextual score measures how much attention response tokens pay to the relevant document. A copy score
measures how often a head's most attended key, in the row that *generates* a response token, lies in the needle and is
the same token.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange, reduce
from jaxtyping import Bool, Float, Int
from torch import Tensor

from focuslens.data.needles import NeedleSample
from focuslens.heads import Head, rank_heads, top_heads
from focuslens.hooks import Hook, RowHook, hook_name
from focuslens.model.batching import BATCH_TOKENS, RunOptions, map_batches, require_fitting
from focuslens.model.execution import Executor, executor_for
from focuslens.prompts.batch import EncodedPrompt
from focuslens.scores.rouge import rouge_1_recall
from focuslens.scores.saved_results import SavedResult
from focuslens.util.frames import rows_frame
from focuslens.util.progress import progress_bar, track

if TYPE_CHECKING:
    import pandas as pd

    from focuslens.heads import ModelShape
    from focuslens.model.focus_model import FocusModel

__all__ = ["NoRunCountsError", "RetrievalScores", "copy_runs", "copy_scores", "retrieval_scores"]

_NO_TOKEN = -1
_COPIED = "copied"


class NoRunCountsError(ValueError):
    """Error for a set of runs in which no response contains its needle. Retrieval scores are then undefined."""


@dataclass(frozen=True, eq=False)
class RetrievalScores(SavedResult):
    """The copy score of each head in each run.

    A run is one prompt with its response. A response that does not contain the needle is not evidence about which heads
    copy the needle. A run therefore counts only if the ROUGE-1 recall of its response exceeds ``min_recall``.

    Attributes:
        by_sample: The copy score of each head in each run (see :func:`copy_scores`), including runs that do not count.
        recall: ROUGE-1 recall of each response against its reference, from 0 to 1.
        min_recall: Recall that a run must exceed to count.
        responses: The response of each run.
        sample_ids: ``NeedleSample.id`` of each run.

    Raises:
        NoRunCountsError: If no run counts.
    """

    by_sample: Float[Tensor, "sample layer head"]
    recall: tuple[float, ...]
    min_recall: float
    responses: tuple[str, ...]
    sample_ids: tuple[str, ...]

    def __post_init__(self) -> None:
        if any(self.counted):
            return
        best = max(range(len(self)), key=lambda i: self.recall[i])
        raise NoRunCountsError(
            f"none of the {len(self)} runs counts: the best ROUGE-1 recall is {self.recall[best]:.3f} (sample "
            f"{self.sample_ids[best]!r}, whose response is {self.responses[best]!r}), and it must exceed "
            f"min_recall={self.min_recall:g}. Use a model that finds the needle, shorter prompts, more new tokens "
            "or a lower min_recall"
        )

    @classmethod
    def of_runs(
        cls,
        samples: Sequence[NeedleSample],
        by_sample: Float[Tensor, "sample layer head"],
        responses: Sequence[str],
        min_recall: float = 0.5,
    ) -> RetrievalScores:
        """Create retrieval scores from finished runs (see :func:`copy_runs`), and compute the recall of every run."""
        recall = [
            rouge_1_recall(response, sample.reference) for response, sample in zip(responses, samples, strict=True)
        ]
        ids = tuple(sample.id for sample in samples)
        return cls(by_sample, tuple(recall), min_recall, tuple(responses), ids)

    def __len__(self) -> int:
        return len(self.sample_ids)

    @property
    def counted(self) -> tuple[bool, ...]:
        """Whether each run counts. A run counts if the recall of its response exceeds ``min_recall``."""
        return tuple(recall > self.min_recall for recall in self.recall)

    @property
    def scores(self) -> Float[Tensor, "layer head"]:
        """Retrieval score of each head: the mean of its copy scores over the runs that count (see :attr:`counted`)."""
        return self.by_sample[torch.tensor(self.counted)].mean(dim=0)

    def ranking(self) -> list[Head]:
        """All heads, in descending order of retrieval score."""
        return rank_heads(self.scores)

    def top_heads(self, k: int) -> list[Head]:
        """Retrieval heads: the ``k`` heads with the highest retrieval score, in descending order.

        Raises:
            ValueError: If ``k`` is negative or greater than the number of heads.
        """
        return top_heads(self.scores, k)

    def to_frame(self) -> pd.DataFrame:
        """Data frame with one row per head (``layer``, ``head``, ``score``), in descending order of score."""
        scores = self.scores
        rows = [{"layer": head.layer, "head": head.head, "score": float(scores[head])} for head in self.ranking()]
        return rows_frame(rows, {"score": "copied tokens per needle token"})


def copy_scores(
    attended: Int[Tensor, "batch layer head step"],
    keys: Int[Tensor, "batch key"],
    needle: Bool[Tensor, "batch key"],
    generated: Int[Tensor, "batch step"],
) -> Float[Tensor, "batch layer head"]:
    """Compute copy scores: the number of steps at which a head copies a token, divided by the number of needle tokens.

    At a step, a head copies a token if its most attended key lies in the needle and is the token that the step
    generates. A score can exceed 1 only if the response repeats tokens of the needle.

    Args:
        attended: Index of each head's most attended key, in the row that generates the token of each step.
        keys: Token id of each key.
        needle: Whether each key belongs to the needle. Each prompt must have at least one such key.
        generated: Token ids of each response; -1 after the end of a response.
    """
    prompt = torch.arange(len(keys))[:, None, None, None]
    is_same = keys[prompt, attended] == rearrange(generated, "batch step -> batch 1 1 step")
    n_copied = reduce((needle[prompt, attended] & is_same).float(), "batch layer head step -> batch layer head", "sum")
    return n_copied / rearrange(reduce(needle.float(), "batch key -> batch", "sum"), "batch -> batch 1 1")


class _MostAttended:
    """Collector of each head's most attended key at each decode step. Hooks on ``hook_pattern`` find the keys."""

    def __init__(self, shape: ModelShape, n_prompts: int) -> None:
        self._steps: list[list[Tensor]] = [[] for _ in range(shape.n_layers)]
        self._empty = torch.zeros(n_prompts, shape.n_layers, shape.n_heads, 0, dtype=torch.long)

    def hooks(self) -> list[Hook]:
        """Hooks for forward passes with one row per prompt. The first pass must run the last token of each prompt."""
        return [(hook_name(layer, "hook_pattern"), self._observer(steps)) for layer, steps in enumerate(self._steps)]

    def _observer(self, steps: list[Tensor]) -> Any:
        def read(pattern: Float[Tensor, "batch head 1 key"]) -> None:
            steps.append(pattern[:, :, 0].argmax(dim=-1))

        return RowHook(lambda pattern, hook: read(pattern), read, reads=True)

    def columns(self) -> Int[Tensor, "batch layer head step"]:
        """Columns of the most attended keys. A column is a token position plus the left padding of the prompt."""
        if not self._steps[0]:
            return self._empty
        device = self._steps[0][0].device  # layers can be on different devices
        return torch.stack([torch.stack(steps, dim=-1).to(device) for steps in self._steps], dim=1).cpu()


def _encode(executor: Executor, sample: NeedleSample, span: str | None) -> EncodedPrompt:
    """Encode the prompt of a sample. The only span of the encoded prompt is the text to copy."""
    prompt = executor.encode(sample.prompt)
    name = span or ("answer" if prompt.spans.get("answer") else "needle")
    if not prompt.spans.get(name):
        raise ValueError(
            f"the prompt of sample {sample.id!r} has no span {name!r}; it has {', '.join(sorted(prompt.spans))}. "
            "span must name one of these, or be None"
        )
    return EncodedPrompt(prompt.tokens, {_COPIED: prompt.spans[name]}, prompt.text, literal=prompt.literal)


@torch.no_grad()
def _run(
    model: FocusModel, prompts: Sequence[EncodedPrompt], budget: int, max_new_tokens: int
) -> tuple[Float[Tensor, "batch layer head"], list[str]]:
    """Run one batch. Return the copy score of each head for each prompt, and the responses."""
    # The row of a prompt's last token generates the first response token. The prefill therefore holds back the last
    # token, so that the hooks can observe its row.
    prefix = model.prefill(prompts, hold_last=True)
    collector = _MostAttended(model.shape, len(prompts))
    responses = model.decode(prefix, max_new_tokens=max_new_tokens, observers=collector.hooks())
    attended, batch = collector.columns(), prefix.batch
    n_steps = attended.shape[-1]
    n_keys = batch.width + n_steps
    # ``_NO_TOKEN`` marks the keys of response tokens, and the steps after the end of a response.
    keys = torch.full((len(batch), n_keys), _NO_TOKEN)
    keys[:, : batch.width] = batch.tokens(model.pad_token)
    generated = torch.full((len(batch), n_steps), _NO_TOKEN)
    for row, response in zip(generated, responses, strict=True):
        row[: len(response.tokens)] = response.tokens
    scores = copy_scores(attended, keys, batch.columns(_COPIED, n_keys), generated)
    return scores, [response.text for response in responses]


def copy_runs(
    model: FocusModel | Executor, samples: Sequence[NeedleSample], options: RunOptions, *, span: str | None = None
) -> tuple[Float[Tensor, "sample layer head"], list[str]]:
    """Run all samples. Return the copy score of every head in each run, and the response of each run.

    The results include runs whose response does not contain the needle. ``span`` is the same as in
    :func:`retrieval_scores`.

    Raises:
        ValueError: If a prompt does not have the span ``span``, or if a reference has no word that ROUGE counts.
        ImportError: If rouge-score is not installed.
    """
    for sample in samples:
        rouge_1_recall("", sample.reference)  # check the references before a long run
    executor, show = executor_for(model), options.progress
    prompts = [_encode(executor, sample, span) for sample in track(samples, "tokenising", show=show)]
    lengths, names = [len(prompt.tokens) for prompt in prompts], [sample.id for sample in samples]
    require_fitting(names, lengths, executor.shape.n_ctx)
    run = partial(_run, max_new_tokens=options.max_new_tokens)
    by_sample = torch.zeros(len(samples), executor.shape.n_layers, executor.shape.n_heads)
    responses = [""] * len(samples)
    with progress_bar("retrieval scores", len(samples), show=show) as bar:
        for indices, (scores, texts) in map_batches(executor, run, prompts, names, lengths, options.batch_tokens):
            by_sample[indices] = scores
            for i, text in zip(indices, texts, strict=True):
                responses[i] = text
            bar.update(len(indices))
    return by_sample, responses


def retrieval_scores(
    model: FocusModel | Executor,
    samples: Iterable[NeedleSample],
    *,
    span: str | None = None,
    max_new_tokens: int = 50,
    min_recall: float = 0.5,
    batch_tokens: int = BATCH_TOKENS,
    progress: bool | None = None,
) -> RetrievalScores:
    """Compute retrieval scores: the mean share of the needle that each head copies into the response.

    The method is that of Wu et al. (2024). The model generates greedily. At each step, a head copies a token if its
    most attended key, in the row that generates the token, lies in the needle and is the same token. The copy score of
    a head in a run is the number of copied tokens divided by the number of needle tokens. The retrieval score is the
    mean copy score over the runs that count (see ``min_recall``). Only each decode row's most attended key is stored.

    A response ends at a stop token or a stop string of the model. (The code of Wu et al. stops at Llama 2's line-break
    token instead.)

    Args:
        model: The model, or an executor that runs the model in other processes, such as :class:`RayPool`.
        samples: Needle-in-a-haystack prompts of several lengths and depths.
        span: Name of the span that counts as the needle. The default is ``answer`` for prompts with this span, and
            ``needle`` for all other prompts. ``answer`` is the part of the sentence that answers the question, as in
            the code of Wu et al. ``needle`` is the whole sentence, as in the text of their paper.
        max_new_tokens: Maximum length of a response, in tokens.
        min_recall: ROUGE-1 recall, from 0 to 1, that a response must exceed for its run to count.
        batch_tokens: Maximum number of prompt tokens per batch; halved when memory runs out.
        progress: Whether to show a progress bar; :mod:`focuslens.util.progress` describes the default.

    Raises:
        ValueError: If there are no samples, ``min_recall`` is out of range, a prompt does not have the span ``span``,
            or a reference has no word that ROUGE counts.
        NoRunCountsError: If no run counts. The message contains the best recall.
        ImportError: If rouge-score is not installed.
    """
    sample_list = list(samples)
    if not sample_list:
        raise ValueError("there are no samples to score")
    if not 0 <= min_recall < 1:
        raise ValueError(f"min_recall is {min_recall:g}; recall must exceed it, so it must be at least 0 and below 1")
    options = RunOptions(max_new_tokens, batch_tokens, progress)
    by_sample, responses = copy_runs(model, sample_list, options, span=span)
    return RetrievalScores.of_runs(sample_list, by_sample, responses, min_recall)
