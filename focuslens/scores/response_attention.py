"""Attention rows of response tokens, read from selected heads for display.

Each row contains the attention from one response token to all tokens up to and including it. Hooks read the rows when
the model computes them. The attention pattern of the whole prompt is never stored.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from focuslens.heads import Head, check_heads, heads_by_layer
from focuslens.hooks import Hook, Intervention, RowHook, checked_interventions, hook_name, row_wise
from focuslens.model.generation import Prefix
from focuslens.model.prefilled import prefilled, prompt_of
from focuslens.prompts.batch import EncodedPrompt
from focuslens.prompts.prompt import Span
from focuslens.scores.base import SINK
from focuslens.scores.given_responses import GivenResponse, checked_response, response_text, response_tokens
from focuslens.util.frames import SHARE, long_frame
from focuslens.util.progress import bars_inside

if TYPE_CHECKING:
    import pandas as pd

    from focuslens.model.focus_model import FocusModel

__all__ = ["ResponseAttention", "UnitAttention", "response_attention"]

_NUMBER = re.compile(r"Document \[(\d+)\][^\[\]]*$")
_DOCUMENT_PARTS = ("instruction", "document", "relevant", "irrelevant", "question")


@dataclass(frozen=True, eq=False)
class UnitAttention:
    """Attention from each response token to units of the text, such as a document or the question.

    Attributes:
        labels: Label of each unit, such as ``sink``, ``Document [1]`` or ``question``.
        shares: Share of each response token's attention that goes to each unit, per head. In the result of
            :meth:`ResponseAttention.by_unit`, the shares of a response token sum to 1 for each head.
        head_names: Name of each head, such as ``L13H23``.
        response: Text of each response token.
        relevant: Indices of the units that overlap the relevant document.

    Raises:
        ValueError: If the shapes do not match, ``shares`` is empty or contains NaN, infinite or negative values, or a
            unit in ``relevant`` does not exist.
    """

    labels: tuple[str, ...]
    shares: Float[Tensor, "head response unit"]
    head_names: tuple[str, ...]
    response: tuple[str, ...]
    relevant: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        expected = (len(self.head_names), len(self.response), len(self.labels))
        if tuple(self.shares.shape) != expected or not self.shares.numel():
            raise ValueError(
                f"shares have the shape {tuple(self.shares.shape)}; for these names it must be {expected} "
                "[head response unit], with at least one of each"
            )
        for unit in self.relevant:
            if not 0 <= unit < len(self.labels):
                raise ValueError(f"relevant unit {unit} does not exist: there are {len(self.labels)}, counted from 0")
        _require_shares(self.shares)

    def to_frame(self) -> pd.DataFrame:
        """Data frame with one row per head, response token and unit."""
        axes = {"head": self.head_names, "row": range(len(self.response)), "unit": range(len(self.labels))}
        frame = long_frame(axes, {"share": self.shares.float().cpu()}, {"share": SHARE})
        frame.insert(2, "token", [self.response[row] for row in frame["row"]])
        frame.insert(4, "label", [self.labels[unit] for unit in frame["unit"]])
        frame.insert(5, "is_relevant", frame["unit"].isin(self.relevant))
        return frame


@dataclass(frozen=True, eq=False)
class ResponseAttention:
    """Attention of some heads from each response token to all tokens of the prompt and of the response.

    Attributes:
        rows: Attention from each response token to each key, per head. The attention to later keys is 0.
        head_names: Name of each head, such as ``L13H23``.
        tokens: Text of each token: first the prompt tokens, then the response tokens.
        spans: Half-open ranges of token positions in the prompt, by span name (see :class:`EncodedPrompt`).
        text: Text of the response.
        name: Name of the result, such as ``baseline``.

    Raises:
        ValueError: If the shapes do not match, there are no response tokens, a span is not inside the prompt, or
            ``rows`` contains NaN, infinite or negative values.
    """

    rows: Float[Tensor, "head response key"]
    head_names: tuple[str, ...]
    tokens: tuple[str, ...]
    spans: Mapping[str, tuple[Span, ...]] = field(default_factory=dict[str, tuple[Span, ...]])
    text: str = ""
    name: str = ""

    def __post_init__(self) -> None:
        n_heads, n_rows, n_keys = self.rows.shape
        if not self.rows.numel() or n_heads != len(self.head_names) or n_keys != len(self.tokens) or n_rows >= n_keys:
            raise ValueError(
                f"rows have the shape {tuple(self.rows.shape)} [head response key] for {len(self.head_names)} head "
                f"names and {len(self.tokens)} tokens; they need one key for each token, at least one row, and at "
                "least one token before the response"
            )
        for name, ranges in self.spans.items():
            for start, end in ranges:
                if not 0 <= start < end <= self.prompt_length:
                    raise ValueError(
                        f"span {name!r} = ({start}, {end}) does not lie in a prompt of {self.prompt_length} tokens"
                    )
        _require_shares(self.rows)

    def __repr__(self) -> str:
        name = f"{self.name}: " if self.name else ""
        return (
            f"ResponseAttention({name}{len(self.head_names)} heads, {len(self.response)} response tokens "
            f"{self.text!r} after a prompt of {self.prompt_length})"
        )

    @property
    def prompt_length(self) -> int:
        """Number of tokens before the response."""
        return len(self.tokens) - self.rows.shape[1]

    @property
    def response(self) -> tuple[str, ...]:
        """Text of each response token."""
        return self.tokens[self.prompt_length :]

    def units(self) -> list[tuple[str, list[int], bool]]:
        """Divide all tokens into units. Each unit has a label, a list of token positions, and a flag for relevance.

        The units are the sink (the first two tokens), each document or other named span, the question, the rest of the
        prompt (``template``) and the response. If a token belongs to several units, it counts only for the first of
        these units. A unit is relevant if it overlaps the relevant document.
        """
        is_free, units = [True] * len(self.tokens), list[tuple[str, list[int], bool]]()
        relevant = {position for span in self.spans.get("relevant", ()) for position in range(*span)}

        def add(label: str, positions: Iterable[int], *, is_relevant: bool = False) -> None:
            free_positions = [position for position in positions if is_free[position]]
            for position in free_positions:
                is_free[position] = False
            if free_positions:
                units.append((label, free_positions, is_relevant))

        add("sink", range(min(SINK, self.prompt_length)))
        for label, span in self._named_parts():
            add(label, range(*span), is_relevant=not relevant.isdisjoint(range(*span)))
        for span in self.spans.get("question", ()):
            add("question", range(*span))
        add("template", range(self.prompt_length))
        add("response", range(self.prompt_length, len(self.tokens)))
        return units

    def to_frame(self) -> pd.DataFrame:
        """Data frame with one row per head, response token and key. Positions count from the prompt's first token."""
        n_prompt, n_keys = self.prompt_length, len(self.tokens)
        axes = {"head": self.head_names, "position": range(n_prompt, n_keys), "key_position": range(n_keys)}
        frame = long_frame(axes, {"attention": self.rows.float().cpu()}, {"attention": SHARE})
        frame.insert(2, "token", [self.tokens[position] for position in frame["position"]])
        frame.insert(4, "key_token", [self.tokens[position] for position in frame["key_position"]])
        return frame

    def _named_parts(self) -> list[tuple[str, Span]]:
        """Spans of the documents, labelled with the document numbers, followed by all spans with other names."""
        documents = self.spans.get("document") or ()
        parts = [(f"Document [{self._number(span, i)}]", span) for i, span in enumerate(documents, start=1)]
        names = [name for name in self.spans if name not in _DOCUMENT_PARTS]
        names += [] if documents else [name for name in ("relevant", "irrelevant") if name in self.spans]
        for name in names:
            ranges = self.spans[name]
            parts += [(name if len(ranges) == 1 else f"{name} {i}", span) for i, span in enumerate(ranges, start=1)]
        return parts

    def _number(self, span: Span, default: int) -> int:
        """Number of a document, parsed from the text before its span; ``default`` if the text contains no number."""
        # The first token of the span is included, because it may contain the bracket that closes the number.
        match = _NUMBER.search("".join(self.tokens[max(0, span[0] - 12) : span[0] + 1]))
        return int(match[1]) if match else default

    def by_unit(self) -> UnitAttention:
        """Attention summed over the tokens of each unit (see :meth:`units`)."""
        units = self.units()
        membership = torch.zeros(len(self.tokens), len(units))
        for i, (_, positions, _) in enumerate(units):
            membership[positions, i] = 1
        return UnitAttention(
            tuple(label for label, _, _ in units),
            einsum(self.rows.float(), membership, "head response key, key unit -> head response unit"),
            self.head_names,
            self.response,
            tuple(i for i, (_, _, is_relevant) in enumerate(units) if is_relevant),
        )


def _require_shares(values: Tensor) -> None:
    if not bool((values.isfinite() & (values >= 0)).all()):
        raise ValueError(
            "attention holds NaN, infinite or negative numbers; it must be the probabilities after the softmax"
        )


@torch.no_grad()
def response_attention(
    model: FocusModel,
    prompt: str | EncodedPrompt | Prefix,
    heads: Sequence[tuple[int, int]],
    *,
    response: GivenResponse | None = None,
    interventions: Sequence[Intervention] = (),
    max_new_tokens: int = 100,
    name: str = "",
    progress: bool | None = None,
) -> ResponseAttention:
    """Attention of some heads from each response token to all tokens of the prompt and of the response.

    Args:
        model: The model.
        prompt: The prompt, or a prefix of it that :meth:`FocusModel.prefill` returned, which is then not run again. The
            prompt's spans become units (see :meth:`ResponseAttention.units`).
        heads: The heads to read.
        response: The text of the response, its token ids, or a :class:`Generation`, as in :func:`document_scores`; if
            ``None``, the model generates the response.
        interventions: Interventions, applied in order. The rows include their effect.
        max_new_tokens: Maximum length of a generated response, in tokens.
        name: Name of the result, such as ``baseline``.
        progress: Whether to show a progress bar while a long prompt is run; :mod:`focuslens.util.progress` describes
            the default.

    Raises:
        ValueError: If ``heads`` is empty or contains a head that does not exist, if the response is empty, if the
            tokens do not fit into the context, if the prefix has several prompts, or if it was run without an
            intervention that changes the prompt.
        TypeError: If ``interventions`` is not a sequence of interventions.
    """
    interventions = checked_interventions(interventions)
    head_list, encoded_prompt = check_heads(heads, model.shape.n_layers, model.shape.n_heads), prompt_of(model, prompt)
    if not head_list:
        raise ValueError("there are no heads to read; give at least one, such as scores.top_heads(4)")
    given = None if response is None else checked_response(response, "response", model.shape.d_vocab)
    known_ids = None if given is None else response_tokens(model, encoded_prompt, given)
    if known_ids is not None and not len(known_ids):
        raise ValueError(
            "the response is empty, so it has no tokens whose attention can be read; give another response"
        )
    reader = _Reader(head_list)
    with bars_inside(progress):
        prefix = prefilled(model, prompt if isinstance(prompt, Prefix) else encoded_prompt, interventions)
    if given is None or known_ids is None:
        (generated,) = model.decode(prefix, interventions, max_new_tokens=max_new_tokens, observers=reader.hooks())
        if not len(generated.tokens):
            raise ValueError(
                "the model ended its response at once, so it has no tokens whose attention can be read; give a response"
            )
        ids, text, first = generated.tokens, generated.text, 1  # row 0 belongs to the prompt's last token
    else:
        ids, text, first = known_ids, response_text(model, given).strip(), 0
        model.extend(prefix, ids[None], interventions, reader.hooks())
    tokens = (*model.encoder.texts(encoded_prompt), *model.encoder.response_texts(encoded_prompt, ids))
    names = tuple(str(head) for head in head_list)
    return ResponseAttention(
        reader.rows(len(encoded_prompt.tokens), len(ids), first), names, tokens, encoded_prompt.spans, text, name
    )


class _Reader:
    """Collector of the attention rows of some heads, for one prompt. Hooks on ``hook_pattern`` read the rows."""

    def __init__(self, heads: Sequence[Head]) -> None:
        self._heads = heads
        self._rows: dict[int, list[Float[Tensor, "head key"]]] = {layer: [] for layer in heads_by_layer(heads)}

    def hooks(self) -> list[Hook]:
        return [(hook_name(layer, "hook_pattern"), self._observer(layer)) for layer in self._rows]

    def _observer(self, layer: int) -> Any:
        head_indices = heads_by_layer(self._heads)[layer]

        def read(pattern: Float[Tensor, "batch head row key"]) -> None:
            part = pattern[0, torch.as_tensor(head_indices, device=pattern.device)].float().cpu()
            self._rows[layer] += list(part.unbind(dim=1))

        @row_wise
        def observe(pattern: Float[Tensor, "batch head row key"], hook: Any) -> None:
            read(pattern)

        return RowHook(observe, read, reads=True)

    def rows(self, n_prompt: int, n_response: int, first: int) -> Float[Tensor, "head response key"]:
        """Attention rows of the response tokens. Collected rows before index ``first`` are skipped."""
        rows = torch.zeros(len(self._heads), n_response, n_prompt + n_response)
        index_of = {head: i for i, head in enumerate(self._heads)}
        for layer, layer_heads in heads_by_layer(self._heads).items():
            indices = [index_of[Head(layer, head)] for head in layer_heads]
            for row, attention in enumerate(self._rows[layer][first : first + n_response]):
                end = n_prompt + row + 1
                # Align each row at the key of its token. A sliding-window cache lacks early keys, and a pass over
                # several tokens also has later keys.
                keys = attention[:, : min(attention.shape[1], end)]
                rows[indices, row, end - keys.shape[1] : end] = keys
        return rows
