"""Views of a prompt with tokens coloured by the response's attention, for one response or two responses."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np
from einops import rearrange, reduce
from jaxtyping import Float

from focuslens.scores.response_attention import ResponseAttention
from focuslens.viz.arrays import require_kind
from focuslens.viz.packing import pack_rows
from focuslens.viz.page import asset, data_block, page
from focuslens.viz.view import AttentionView

__all__ = ["SHARE", "compare_view", "head_choices", "text_view", "with_means"]

SHARE = 10_000
"""Integer that represents a share of 1 in the data of a page."""

_MOST_BYTES = 3_800_000
"""Maximum size of a page's attention rows in bytes. It keeps the whole page below 5 MB."""

_FRAME = """<h1>{title}</h1>
<p>{note}</p>
<div class="controls"><label>Head <select id="head"></select></label>
<span class="legend"><span>0</span><i></i><span><span id="top"></span> and more; the colour grows with the square
root</span></span></div>
{parts}
<div class="status" id="status" role="status" aria-live="polite">Point at a token, or focus a text and use the arrow
keys.</div>
<noscript>A script in this file draws this view, and scripts are switched off.</noscript>
"""

_PARTS = """<details open><summary>Attention to the parts of the prompt</summary>
<div class="scroll" id="parts"></div></details>"""
_PANELS = '<div class="panels" id="panels"></div>'


def text_view(
    attention: ResponseAttention, *, title: str = "", head: int | None = None, said: int | None = None
) -> AttentionView:
    """Text of a prompt, with each token coloured by the attention that it receives from a token of the response.

    The reader selects the head and the response token on the page. The relevant document is outlined. The left and
    right arrow keys move through the text token by token. The up and down arrow keys move through the tokens in order
    of attention.

    Args:
        attention: Attention of the response, from :func:`focuslens.scores.response_attention.response_attention`.
        title: The page's title; the default contains the response.
        head: Index of the head to select initially; ``None`` for the mean of all heads.
        said: Index of the response token to select initially; ``None`` for the mean of all response tokens.

    Raises:
        ValueError: If ``head`` or ``said`` is out of range.
    """
    _require_attention(attention, "attention")
    title = title or (f"{attention.name}: {attention.text}" if attention.name else attention.text) or "Attention"
    return _view([attention], title, head, [said])


def compare_view(
    before: ResponseAttention, after: ResponseAttention, *, title: str = "", head: int | None = None
) -> AttentionView:
    """Attention to a prompt without and with an intervention, as two texts side by side with a common colour scale.

    A table shows the attention to every part of the prompt without and with the intervention, and the change. The
    reader selects one head for both texts, and one response token per text.

    Args:
        before: Attention without the intervention.
        after: Attention with the intervention, for the prompt and heads of ``before``.
        title: The page's title.
        head: Index of the head to select initially; ``None`` for the mean of all heads.

    Raises:
        ValueError: If the prompts, the parts of the prompts or the heads differ, or ``head`` is out of range.
    """
    _require_attention(before, "before")
    _require_attention(after, "after")
    same = {
        "prompt": before.tokens[: before.prompt_length] == after.tokens[: after.prompt_length],
        "parts": {**before.spans} == {**after.spans},
        "heads": before.head_names == after.head_names,
    }
    different = [name for name, equal in same.items() if not equal]
    if different:
        raise ValueError(f"before and after do not have the same {different[0]}, so they cannot be compared")
    title = title or f"{before.name or 'before'} and {after.name or 'after'}"
    return _view([before, after], title, head, [None, None])


def _require_attention(value: Any, name: str) -> None:
    require_kind(value, ResponseAttention, name, "fl.response_attention(model, prompt, heads)")


def head_choices(head_names: Sequence[str]) -> list[str]:
    """Entries of the page's head menu: the mean of all heads, if there are several heads, followed by each head."""
    return [f"mean of {len(head_names)} heads", *head_names] if len(head_names) > 1 else list(head_names)


def with_means(values: Float[np.ndarray, "head response column"]) -> Float[np.ndarray, "choice token column"]:
    """Prepend the mean over heads to the heads (if there are several), and the mean over tokens to the tokens."""
    if len(values) > 1:
        values = np.concatenate((values.mean(axis=0, keepdims=True), values))
    return np.concatenate((values.mean(axis=1, keepdims=True), values), axis=1)


def _view(
    shown: Sequence[ResponseAttention], title: str, head: int | None, tokens: Sequence[int | None]
) -> AttentionView:
    heads = head_choices(shown[0].head_names)
    names = [attention.name or fallback for attention, fallback in zip(shown, ("before", "after"), strict=False)]
    packed = [pack_rows(_rows(attention), _MOST_BYTES // len(shown)) for attention in shown]
    tops = np.max([_largest(attention) for attention in shown], axis=0)
    panels = [
        {
            **_panel(attention),
            "name": name if len(shown) > 1 else attention.name,
            "said": _place(token, attention.response, "response token"),
            "rows": rows.to_json(),
        }
        for attention, name, rows, token in zip(shown, names, packed, tokens, strict=True)
    ]
    data = {
        "kind": "text",
        "heads": heads,
        "head": _place(head, shown[0].head_names, "head") - (len(heads) == 1 and head is not None),
        "unit": SHARE,
        "tops": tops.tolist(),
        "panels": panels,
    }
    # A single text comes first. With two texts, the table comes first, because it shows the differences.
    parts = f"{_PANELS}\n{_PARTS}" if len(shown) == 1 else f"{_PARTS}\n{_PANELS}"
    body = _FRAME.format(title=escape(title), note=_note(shown, min(rows.kept for rows in packed)), parts=parts)
    scripts = (asset("view.js"), asset("height.js"))
    html = page(title, body + data_block(data), css=asset("view.css"), scripts=scripts)
    return AttentionView(html, title, 900)


def _place(index: int | None, names: Sequence[str], kind: str) -> int:
    """Index of a head or token in the page's menu, where entry 0 is the mean. ``None`` selects the mean."""
    if index is None:
        return 0
    if not 0 <= index < len(names):
        raise ValueError(f"there is no {kind} {index}: there are {len(names)}, counted from 0")
    return index + 1


def _rows(attention: ResponseAttention) -> Float[np.ndarray, "row key"]:
    values = with_means(attention.rows.float().numpy())
    return rearrange(values, "choice token key -> (choice token) key")


def _panel(attention: ResponseAttention) -> dict[str, Any]:
    units, pooled = attention.units(), attention.by_unit()
    unit_of = np.zeros(len(attention.tokens), dtype=np.int64)
    for i, (_, places, _) in enumerate(units):
        unit_of[places] = i
    return {
        "tokens": list(attention.tokens),
        "length": attention.prompt_length,
        "units": list(pooled.labels),
        "marked": list(pooled.relevant),
        "unitOf": unit_of.tolist(),
        "shares": np.round(with_means(pooled.shares.numpy()) * SHARE).astype(int).tolist(),
        "response": ["all (mean)", *attention.response],
    }


def _largest(attention: ResponseAttention) -> Float[np.ndarray, "choice 2"]:
    """Largest attention to a prompt token outside the sink, per entry of the head menu.

    The first column is for the mean over response tokens. The second column is the maximum over individual response
    tokens. In many heads, most attention goes to the sink. A colour scale that included the sink would leave all other
    tokens nearly colourless.
    """
    sink = next((places for label, places, _ in attention.units() if label == "sink"), [])
    outside = np.setdiff1d(np.arange(attention.prompt_length), sink)
    values = with_means(attention.rows.float().numpy())
    values = values[:, :, outside] if len(outside) else values
    largest = reduce(values, "choice token key -> choice token", "max")
    both = np.stack([largest[:, 0], reduce(largest[:, 1:], "choice token -> choice", "max")], axis=1)
    return np.where(both > 0, both, 1.0)


def _note(shown: Sequence[ResponseAttention], kept: float) -> str:
    responses = " ".join(
        f"<strong>{escape(attention.name or 'Response')}:</strong> “{escape(attention.text)}”"
        for attention in shown
        if attention.text
    )
    cut = "" if kept > 0.999 else f" The smallest shares are left out; every row shows at least {kept:.1%} of its sum."
    return (
        f"{responses}<br>Colours are attention from the response's tokens. Full colour is the largest attention "
        f"outside the sink.{cut} ★ marks the relevant part."
    )
