"""Chance level: the scores that even attention would give, and the excess of scores over them.

A row with even attention gives every token that it sees the same weight. Its attention to a part of the prompt is the
number of visible tokens of the part, divided by the number of all visible tokens. A response row sees the whole prompt,
the response tokens before it and its own token, so this share falls slowly along the response. In a layer with a
sliding window, a row sees the last tokens only; in a layer with chunks, those of its own chunk.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar, cast, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from focuslens.model.execution import Executor, executor_for
from focuslens.prompts.answers import list_samples
from focuslens.prompts.batch import EncodedPrompt, PromptBatch
from focuslens.prompts.sample import Case, MultiDocSample
from focuslens.prompts.spans import require_spans
from focuslens.scores.base import KINDS, SCORED_SPANS, Parts, each_document, scores_of_parts, sink_and_documents
from focuslens.util.frames import DIFFERENCE, SHARE

if TYPE_CHECKING:
    from focuslens.model.focus_model import FocusModel

__all__ = [
    "ABOVE_UNITS",
    "AboveChance",
    "DocumentsAboveChance",
    "Measure",
    "chance_of_documents",
    "chance_of_scores",
    "check_measure",
    "even_attention",
    "even_masses",
    "matching_samples",
    "measured",
    "response_windows",
]

Measure: TypeAlias = Literal["score", "chance", "excess", "document_chance", "document_excess"]
"""Measure of a head by its score.

* ``score``: The score itself, as in the paper.
* ``chance``: The score of a head with even attention.
* ``excess``: The score minus ``chance``.
* ``document_chance``: The score if the head spread its own attention to the documents evenly over their tokens.
* ``document_excess``: The score minus ``document_chance``. Attention to the sink or the template does not change it.
"""

_ABOVE: tuple[Measure, ...] = ("chance", "excess", "document_excess")
"""Measures that tables show beside the scores."""

ABOVE_UNITS = {"chance": SHARE, "excess": DIFFERENCE, "document_excess": DIFFERENCE}
"""Units of these measures."""

_Scores = TypeVar("_Scores", bound="AboveChance")
_Documents = TypeVar("_Documents", bound="DocumentsAboveChance")


def even_masses(
    parts: Float[Tensor, "key part"],
    rows: Int[Tensor, "row"],
    windows: Sequence[int | None],
    chunks: Sequence[int | None] | None = None,
) -> Float[Tensor, "layer part"]:
    """Mean attention to each part from rows with even attention, per layer.

    Args:
        parts: Key masks: 1 for keys in the part, and 0 for all other keys. Later keys belong to no part.
        rows: Token position of each row. A row sees the keys up to its own position.
        windows: Maximum number of keys that a row of each layer sees, its own key included; ``None`` for no limit.
        chunks: Length of the chunks outside of which a row of each layer sees nothing (Llama 4); ``None`` for none.
    """
    sums = torch.nn.functional.pad(parts.double().cumsum(dim=0), (0, 0, 1, 0))  # sums over the first n keys
    ends = rows + 1

    def mean(window: int | None, chunk: int | None) -> Float[Tensor, "part"]:
        starts = torch.zeros_like(ends) if window is None else (ends - window).clamp(min=0)
        starts = starts if chunk is None else torch.maximum(starts, rows // chunk * chunk)
        inside = sums[ends.clamp(max=len(parts))] - sums[starts.clamp(max=len(parts))]
        return (inside / (ends - starts)[:, None]).mean(dim=0)

    limits = list(zip(windows, [None] * len(windows) if chunks is None else chunks, strict=True))
    means = {limit: mean(*limit) for limit in set(limits)}
    return torch.stack([means[limit] for limit in limits]).float()


def response_windows(model: FocusModel) -> tuple[int | None, ...]:
    """Maximum number of keys that a response row sees, by layer; ``None`` for no limit."""
    backend = model.backend
    windows = [backend.window(layer) for layer in range(model.shape.n_layers)]
    forgetting = getattr(backend.new_cache(1, 1), "forgetting", None)
    if forgetting is None:
        return tuple(windows)
    return tuple(forgetting.window(layer, window, 1) for layer, window in enumerate(windows))


def _visible(
    model: FocusModel, prompts: Sequence[EncodedPrompt], responses: Sequence[str]
) -> tuple[tuple[int | None, ...], tuple[int | None, ...], list[int]]:
    """Window and chunk of each layer, and number of rows of each response."""
    rows = [
        len(model.encoder.encode_response(prompt, response)) if response.strip() else 0
        for prompt, response in zip(prompts, responses, strict=True)
    ]
    return response_windows(model), tuple(kind.chunk for kind in model.head_kinds), rows


def even_attention(
    executor: Executor, prompts: Sequence[EncodedPrompt], responses: Sequence[str], parts: Parts
) -> list[Float[Tensor, "layer part"]]:
    """Mean attention that even rows of each response give to the parts of its prompt.

    The number of rows is that of the response's text, tokenised after the prompt. It is the number of generated tokens
    unless the model generated other tokens for this text. In a prompt of ``n`` tokens, one row more or less changes a
    share by less than an ``n``-th of it. An empty response counts as one row.
    """
    ((windows, chunks, lengths),) = executor.map(_visible, [(list(prompts), list(responses))])
    masses: list[Tensor] = []
    for prompt, length in zip(prompts, lengths, strict=True):
        n = len(prompt.tokens)
        rows = torch.arange(n, n + max(1, length))
        masses.append(even_masses(parts(PromptBatch.of([prompt]))[0], rows, windows, chunks))
    return masses


def chance_of_scores(
    executor: Executor, samples: Sequence[MultiDocSample], case: Case, responses: Sequence[str]
) -> Float[Tensor, "sample layer kind"]:
    """Contextual scores of even attention, with the kinds in the order of :data:`KINDS`."""
    prompts = [executor.encode(sample.prompt(case)) for sample in samples]
    require_spans(samples, prompts, SCORED_SPANS, case)
    chance = torch.zeros(len(prompts), executor.shape.n_layers, len(KINDS))
    for i, masses in enumerate(even_attention(executor, prompts, responses, sink_and_documents)):
        kinds = scores_of_parts(masses[None, :, None])
        chance[i] = torch.stack([kinds[kind][0, :, 0] for kind in KINDS], dim=-1)
    return chance


def chance_of_documents(
    executor: Executor, samples: Sequence[MultiDocSample], responses: Sequence[str]
) -> tuple[Float[Tensor, "layer _"], ...]:
    """Scores that even attention would give to each document of the long prompts."""
    prompts = [executor.encode(sample.prompt()) for sample in samples]
    require_spans(samples, prompts, ("document",))
    return tuple(even_attention(executor, prompts, responses, each_document))


def check_measure(by: str) -> None:
    """Raise ``ValueError`` unless ``by`` is one of :data:`Measure`."""
    if by not in get_args(Measure):
        raise ValueError(f"by is {by!r}; it must be one of {', '.join(get_args(Measure))}")


def measured(scores: Tensor, chance: Tensor, in_documents: Tensor, chance_in_documents: Tensor, by: Measure) -> Tensor:
    """A measure of scores. The tensors have shapes that can be broadcast.

    Args:
        scores: Scores of a part of the prompt. NaN marks a missing score, whose measures are NaN.
        chance: Scores of this part under even attention.
        in_documents: Attention to all documents together.
        chance_in_documents: The same under even attention.
        by: The measure.
    """
    if by == "score":
        return scores
    if by in ("document_chance", "document_excess"):
        # A window can leave all documents out of sight. Attention to them is then zero, and so is its even part.
        chance = in_documents * torch.where(chance_in_documents > 0, chance / chance_in_documents, 0.0)
    even = torch.where(scores.isnan(), scores, chance)
    return scores - even if by in ("excess", "document_excess") else even


def matching_samples(samples: Iterable[MultiDocSample], sample_ids: Sequence[str]) -> list[MultiDocSample]:
    """The samples in the order of ``sample_ids``.

    Raises:
        ValueError: If there is no sample for an id.
    """
    given = list_samples(samples)
    if [sample.id for sample in given] == list(sample_ids):
        return given
    by_id = {sample.id: sample for sample in given}
    missing = [name for name in sample_ids if name not in by_id]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(sample_ids)} scored samples are not in samples, such as {missing[0]!r}; give the "
            "samples that were scored"
        )
    return [by_id[name] for name in sample_ids]


def _unknown(by: Measure) -> ValueError:
    return ValueError(
        f"the measure {by!r} needs the chance level, which these scores do not know; call "
        "scores.with_chance(model, samples)"
    )


class AboveChance:
    """Base of contextual scores: the score of even attention, and the excess over it."""

    relevant: Float[Tensor, "sample layer head"]
    irrelevant: Float[Tensor, "sample layer head"]
    case: Any
    sample_ids: tuple[str, ...]
    responses: tuple[str, ...]
    chance: Float[Tensor, "sample layer kind"] | None

    def measured(self, kind: str = "relevant", by: Measure = "score") -> Float[Tensor, "sample layer head"]:
        """Measure of each head on each sample, such as the excess of its score over that of even attention.

        Args:
            kind: Kind of score: ``relevant``, ``irrelevant``, ``irrelevant_max`` or ``sink``.
            by: The measure: ``score``; ``chance``, the score of even attention; ``excess``, the score minus ``chance``;
                ``document_chance``, the score if the head spread its own attention to the documents evenly over their
                tokens; or ``document_excess``, the score minus ``document_chance``.

        Raises:
            ValueError: If ``kind`` or ``by`` is unknown, if the measure is of documents and the kind is ``sink``, or if
                the chance level is unknown.
        """
        if kind not in KINDS:
            raise ValueError(f"kind is {kind!r}; it must be one of {', '.join(KINDS)}")
        check_measure(by)
        scores: Tensor = getattr(self, kind)
        if by == "score":
            return scores
        if self.chance is None:
            raise _unknown(by)
        if kind == "sink" and by in ("document_chance", "document_excess"):
            raise ValueError(f"the measure {by!r} is of documents, and the sink is none; use 'excess'")
        chance = {name: self.chance[..., i, None] for i, name in enumerate(KINDS)}
        # Without a gold document, all documents are irrelevant ones, and the relevant score is NaN.
        in_documents = self.relevant.nan_to_num(0.0) + self.irrelevant
        return measured(scores, chance[kind], in_documents, chance["relevant"] + chance["irrelevant"], by)

    def excess(self, kind: str = "relevant") -> Float[Tensor, "sample layer head"]:
        """Score of each head on each sample, minus the score of even attention. Scores below chance are negative.

        Raises:
            ValueError: If ``kind`` is unknown, or the chance level is unknown.
        """
        return self.measured(kind, "excess")

    def with_chance(self: _Scores, model: FocusModel | Executor, samples: Iterable[MultiDocSample]) -> _Scores:
        """The scores with their chance level, which needs the tokens of the prompts but no run of the model.

        Args:
            model: The model, or an executor, that was scored.
            samples: The samples that were scored, in any order.

        Raises:
            ValueError: If a scored sample is not in ``samples``.
        """
        case: Case = "long" if self.case in ("correct", "wrong") else self.case
        chosen = matching_samples(samples, self.sample_ids) if self.sample_ids else []
        chance = chance_of_scores(executor_for(model), chosen, case, self.responses)
        return cast("_Scores", replace(cast("Any", self), chance=chance))

    def even_share(self) -> dict[str, float] | None:
        """Mean share that even attention would give to the relevant document; ``None`` if it is unknown.

        The entry ``row`` is the share of all tokens that a row sees, averaged over samples and layers, and the entry
        ``documents`` is the share of the documents' tokens. Samples without a relevant score are left out.
        """
        known = ~self.relevant.flatten(1).isnan().any(dim=1)
        if self.chance is None or not bool(known.any()):
            return None
        relevant, irrelevant = (self.chance[known, :, KINDS.index(kind)] for kind in ("relevant", "irrelevant"))
        shares = relevant / (relevant + irrelevant)
        return {"row": float(relevant.mean()), "documents": float(shares.nanmean().nan_to_num(0.0))}

    def means_above_chance(self) -> dict[str, Float[Tensor, "layer head"]]:
        """Mean chance level and excess of the relevant score per head, by measure; empty if the level is unknown."""
        if self.chance is None:
            return {}
        return {by: self.measured("relevant", by).nanmean(dim=0) for by in _ABOVE}


class DocumentsAboveChance:
    """Base of scores of documents: the score of even attention, and the excess over it."""

    scores: tuple[Float[Tensor, "layer head _"], ...]
    sample_ids: tuple[str, ...]
    responses: tuple[str, ...]
    chance: tuple[Float[Tensor, "layer _"], ...]

    def measured(self, by: Measure = "score") -> list[Float[Tensor, "layer head _"]]:
        """Measure of each head and document, such as the excess of the score over that of even attention.

        Args:
            by: The measure: ``score``; ``chance``, the score of even attention; ``excess``, the score minus ``chance``;
                ``document_chance``, the score if the head spread its own attention to the documents evenly over their
                tokens; or ``document_excess``, the score minus ``document_chance``.

        Raises:
            ValueError: If ``by`` is unknown, or the chance level is unknown.
        """
        check_measure(by)
        if by == "score":
            return list(self.scores)
        if len(self.chance) != len(self.scores):
            raise _unknown(by)
        values: list[Tensor] = []
        for scores, by_layer in zip(self.scores, self.chance, strict=True):
            chance = by_layer[:, None]
            in_documents, even = (given.sum(dim=-1, keepdim=True) for given in (scores, chance))
            values.append(measured(scores, chance, in_documents, even, by))
        return values

    def excess(self) -> list[Float[Tensor, "layer head _"]]:
        """Score of each head and document, minus the score of even attention. Scores below chance are negative.

        Raises:
            ValueError: If the chance level is unknown.
        """
        return self.measured("excess")

    def _above_chance(self) -> dict[str, list[Float[Tensor, "layer head _"]]]:
        """Chance level and excess of the scores, by measure; empty if the level is unknown."""
        known = len(self.chance) == len(self.scores)
        return {by: self.measured(by) for by in _ABOVE} if known else {}

    def with_chance(self: _Documents, model: FocusModel | Executor, samples: Iterable[MultiDocSample]) -> _Documents:
        """The scores with their chance level, which needs the tokens of the prompts but no run of the model.

        Args:
            model: The model, or an executor, that was scored.
            samples: The samples that were scored, in any order.

        Raises:
            ValueError: If a scored sample is not in ``samples``.
        """
        chosen = matching_samples(samples, self.sample_ids) if self.sample_ids else []
        chance = chance_of_documents(executor_for(model), chosen, self.responses)
        return cast("_Documents", replace(cast("Any", self), chance=chance))
