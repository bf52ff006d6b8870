"""Retrieval heads: those that copy the needle out of the haystack, token by token.

After "Retrieval Head Mechanistically Explains Long-Context Factuality" (Wu et al., 2024, arXiv 2404.15574). Contextual
scores ask how much a response's tokens attend to what is relevant; copy scores ask how often the key a head attends to
most, in the row that *produces* a token, is that very token in the needle.
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
from focuslens.hooks import Hook, hook_name
from focuslens.model.batching import BATCH_TOKENS, RunOptions, map_batches
from focuslens.model.execution import Executor, executor_for
from focuslens.prompts.batch import EncodedPrompt
from focuslens.scores.rouge import rouge_1_recall
from focuslens.util.progress import progress_bar, track

if TYPE_CHECKING:
    import pandas as pd

    from focuslens.model.backends import ModelShape
    from focuslens.model.focus_model import FocusModel

__all__ = ["NoRunCountsError", "RetrievalScores", "copy_runs", "copy_scores", "retrieval_scores"]

_NO_TOKEN = -1
_COPIED = "copied"


class NoRunCountsError(ValueError):
    """No response finds its needle, so nothing is known of who copies it."""


@dataclass(frozen=True, eq=False)
class RetrievalScores:
    """Copy scores of every head in every run.

    A run is one prompt with its response. Runs whose response does not find the needle say nothing about who copied
    it, so only those count whose ROUGE-1 recall exceeds ``min_recall``.

    Attributes:
        by_sample: Copy score of each head in each run, also of those that do not count (see :func:`copy_scores`).
        recall: ROUGE-1 recall of each response against its reference, 0 to 1.
        min_recall: What it must exceed for the run to count.
        responses: What the model said.
        sample_ids: ``NeedleSample.id`` of each.

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
            f"min_recall={self.min_recall:g}. Take a model that finds the needle, shorter prompts or more new tokens, "
            "or lower min_recall"
        )

    @classmethod
    def of_runs(
        cls,
        samples: Sequence[NeedleSample],
        by_sample: Float[Tensor, "sample layer head"],
        responses: Sequence[str],
        min_recall: float = 0.5,
    ) -> RetrievalScores:
        """Scores of runs that are done (see :func:`copy_runs`), with the recall of their responses."""
        recall = [rouge_1_recall(text, one.reference) for text, one in zip(responses, samples, strict=True)]
        ids = tuple(sample.id for sample in samples)
        return cls(by_sample, tuple(recall), min_recall, tuple(responses), ids)

    def __len__(self) -> int:
        return len(self.sample_ids)

    @property
    def counted(self) -> tuple[bool, ...]:
        """Which runs count."""
        return tuple(recall > self.min_recall for recall in self.recall)

    @property
    def scores(self) -> Float[Tensor, "layer head"]:
        """The retrieval score of each head: its copy score, averaged over the runs that count."""
        return self.by_sample[torch.tensor(self.counted)].mean(dim=0)

    def ranking(self) -> list[Head]:
        """All heads, highest retrieval score first."""
        return rank_heads(self.scores)

    def top_heads(self, k: int) -> list[Head]:
        """The ``k`` heads with the highest retrieval score, best first: the retrieval heads.

        Raises:
            ValueError: If the model does not have ``k`` heads.
        """
        return top_heads(self.scores, k)

    def to_frame(self) -> pd.DataFrame:
        """Retrieval scores as a table, one row a head (``layer``, ``head``, ``score``), highest first."""
        import pandas as pd

        scores = self.scores
        rows = [{"layer": one.layer, "head": one.head, "score": float(scores[one])} for one in self.ranking()]
        return pd.DataFrame(rows)


def copy_scores(
    attended: Int[Tensor, "batch layer head step"],
    keys: Int[Tensor, "batch key"],
    needle: Bool[Tensor, "batch key"],
    generated: Int[Tensor, "batch step"],
) -> Float[Tensor, "batch layer head"]:
    """Copy scores: at how many steps a head copies a token, divided by the number of the needle's tokens.

    A head copies at a step if the key that it attends to most lies in the needle and holds the token that the step
    generates. A score above 1 takes a response that repeats the needle.

    Args:
        attended: The key that each head attends to most in the row that generates the step's token.
        keys: Token ids of the keys.
        needle: Which keys belong to the needle; at least one in each prompt.
        generated: Token ids of the response, -1 behind its end.
    """
    prompt = torch.arange(len(keys))[:, None, None, None]
    same = keys[prompt, attended] == rearrange(generated, "batch step -> batch 1 1 step")
    copied = reduce((needle[prompt, attended] & same).float(), "batch layer head step -> batch layer head", "sum")
    return copied / rearrange(reduce(needle.float(), "batch key -> batch", "sum"), "batch -> batch 1 1")


class _MostAttended:
    """Gathers, through hooks on ``hook_pattern``, the key that every head attends to most at each decode step."""

    def __init__(self, shape: ModelShape, n_prompts: int) -> None:
        self._steps: list[list[Tensor]] = [[] for _ in range(shape.n_layers)]
        self._empty = torch.zeros(n_prompts, shape.n_layers, shape.n_heads, 0, dtype=torch.long)

    def hooks(self) -> list[Hook]:
        """Observers for passes of one row a prompt, the row of its last token first."""
        return [(hook_name(layer, "hook_pattern"), self._observer(steps)) for layer, steps in enumerate(self._steps)]

    def _observer(self, steps: list[Tensor]) -> Any:
        def observe(pattern: Float[Tensor, "batch head 1 key"], hook: Any) -> None:
            steps.append(pattern[:, :, 0].argmax(dim=-1))

        return observe

    def columns(self) -> Int[Tensor, "batch layer head step"]:
        """The columns of those keys: token position plus left padding."""
        if not self._steps[0]:
            return self._empty
        device = self._steps[0][0].device  # layers may be on several
        return torch.stack([torch.stack(steps, dim=-1).to(device) for steps in self._steps], dim=1).cpu()


def _encode(executor: Executor, sample: NeedleSample, span: str | None) -> EncodedPrompt:
    """The sample's prompt, with the part that is to be copied as its only part."""
    encoded = executor.encode(sample.prompt)
    name = span or ("answer" if encoded.spans.get("answer") else "needle")
    if not encoded.spans.get(name):
        raise ValueError(
            f"the prompt of sample {sample.id!r} has no part {name!r}; it has {', '.join(sorted(encoded.spans))}. "
            "span must name one of these, or be None"
        )
    return EncodedPrompt(encoded.tokens, {_COPIED: encoded.spans[name]}, encoded.text)


@torch.no_grad()
def _run(
    model: FocusModel, prompts: Sequence[EncodedPrompt], budget: int, max_new_tokens: int
) -> tuple[Float[Tensor, "batch layer head"], list[str]]:
    """Copy scores of one batch, and the responses."""
    # Held back, a prompt's last token is run under the observers: its row generates the first token.
    prefix = model.prefill(prompts, hold_last=True)
    most = _MostAttended(model.shape, len(prompts))
    made = model.decode(prefix, max_new_tokens=max_new_tokens, observers=most.hooks())
    attended, batch = most.columns(), prefix.batch
    n_steps = attended.shape[-1]
    n_keys = batch.width + n_steps
    # Keys of the response itself are no token of the prompt, and rows behind its end generate none.
    keys = torch.full((len(batch), n_keys), _NO_TOKEN)
    keys[:, : batch.width] = batch.tokens(model.pad_token)
    generated = torch.full((len(batch), n_steps), _NO_TOKEN)
    for row, response in zip(generated, made, strict=True):
        row[: len(response.tokens)] = response.tokens
    return copy_scores(attended, keys, batch.columns(_COPIED, n_keys), generated), [one.text for one in made]


def copy_runs(
    model: FocusModel | Executor, samples: Sequence[NeedleSample], options: RunOptions, *, span: str | None = None
) -> tuple[Float[Tensor, "sample layer head"], list[str]]:
    """Copy scores of every head in every run, and the responses, whether or not they find the needle.

    ``span`` and errors are those of :func:`retrieval_scores`.
    """
    for sample in samples:
        rouge_1_recall("", sample.reference)  # a bad reference is reported before hours of running, not after
    executor, show = executor_for(model), options.progress
    prompts = [_encode(executor, sample, span) for sample in track(samples, "tokenising", show=show)]
    lengths, names = [len(prompt.tokens) for prompt in prompts], [sample.id for sample in samples]
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
    """How much of the needle each head copies into the response (Wu et al., 2024).

    The model generates greedily. At each step, a head copies if the key that it attends to most, in the row that
    generates the token, is a key of the needle that holds this very token; each such step counts one over the needle's
    tokens. Only the rows of decode steps are looked at, and of them only the largest key: no pattern is kept.

    Responses end with the model's stop tokens. (The released code goes on behind them, and stops at the newline token
    of Llama 2.)

    Args:
        model: The model, or an executor such as :class:`RayPool` that runs it elsewhere.
        samples: Needle-in-a-haystack prompts, of several lengths and depths.
        span: Which part of the prompts is to be copied. By default ``answer`` where a prompt has it (the part of the
            needle that answers, which the released code takes for the needle), else ``needle``. ``"needle"`` always
            takes the whole sentence, as the text of Wu et al. has it.
        max_new_tokens: Of a response.
        min_recall: ROUGE-1 recall, from 0 to 1, that a response must exceed for its run to count.
        batch_tokens: Prompt tokens that are run together, in batches of similar length; halved when memory runs out.
        progress: Show a progress bar; by default where someone may watch, see :mod:`focuslens.util.progress`.

    Raises:
        ValueError: If there are no samples, ``min_recall`` is out of range, a prompt does not have the part or a
            reference no word to recall, or no run counts: the message says the best recall.
        ImportError: If rouge-score is not installed.
    """
    chosen = list(samples)
    if not chosen:
        raise ValueError("there are no samples to score")
    if not 0 <= min_recall < 1:
        raise ValueError(f"min_recall is {min_recall:g}; recall must exceed it, so it is from 0 to below 1")
    options = RunOptions(max_new_tokens, batch_tokens, progress)
    by_sample, responses = copy_runs(model, chosen, options, span=span)
    return RetrievalScores.of_runs(chosen, by_sample, responses, min_recall)
