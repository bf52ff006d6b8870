"""A prompt coloured token by token by the attention of its response, alone or before and after an intervention."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np
from einops import rearrange, reduce
from jaxtyping import Float

from focuslens.scores.response import ResponseAttention
from focuslens.viz.packing import pack_rows
from focuslens.viz.page import asset, data_block, page
from focuslens.viz.view import AttentionView

__all__ = ["SHARE", "compare_view", "head_choices", "text_view", "with_means"]

SHARE = 10_000
"""Parts of the whole in which shares are written into pages."""

_MOST_BYTES = 3_800_000
"""Of a page's attention rows: it stays below 5 MB with everything around them."""

_FRAME = """<h1>{title}</h1>
<p>{note}</p>
<div class="controls"><label>Head <select id="head"></select></label>
<span class="legend"><span>0</span><i></i><span><span id="top"></span> and more; colours go by the square
root</span></span></div>
{parts}
<div class="status" id="status" role="status" aria-live="polite">Point at a token, or go to a text and use the arrow
keys.</div>
<noscript>This view is drawn by a script in this file, and scripts are switched off.</noscript>
"""

_PARTS = """<details open><summary>What the parts of the prompt get</summary>
<div class="scroll" id="parts"></div></details>"""
_PANELS = '<div class="panels" id="panels"></div>'


def text_view(
    attention: ResponseAttention, *, title: str = "", head: int | None = None, said: int | None = None
) -> AttentionView:
    """The prompt as text, each token coloured by its attention from a token of the response.

    Head and response token are chosen on the page; the relevant document is outlined. By keyboard: the text takes the
    arrow keys, left and right token by token, up and down in the order of attention.

    Args:
        attention: What to show; see :func:`focuslens.scores.response.response_attention`.
        title: The page's title; by default the response.
        head: Which head is shown first, by its place among the heads; ``None`` for the mean of all.
        said: Which response token, by its place; ``None`` for the mean of all.

    Raises:
        ValueError: If there is no such head or response token.
    """
    title = title or (f"{attention.name}: {attention.text}" if attention.name else attention.text) or "Attention"
    return _view([attention], title, head, [said])


def compare_view(
    before: ResponseAttention, after: ResponseAttention, *, title: str = "", head: int | None = None
) -> AttentionView:
    """The same prompt before and after an intervention, side by side, on one scale of colours.

    A table says what every part of the prompt gets and by how much that changes. One choice of head holds for both;
    each side has response tokens of its own.

    Args:
        before: Without the intervention.
        after: With it; of the same prompt and heads.
        title: The page's title.
        head: Which head is shown first, by its place among the heads; ``None`` for the mean of all.

    Raises:
        ValueError: If prompts or heads differ.
    """
    same = {
        "prompt": before.tokens[: before.prompt_length] == after.tokens[: after.prompt_length],
        "parts": {**before.spans} == {**after.spans},
        "heads": before.head_names == after.head_names,
    }
    different = [name for name, equal in same.items() if not equal]
    if different:
        raise ValueError(f"before and after are not of the same {different[0]}, so they cannot stand side by side")
    title = title or f"{before.name or 'before'} and {after.name or 'after'}"
    return _view([before, after], title, head, [None, None])


def head_choices(head_names: Sequence[str]) -> list[str]:
    """Names of what can be chosen: the mean of all heads, then each; one head needs no mean."""
    return [f"mean of {len(head_names)} heads", *head_names] if len(head_names) > 1 else list(head_names)


def with_means(values: Float[np.ndarray, "head response column"]) -> Float[np.ndarray, "choice said column"]:
    """In front of each axis its mean: of all heads, where there are several, and of all response tokens."""
    if len(values) > 1:
        values = np.concatenate((values.mean(axis=0, keepdims=True), values))
    return np.concatenate((values.mean(axis=1, keepdims=True), values), axis=1)


def _view(
    shown: Sequence[ResponseAttention], title: str, head: int | None, said: Sequence[int | None]
) -> AttentionView:
    heads = head_choices(shown[0].head_names)
    names = [one.name or fallback for one, fallback in zip(shown, ("before", "after"), strict=False)]
    packed = [pack_rows(_rows(one), _MOST_BYTES // len(shown)) for one in shown]
    tops = np.max([_largest(one) for one in shown], axis=0)
    panels = [
        {
            **_panel(one),
            "name": name if len(shown) > 1 else one.name,
            "said": _place(chosen, one.response, "response token"),
            "rows": rows.to_json(),
        }
        for one, name, rows, chosen in zip(shown, names, packed, said, strict=True)
    ]
    data = {
        "kind": "text",
        "heads": heads,
        "head": _place(head, shown[0].head_names, "head") - (len(heads) == 1 and head is not None),
        "unit": SHARE,
        "tops": tops.tolist(),
        "panels": panels,
    }
    # One text is read first; of two, the table says where to look.
    parts = f"{_PANELS}\n{_PARTS}" if len(shown) == 1 else f"{_PARTS}\n{_PANELS}"
    body = _FRAME.format(title=escape(title), note=_note(shown, min(one.kept for one in packed)), parts=parts)
    scripts = (asset("view.js"), asset("height.js"))
    html = page(title, body + data_block(data), css=asset("view.css"), scripts=scripts)
    return AttentionView(html, title, 900)


def _place(chosen: int | None, among: Sequence[str], what: str) -> int:
    """The place on the page, where the mean of all stands first."""
    if chosen is None:
        return 0
    if not 0 <= chosen < len(among):
        raise ValueError(f"there is no {what} {chosen}: there are {len(among)}, counted from 0")
    return chosen + 1


def _rows(attention: ResponseAttention) -> Float[np.ndarray, "row key"]:
    values = with_means(attention.rows.float().numpy())
    return rearrange(values, "choice said key -> (choice said) key")


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
    """For each choice of head the largest attention to a token of the prompt outside the sink: of the mean, of a row.

    Sinks take most of many heads' attention, and would leave no colour for the rest.
    """
    sink = next((places for label, places, _ in attention.units() if label == "sink"), [])
    outside = np.setdiff1d(np.arange(attention.prompt_length), sink)
    values = with_means(attention.rows.float().numpy())
    values = values[:, :, outside] if len(outside) else values
    largest = reduce(values, "choice said key -> choice said", "max")
    both = np.stack([largest[:, 0], reduce(largest[:, 1:], "choice said -> choice", "max")], axis=1)
    return np.where(both > 0, both, 1.0)


def _note(shown: Sequence[ResponseAttention], kept: float) -> str:
    said = " ".join(
        f"<strong>{escape(one.name or 'Response')}:</strong> “{escape(one.text)}”" for one in shown if one.text
    )
    cut = "" if kept > 0.999 else f" The smallest shares are left out; every row shows at least {kept:.1%} of its own."
    return (
        f"{said}<br>Colours are attention in the rows of the response's own tokens, up to the largest outside the sink."
        f"{cut} ★ marks the relevant part."
    )
