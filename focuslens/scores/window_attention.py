"""Attention between the tokens of a window, which is a selection of tokens that is small enough to display."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from focuslens.heads import Head, check_heads
from focuslens.hooks import Cursor, Intervention, checked_interventions
from focuslens.model.engine import KeyValueCache
from focuslens.model.generation import Prefix
from focuslens.model.prefilled import prefilled, prompt_of
from focuslens.model.resolving import resolved
from focuslens.prompts.batch import EncodedPrompt, SpanLike, disjoint
from focuslens.prompts.prompt import Span
from focuslens.scores.base import SINK
from focuslens.scores.contextual_scores import attention_pattern
from focuslens.scores.given_responses import GivenResponse, checked_response, response_text, response_tokens
from focuslens.scores.pattern_rows import PatternRows
from focuslens.util.frames import SHARE, long_frame
from focuslens.util.progress import bars_inside

if TYPE_CHECKING:
    import pandas as pd

    from focuslens.model.focus_model import FocusModel

__all__ = ["WindowAttention", "window_attention", "window_positions"]

_MAX_CELLS = 640_000
"""Maximum number of attention values on a page, over all heads. This maximum keeps the page below 5 MB."""


@dataclass(frozen=True, eq=False)
class WindowAttention:
    """Attention of some heads between the tokens of a window, which is a selection of tokens of the whole text.

    Attributes:
        pattern: Attention from each window token (row) to each window token (column). A row can sum to less than 1,
            because attention to tokens outside the window is left out.
        head_names: Name of each head, such as ``L13H23``.
        tokens: Text of each window token.
        positions: Position of each window token in the whole text.
        length: Number of tokens in the whole text, including the response.
        left_out: Number of requested tokens that did not fit into the window, not counting margins.
        text: Text of the response.
    """

    pattern: Float[Tensor, "head position position"]
    head_names: tuple[str, ...]
    tokens: tuple[str, ...]
    positions: tuple[int, ...]
    length: int
    left_out: int = 0
    text: str = ""

    def to_frame(self) -> pd.DataFrame:
        """Data frame with one row per head, window token and key. Positions are those in the whole text."""
        text_of = dict(zip(self.positions, self.tokens, strict=True))
        axes = {"head": self.head_names, "position": self.positions, "key_position": self.positions}
        frame = long_frame(axes, {"attention": self.pattern.float().cpu()}, {"attention": SHARE})
        frame.insert(2, "token", [text_of[position] for position in frame["position"]])
        frame.insert(4, "key_token", [text_of[position] for position in frame["key_position"]])
        return frame


def window_positions(spans: Sequence[Span], length: int, *, margin: int = 4, most: int = 128) -> tuple[list[int], int]:
    """Select the token positions of a window: the sink and all spans, each with ``margin`` tokens on both sides.

    The window contains at most ``most`` tokens. If the spans with their margins do not fit, the margins are dropped. If
    the spans still do not fit, tokens are removed from the end of the longest span. Overlapping spans are merged.

    Returns:
        The positions in ascending order, and the number of tokens that were removed from the ends of spans.

    Raises:
        ValueError: If a span is not inside the text, or if ``most`` is less than the number of spans, including
            the sink, after merging.
    """
    for start, end in spans:
        if not 0 <= start < end <= length:
            raise ValueError(
                f"span ({start}, {end}) does not lie in a text of {length} tokens; "
                "a span is a half-open range with 0 <= start < end <= length"
            )
    bare_parts = disjoint([(0, min(SINK, length)), *spans])
    parts = disjoint([(max(0, start - margin), min(length, end + margin)) for start, end in bare_parts])
    if sum(end - start for start, end in parts) > most:
        parts = bare_parts
    n_requested = sum(end - start for start, end in parts)
    if len(parts) > most:
        raise ValueError(f"most is {most}, and there are {len(parts)} parts to show; most must be at least this number")
    lengths = [end - start for start, end in parts]
    while sum(lengths) > most:
        lengths[max(range(len(parts)), key=lambda i: lengths[i])] -= 1
    positions = [position for (start, _), n in zip(parts, lengths, strict=True) for position in range(start, start + n)]
    return positions, n_requested - len(positions)


def window_attention(
    model: FocusModel,
    prompt: str | EncodedPrompt | Prefix,
    heads: Sequence[tuple[int, int]],
    around: Sequence[SpanLike] = ("relevant", "question"),
    *,
    margin: int = 4,
    most: int | None = None,
    response: GivenResponse | None = None,
    interventions: Sequence[Intervention] = (),
    max_new_tokens: int = 100,
    progress: bool | None = None,
) -> WindowAttention:
    """Attention of some heads between the tokens of a window: the sink, spans of the prompt, and the response.

    The prompt is run once. The rows of the window are then run again over its keys and values, up to the last layer
    with one of the heads: an attention row needs the query of its token, which the keys and values do not contain. If
    a layer's attention is not computed by FocusLens's engine, all rows are run again. Only the values inside the window
    are stored.

    Args:
        model: The model.
        prompt: The prompt, or a prefix of it that :meth:`FocusModel.prefill` returned, which is then not run again.
        heads: The heads to read.
        around: Spans of the prompt to include, each given by name or as a half-open range of token positions.
        margin: Number of tokens to include on each side of a span.
        most: Maximum number of tokens in the window. The default is 160, or less if there are many heads.
        response: The text of the response, its token ids, or a :class:`Generation`, as in :func:`document_scores`; if
            ``None``, the model generates the response.
        interventions: Interventions, applied in order.
        max_new_tokens: Maximum length of a generated response, in tokens.
        progress: Whether to show a progress bar while a long prompt is run; :mod:`focuslens.util.progress` describes
            the default.

    Raises:
        KeyError: If the prompt does not have a span named in ``around``.
        ValueError: If ``heads`` is empty or contains a head that does not exist, if a range is not inside the prompt,
            if ``most`` is less than the number of spans, including the sink and the response, if the prefix has several
            prompts, or if it was run without an intervention that changes the prompt.
        TypeError: If ``interventions`` is not a sequence of interventions.
    """
    interventions = checked_interventions(interventions)
    head_list, encoded_prompt = check_heads(heads, model.shape.n_layers, model.shape.n_heads), prompt_of(model, prompt)
    if not head_list:
        raise ValueError("there are no heads to read; give at least one, such as scores.top_heads(4)")
    spans = [span for part in around for span in encoded_prompt.resolve(part)]
    given = prompt if isinstance(prompt, Prefix) else encoded_prompt
    with bars_inside(progress):
        # Interventions that choose from the prefix measure it once for the response and once more for the rows.
        prefix = replace(prefilled(model, given, interventions), measured={})
        if response is None:
            generated = model.generate(prefix, interventions, max_new_tokens=max_new_tokens)
            assert not isinstance(generated, list)
            ids, text = generated.tokens, generated.text
        else:
            known = checked_response(response, "response", model.shape.d_vocab)
            ids, text = response_tokens(model, encoded_prompt, known), response_text(model, known).strip()
        n_prompt, length = len(encoded_prompt.tokens), len(encoded_prompt.tokens) + len(ids)
        spans += [(n_prompt, length)] if len(ids) else []
        room = most if most is not None else min(160, int((_MAX_CELLS / len(head_list)) ** 0.5))
        positions, left_out = window_positions(spans, length, margin=margin, most=room)
        pattern = _pattern(model, prefix, ids, head_list, positions, interventions, max_new_tokens)
    texts = [*model.encoder.texts(encoded_prompt), *model.encoder.response_texts(encoded_prompt, ids)]
    return WindowAttention(
        pattern,
        tuple(str(head) for head in head_list),
        tuple(texts[position] for position in positions),
        tuple(positions),
        length,
        left_out,
        text,
    )


@torch.no_grad()
def _pattern(
    model: FocusModel,
    prefix: Prefix,
    response: Int[Tensor, "response"],
    heads: Sequence[Head],
    positions: Sequence[int],
    interventions: Sequence[Intervention],
    max_new_tokens: int,
) -> Float[Tensor, "head position position"]:
    """Attention pattern between the tokens at ``positions``, by running their rows over the columns of a prefix."""
    (prompt,) = prefix.batch.prompts
    last, length = len(prompt.tokens) - 1, len(prompt.tokens) + len(response)
    mask = torch.ones(1, length, dtype=torch.long)
    if not isinstance(prefix.cache, KeyValueCache) or model.backend.outgrown(mask, length - last):
        return attention_pattern(model, prompt, response, heads, positions, interventions=interventions)
    model.require_room(length)
    rows = PatternRows(heads, positions)
    for start, end in disjoint([(position, position + 1) for position in positions if position < last]):
        model.read_rows(prefix, start, rows.hooks(), tokens=prompt.tokens[None, start:end])
    if positions[-1] >= last:
        # All interventions act on the rows from the prompt's last token on.
        prefix, acting = resolved(model, prefix, interventions, max_new_tokens)
        tokens = torch.cat((prompt.tokens[last:], response))[None]
        with model.intervened(acting, prefix.batch, Cursor(last), rows.hooks()):
            model.run_to(max(layer for layer, _ in heads), tokens, mask, model.backend.fork(prefix.cache))
    return rows.pattern()
