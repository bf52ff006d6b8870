"""Split-softmax on the part of a prompt that heads themselves choose, without a label."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, is_dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, cast, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from focuslens.heads import Head, as_heads, check_heads
from focuslens.hooks import Cursor, Hook, HookTarget, Intervention, PromptLike
from focuslens.interventions.base import require_prompt
from focuslens.interventions.choice import Choice
from focuslens.interventions.mixed_split import MixedSplitSoftmax
from focuslens.interventions.split_softmax import SplitSoftmax
from focuslens.interventions.votes import HeadVotes
from focuslens.model.question_rows import QuestionRows, answer_attention, question_attention
from focuslens.prompts.batch import EncodedPrompt, PromptBatch
from focuslens.prompts.prompt import Span
from focuslens.util.checks import checked_positive, checked_share

if TYPE_CHECKING:
    from focuslens.model.focus_model import FocusModel
    from focuslens.model.generation import Prefix

__all__ = ["Choice", "ChoiceRows", "PartKind", "SelfFocus", "parts_of", "with_span"]

ChoiceRows: TypeAlias = QuestionRows | Literal["response"]
"""Rows whose attention chooses: see :data:`focuslens.model.question_rows.QuestionRows`, or those of an answer without
focus."""

PartKind: TypeAlias = Literal["document", "sentence"] | int
"""Parts to choose from: the ranges of the span ``document``, the sentences before the question, or windows of a number
of tokens."""

SINK = 2
"""Number of tokens in the attention sink, which belong to no part."""


@dataclass(frozen=True)
class SelfFocus:
    r"""Split-softmax on the parts of a prompt that heads attend to most, in the rows that produce the response.

    Nothing has to be known about the prompt. The heads' attention from the chosen rows is summed over the heads and
    over the tokens of each part. The parts with the most attention become the span of :class:`SplitSoftmax`. Rows of
    the prompt are read from its own keys and values, which takes one more pass over these rows. Rows of a response are
    those of the answer without focus, or of its beginning.

    With ``soft``, the change is the mean over the chosen parts, weighted by their shares; see
    :class:`MixedSplitSoftmax`. Another edit of a span can take the place of split-softmax.

    If the choice is unsure, the prompt is left alone. With the shares :math:`s_1 \ge s_2 \ge \dots` of the :math:`n`
    parts, the margin is :math:`s_1 - s_2`, and the entropy :math:`-\sum_i s_i \log s_i / \log n`.

    Args:
        by: ``(layer, head)`` pairs of the heads that choose, or :class:`HeadVotes` for weighted ones, which have shares
            of their own.
        tau: Exponent of split-softmax; less than 1 raises the attention. ``None`` if there is an ``edit``.
        focused: Heads whose attention is changed; by default those that choose.
        rows: Rows that choose: ``question``, ``tail`` (from the question to the prompt's end), ``last`` or
            ``response``.
        n_rows: For ``response``, the number of rows; ``None`` for a whole answer.
        parts: ``document``, ``sentence``, or a number of tokens.
        top: Number of parts to choose; ``None`` for all that have attention.
        top_p: Choose the fewest parts whose shares sum to at least this number, in place of ``top``.
        soft: Whether the chosen parts count by their shares.
        edit: Intervention on a span that is applied to the chosen parts in place of split-softmax, such as
            ``LogitBias([], 2.0)``. It acts on its own heads, and its own span does not count.
        null: Question without content, such as ``"N/A"``, whose attention is subtracted; ``None`` for none. It needs a
            prompt with a text and a span ``question``.
        min_margin: Smallest margin with which a choice is sure.
        max_entropy: Largest entropy with which a choice is sure.
        max_sink: Largest mean attention to the first two tokens and to the sinks of heads (gpt-oss) with which a choice
            is sure.
    """

    by: tuple[Head, ...] | HeadVotes
    tau: float | None
    focused: tuple[Head, ...] | None = None
    rows: ChoiceRows = "tail"
    n_rows: int | None = None
    parts: PartKind = "document"
    top: int | None = 1
    top_p: float | None = None
    soft: bool = False
    edit: Intervention | None = None
    null: str | None = None
    min_margin: float = 0.0
    max_entropy: float = 1.0
    max_sink: float = 1.0

    def __init__(
        self,
        by: Iterable[tuple[int, int]] | HeadVotes,
        tau: float | None = None,
        *,
        focused: Iterable[tuple[int, int]] | None = None,
        rows: ChoiceRows = "tail",
        n_rows: int | None = None,
        parts: PartKind = "document",
        top: int | None = 1,
        top_p: float | None = None,
        soft: bool = False,
        edit: Intervention | None = None,
        null: str | None = None,
        min_margin: float = 0.0,
        max_entropy: float = 1.0,
        max_sink: float = 1.0,
    ) -> None:
        values: dict[str, Any] = {
            "by": by if isinstance(by, HeadVotes) else as_heads(by),
            "tau": None if tau is None else SplitSoftmax([], tau).tau,
            "focused": None if focused is None else as_heads(focused),
            "rows": rows,
            "n_rows": n_rows if n_rows is None else checked_positive(n_rows, "n_rows"),
            "parts": parts if isinstance(parts, str) else checked_positive(parts, "parts"),
            "top": top if top is None else checked_positive(top, "top"),
            "top_p": top_p if top_p is None else checked_share(top_p, "top_p"),
            "soft": soft,
            "edit": edit,
            "null": null,
            "min_margin": checked_share(min_margin, "min_margin"),
            "max_entropy": checked_share(max_entropy, "max_entropy"),
            "max_sink": checked_share(max_sink, "max_sink"),
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)
        self._check()

    def _check(self) -> None:
        if not self._choosing:
            raise ValueError("there are no heads to choose by; give at least one, such as scores.top_heads(6)")
        if (self.tau is None) == (self.edit is None):
            raise ValueError("give either tau, for split-softmax on the chosen parts, or another edit of a span")
        if self.edit is not None:
            self._check_edit(self.edit)
        names = (*get_args(QuestionRows), "response")
        if self.rows not in names:
            raise ValueError(f"rows is {self.rows!r}; it must be one of {', '.join(names)}")
        if isinstance(self.parts, str) and self.parts not in ("document", "sentence"):
            raise ValueError(f"parts is {self.parts!r}; it must be 'document', 'sentence' or a number of tokens")
        if isinstance(self.by, HeadVotes) and (self.by.rows != self.rows or self.null is not None):
            raise ValueError(
                f"the votes were fitted on rows {self.by.rows!r} without a null question; rows is {self.rows!r} and "
                f"null is {self.null!r}, which must be the same"
            )
        if self.rows == "response" and self.null is not None:
            raise ValueError("null calibrates rows of the question; it must be None for rows='response'")
        if self.rows != "response" and self.n_rows is not None:
            raise ValueError("n_rows is a number of response rows; it needs rows='response'")

    def _check_edit(self, edit: Intervention) -> None:
        if not is_dataclass(edit) or not hasattr(edit, "span"):
            raise TypeError(
                f"edit is a {type(edit).__name__}; it must be an intervention on a span, such as LogitBias(heads, 2.0)"
            )
        if edit.changes_prompt:
            raise ValueError(
                "edit changes rows of the prompt, which are run before the choice; use positions='response'"
            )
        if self.soft or self.focused is not None:
            raise ValueError("soft and focused are settings of split-softmax; an edit has its own heads")

    @property
    def _choosing(self) -> tuple[Head, ...]:
        """Heads that choose."""
        return self.by.heads if isinstance(self.by, HeadVotes) else self.by

    @property
    def heads(self) -> tuple[Head, ...] | None:
        """Heads whose attention is changed; ``None`` if an edit changes all."""
        return self._focused if self.edit is None else self.edit.heads

    @property
    def _focused(self) -> tuple[Head, ...]:
        return self._choosing if self.focused is None else self.focused

    @property
    def changes_prompt(self) -> bool:
        """Always ``False``, because only the rows that produce the response change."""
        return False

    def describe(self) -> dict[str, Any]:
        """Kind and settings of the intervention as JSON values."""
        by = self.by.describe() if isinstance(self.by, HeadVotes) else [list(head) for head in self.by]
        return {
            "kind": "self_focus",
            "by": by,
            "tau": self.tau,
            "rows": self.rows,
            "n_rows": self.n_rows,
            "parts": self.parts,
            "top": self.top,
            "top_p": self.top_p,
            "soft": self.soft,
            "edit": None if self.edit is None else self.edit.describe(),
            "null": self.null,
            "min_margin": self.min_margin,
            "max_entropy": self.max_entropy,
            "max_sink": self.max_sink,
            "heads": None if self.heads is None else [list(head) for head in self.heads],
        }

    def hooks(self, model: HookTarget, prompt: PromptLike | None = None, *, cursor: Cursor | None = None) -> list[Hook]:
        """TransformerLens hooks for one prompt, or for a batch padded on the left.

        The prompts are run first, to choose. :meth:`FocusModel.generate`, sweeps and evaluations choose from the run
        that they generate from.

        Raises:
            ValueError: If the prompt is missing, if a head does not exist, if the prompt has no parts, or as for
                :meth:`SplitSoftmax.hooks`.
            TypeError: If ``model`` is not a :class:`FocusModel`.
        """
        if not hasattr(model, "prefill"):
            raise TypeError(
                f"self-focus runs the model to choose, so it needs a FocusModel, not a {type(model).__name__}"
            )
        runner = cast("FocusModel", model)
        prefix = runner.prefill(require_prompt(model, prompt, "self-focus"), hold_last=True)
        batch, focus = self.resolve(runner, prefix)
        return focus.hooks(model, batch, cursor=cursor)

    def resolve(self, model: FocusModel, prefix: Prefix, max_new_tokens: int = 100) -> tuple[PromptBatch, Intervention]:
        """Choose parts of each prompt of a prefix.

        Args:
            model: The model.
            prefix: Prefix of the prompts.
            max_new_tokens: Maximum length of a whole answer, if the rows of a response choose.

        Returns:
            The prompts with the chosen parts as a further span, and the intervention on this span. The span is empty in
            a prompt that is left alone.
        """
        choices = self.choose(model, prefix, max_new_tokens)
        chosen = [[choice.parts[i] for i in choice.chosen] for choice in choices]
        batch, name = with_span(prefix.batch, self.describe(), chosen)
        return batch, self._edit_of(name, choices)

    def _edit_of(self, span: str, choices: Sequence[Choice]) -> Intervention:
        """The intervention on the chosen parts, which are a span."""
        if self.edit is not None:
            return replace(cast("Any", self.edit), span=span)
        assert self.tau is not None
        if self.soft:
            return MixedSplitSoftmax(self._focused, self.tau, [choice.weighted for choice in choices])
        return SplitSoftmax(self._focused, self.tau, span)

    def choose(self, model: FocusModel, prefix: Prefix, max_new_tokens: int = 100) -> list[Choice]:
        """The choice for each prompt of a prefix. The arguments are those of :meth:`resolve`.

        Raises:
            ValueError: If a head does not exist, a prompt has no parts, or a null question cannot be put into a prompt.
            KeyError: If the rows or parts need a span that a prompt does not have.
        """
        if prefix.measured is None:
            return [self._choice(*measured) for measured in self._measured(model, prefix, max_new_tokens)]
        # Settings of a sweep that differ only in what they do with the choice share one measurement.
        described = self.describe()
        measure = [described[name] for name in ("by", "rows", "n_rows", "parts", "null")]
        key = json.dumps(["self_focus", max_new_tokens, *measure])
        if key not in prefix.measured:
            prefix.measured[key] = self._measured(model, prefix, max_new_tokens)
        return [self._choice(*measured) for measured in prefix.measured[key]]

    def _measured(
        self, model: FocusModel, prefix: Prefix, max_new_tokens: int
    ) -> list[tuple[Float[Tensor, "part"], list[Span], float]]:
        """Share of each part, the parts, and the attention to the sink, for each prompt."""
        heads = check_heads(self._choosing, model.shape.n_layers, model.shape.n_heads)
        parts = [parts_of(model, prompt, self.parts) for prompt in prefix.batch.prompts]
        if self.null is not None:
            _require_question_last(prefix.batch.prompts, parts)
        if self.rows == "response":
            plain, lacking = answer_attention(model, prefix, heads, self.n_rows or max_new_tokens)
            attention = plain
        else:
            nulls = (
                None if self.null is None else [model.encoder.with_question(p, self.null) for p in prefix.batch.prompts]
            )
            read = question_attention(model, prefix, heads, self.rows, nulls)
            plain = read.attention
            attention, lacking = plain if read.null is None else plain - read.null, 1 - plain.sum(dim=-1)
        # The null question changes what documents get, not what the sink takes.
        with_sinks = model.sink_layers
        lacking = lacking * torch.tensor([head.layer in with_sinks for head in heads])
        sinks = [
            float((plain[i, :, n : n + SINK].sum(dim=-1) + lacking[i]).mean())
            for i, n in enumerate(prefix.batch.padding)
        ]
        return [
            (self._shares(attention[i, :, padding:], parts[i]), parts[i], sinks[i])
            for i, padding in enumerate(prefix.batch.padding)
        ]

    def _shares(self, attention: Float[Tensor, "head pos"], parts: Sequence[Span]) -> Float[Tensor, "part"]:
        """Share of each part, from the attention of the heads that choose."""
        by_head = torch.stack([attention[:, start:end].double().sum(dim=1) for start, end in parts], dim=1)
        if isinstance(self.by, HeadVotes):
            return self.by.shares(by_head)
        sums = by_head.mean(dim=0).clamp(min=0)
        return (sums / sums.sum()).nan_to_num(0.0)

    def _choice(self, shares: Float[Tensor, "part"], parts: Sequence[Span], sink: float) -> Choice:
        order = sorted(range(len(parts)), key=lambda i: (-float(shares[i]), i))
        chosen = [i for i in order if float(shares[i]) > 0][: self.top]
        if self.top_p is not None:
            within = shares[order].cumsum(dim=0) < self.top_p - 1e-12
            chosen = order[: int(within.sum()) + 1]
        if not self._is_sure(shares[order], sink):
            chosen = []
        return Choice(tuple(parts), tuple(shares.tolist()), tuple(chosen), sink)

    def _is_sure(self, shares: Float[Tensor, "part"], sink: float) -> bool:
        """Whether the gate lets a choice pass, from the shares in descending order."""
        if not float(shares[0]) > 0:
            return False
        margin = float(shares[0] - shares[1]) if len(shares) > 1 else 1.0
        entropy = float(torch.special.entr(shares).sum()) / math.log(len(shares)) if len(shares) > 1 else 0.0
        return margin >= self.min_margin and entropy <= self.max_entropy + 1e-9 and sink <= self.max_sink + 1e-6


def _require_question_last(prompts: Sequence[EncodedPrompt], parts: Sequence[Sequence[Span]]) -> None:
    """Raise ``ValueError`` if a part follows the question, whose tokens then differ with a null question."""
    for prompt, spans in zip(prompts, parts, strict=True):
        question = prompt.spans.get("question")
        if question and question[0][0] < max(end for _, end in spans):
            raise ValueError(
                "a prompt asks its question before a part to choose from, whose attention another "
                "question changes too; pass null=None"
            )


def with_span(
    batch: PromptBatch, description: Mapping[str, Any], ranges: Sequence[Sequence[Span]]
) -> tuple[PromptBatch, str]:
    """The prompts with a further span for the choice of an intervention, and the span's name.

    Args:
        batch: The prompts.
        description: Description of the intervention, which makes the name unique.
        ranges: Token ranges of the span in each prompt.
    """
    digest = hashlib.sha256(json.dumps(description).encode()).hexdigest()
    name = f"{description['kind']} {digest[:16]}"
    prompts = [
        replace(prompt, spans={**prompt.spans, name: tuple(sorted(spans))})
        for prompt, spans in zip(batch.prompts, ranges, strict=True)
    ]
    return PromptBatch(tuple(prompts), batch.rows), name


def parts_of(model: FocusModel, prompt: EncodedPrompt, kind: PartKind) -> list[Span]:
    """Token ranges of the parts of a prompt, which all lie before its question.

    Raises:
        KeyError: If the parts are documents, and the prompt has no span ``document``.
        ValueError: If there are none.
    """
    end = prompt.spans["question"][0][0] if prompt.spans.get("question") else len(prompt.tokens) - 1
    if kind == "document":
        parts = list(prompt.resolve("document"))
    elif kind == "sentence":
        parts = [(max(start, SINK), stop) for start, stop in model.encoder.sentences(prompt) if stop <= end]
    else:
        parts = [(start, min(start + kind, end)) for start in range(SINK, end, kind)]
    parts = [(start, stop) for start, stop in parts if start < stop]
    if not parts:
        raise ValueError(f"a prompt of {len(prompt.tokens)} tokens has no part of the kind {kind!r} to choose from")
    return parts
