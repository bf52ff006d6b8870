"""Split-softmax on the part of a prompt that heads themselves choose, without a label."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, cast, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from focuslens.heads import Head, as_heads, check_heads
from focuslens.hooks import Cursor, Hook, HookTarget, PromptLike
from focuslens.interventions.base import require_prompt
from focuslens.interventions.split_softmax import SplitSoftmax
from focuslens.model.question_rows import QuestionRows, answer_attention, question_attention
from focuslens.prompts.batch import EncodedPrompt, PromptBatch
from focuslens.prompts.prompt import Span
from focuslens.util.checks import checked_integer, checked_number

if TYPE_CHECKING:
    from focuslens.model.focus_model import FocusModel
    from focuslens.model.generation import Prefix

__all__ = ["Choice", "ChoiceRows", "PartKind", "SelfFocus"]

ChoiceRows: TypeAlias = QuestionRows | Literal["response"]
"""Rows whose attention chooses: see :data:`focuslens.model.question_rows.QuestionRows`, or those of an answer without
focus."""

PartKind: TypeAlias = Literal["document", "sentence"] | int
"""Parts to choose from: the ranges of the span ``document``, the sentences before the question, or windows of a number
of tokens."""

SINK = 2
"""Number of tokens in the attention sink, which belong to no part."""


@dataclass(frozen=True)
class Choice:
    """Parts of one prompt that heads chose.

    Attributes:
        parts: Token ranges of all parts.
        shares: Share of the attention to the parts, per part. Negative attention, after calibration, counts as none.
        chosen: Indices of the chosen parts, the most attended first; empty if the gate left the prompt alone.
        sink: Mean attention to the first two tokens.
    """

    parts: tuple[Span, ...]
    shares: tuple[float, ...]
    chosen: tuple[int, ...]
    sink: float


@dataclass(frozen=True)
class SelfFocus:
    r"""Split-softmax on the parts of a prompt that heads attend to most, in the rows that produce the response.

    Nothing has to be known about the prompt. The heads' attention from the chosen rows is summed over the heads and
    over the tokens of each part. The parts with the most attention become the span of :class:`SplitSoftmax`. Rows of
    the prompt are read from its own keys and values, which takes one more pass over these rows. Rows of a response are
    those of the answer without focus, or of its beginning.

    If the choice is unsure, the prompt is left alone. With the shares :math:`s_1 \ge s_2 \ge \dots` of the :math:`n`
    parts, the margin is :math:`s_1 - s_2`, and the entropy :math:`-\sum_i s_i \log s_i / \log n`.

    Args:
        heads: ``(layer, head)`` pairs of the heads that choose.
        tau: Exponent of split-softmax; less than 1 raises the attention.
        focused: Heads whose attention is changed; by default those that choose.
        rows: Rows that choose: ``question``, ``tail`` (from the question to the prompt's end), ``last`` or
            ``response``.
        n_rows: For ``response``, the number of rows; ``None`` for a whole answer.
        parts: ``document``, ``sentence``, or a number of tokens.
        top: Number of parts to choose.
        top_p: Choose the fewest parts whose shares sum to at least this number, in place of ``top``.
        null: Question without content, such as ``"N/A"``, whose attention is subtracted; ``None`` for none. It needs a
            prompt with a text and a span ``question``.
        min_margin: Smallest margin with which a choice is sure.
        max_entropy: Largest entropy with which a choice is sure.
        max_sink: Largest mean attention to the first two tokens with which a choice is sure.
    """

    heads: tuple[Head, ...]
    tau: float
    focused: tuple[Head, ...] | None = None
    rows: ChoiceRows = "tail"
    n_rows: int | None = None
    parts: PartKind = "document"
    top: int = 1
    top_p: float | None = None
    null: str | None = None
    min_margin: float = 0.0
    max_entropy: float = 1.0
    max_sink: float = 1.0

    def __init__(
        self,
        heads: Iterable[tuple[int, int]],
        tau: float,
        *,
        focused: Iterable[tuple[int, int]] | None = None,
        rows: ChoiceRows = "tail",
        n_rows: int | None = None,
        parts: PartKind = "document",
        top: int = 1,
        top_p: float | None = None,
        null: str | None = None,
        min_margin: float = 0.0,
        max_entropy: float = 1.0,
        max_sink: float = 1.0,
    ) -> None:
        values: dict[str, Any] = {
            "heads": as_heads(heads),
            "tau": SplitSoftmax([], tau).tau,
            "focused": None if focused is None else as_heads(focused),
            "rows": rows,
            "n_rows": n_rows if n_rows is None else _positive(n_rows, "n_rows"),
            "parts": parts if isinstance(parts, str) else _positive(parts, "parts"),
            "top": _positive(top, "top"),
            "top_p": top_p if top_p is None else _share(top_p, "top_p"),
            "null": null,
            "min_margin": _share(min_margin, "min_margin"),
            "max_entropy": _share(max_entropy, "max_entropy"),
            "max_sink": _share(max_sink, "max_sink"),
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)
        self._check()

    def _check(self) -> None:
        if not self.heads:
            raise ValueError("there are no heads to choose by; give at least one, such as scores.top_heads(6)")
        names = (*get_args(QuestionRows), "response")
        if self.rows not in names:
            raise ValueError(f"rows is {self.rows!r}; it must be one of {', '.join(names)}")
        if isinstance(self.parts, str) and self.parts not in ("document", "sentence"):
            raise ValueError(f"parts is {self.parts!r}; it must be 'document', 'sentence' or a number of tokens")
        if self.rows == "response" and self.null is not None:
            raise ValueError("null calibrates rows of the question; it must be None for rows='response'")
        if self.rows != "response" and self.n_rows is not None:
            raise ValueError("n_rows is a number of response rows; it needs rows='response'")

    @property
    def changes_prompt(self) -> bool:
        """Always ``False``, because only the rows that produce the response change."""
        return False

    def describe(self) -> dict[str, Any]:
        """Kind and settings of the intervention as JSON values."""
        focused = self.heads if self.focused is None else self.focused
        return {
            "kind": "self_focus",
            "tau": self.tau,
            "rows": self.rows,
            "n_rows": self.n_rows,
            "parts": self.parts,
            "top": self.top,
            "top_p": self.top_p,
            "null": self.null,
            "min_margin": self.min_margin,
            "max_entropy": self.max_entropy,
            "max_sink": self.max_sink,
            "heads": [list(head) for head in self.heads],
            "focused": [list(head) for head in focused],
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

    def resolve(self, model: FocusModel, prefix: Prefix, max_new_tokens: int = 100) -> tuple[PromptBatch, SplitSoftmax]:
        """Choose parts of each prompt of a prefix.

        Args:
            model: The model.
            prefix: Prefix of the prompts.
            max_new_tokens: Maximum length of a whole answer, if the rows of a response choose.

        Returns:
            The prompts with the chosen parts as a further span, and split-softmax on this span. The span is empty in a
            prompt that is left alone.
        """
        choices = self.choose(model, prefix, max_new_tokens)
        name = f"self-focus {hashlib.sha256(json.dumps(self.describe()).encode()).hexdigest()[:16]}"
        prompts = [
            replace(prompt, spans={**prompt.spans, name: tuple(sorted(choice.parts[i] for i in choice.chosen))})
            for prompt, choice in zip(prefix.batch.prompts, choices, strict=True)
        ]
        focused = self.heads if self.focused is None else self.focused
        return PromptBatch(tuple(prompts), prefix.batch.rows), SplitSoftmax(focused, self.tau, name)

    def choose(self, model: FocusModel, prefix: Prefix, max_new_tokens: int = 100) -> list[Choice]:
        """The choice for each prompt of a prefix. The arguments are those of :meth:`resolve`.

        Raises:
            ValueError: If a head does not exist, a prompt has no parts, or a null question cannot be put into a prompt.
            KeyError: If the rows or parts need a span that a prompt does not have.
        """
        heads = check_heads(self.heads, model.shape.n_layers, model.shape.n_heads)
        parts = [_parts(model, prompt, self.parts) for prompt in prefix.batch.prompts]
        if self.null is not None:
            _require_question_last(prefix.batch.prompts, parts)
        if self.rows == "response":
            plain = attention = answer_attention(model, prefix, heads, self.n_rows or max_new_tokens)
        else:
            nulls = (
                None if self.null is None else [model.encoder.with_question(p, self.null) for p in prefix.batch.prompts]
            )
            read = question_attention(model, prefix, heads, self.rows, nulls)
            plain = read.attention
            attention = plain if read.null is None else plain - read.null
        # The null question changes what documents get, not what the sink takes.
        sinks = [float(plain[i, :, n : n + SINK].sum(dim=-1).mean()) for i, n in enumerate(prefix.batch.padding)]
        return [
            self._choice(attention[i, :, padding:].mean(dim=0).double(), parts[i], sinks[i])
            for i, padding in enumerate(prefix.batch.padding)
        ]

    def _choice(self, attention: Float[Tensor, "pos"], parts: Sequence[Span], sink: float) -> Choice:
        sums = torch.stack([attention[start:end].sum() for start, end in parts]).clamp(min=0)
        shares = (sums / sums.sum()).nan_to_num(0.0)
        order = sorted(range(len(parts)), key=lambda i: (-float(shares[i]), i))
        chosen = order[: self.top]
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


def _positive(value: Any, name: str) -> int:
    number = checked_integer(value, name)
    if number < 1:
        raise ValueError(f"{name} is {number}; it must be at least 1")
    return number


def _share(value: Any, name: str) -> float:
    number = checked_number(value, name)
    if not 0 <= number <= 1:
        raise ValueError(f"{name} is {number}; it must be a number from 0 to 1")
    return float(number)


def _parts(model: FocusModel, prompt: EncodedPrompt, kind: PartKind) -> list[Span]:
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
