"""View of a response's attention, summed over whole parts of the prompt, such as documents."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import numpy as np
import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from focuslens.prompts.prompt import Span
from focuslens.scores.response_attention import ResponseAttention, UnitAttention
from focuslens.viz.arrays import require_kind
from focuslens.viz.page import asset, data_block, page
from focuslens.viz.text import SHARE, head_choices, with_means
from focuslens.viz.view import AttentionView

__all__ = ["document_view", "pool_attention"]

_FRAME = """<h1>{title}</h1>
<p>{note}</p>
{means}
<div class="controls"><label>Head <select id="head" aria-controls="tokens"></select></label></div>
<div class="scroll" id="tokens"></div>
<noscript>A script in this file draws the response token by token, and scripts are switched off.</noscript>
"""


def document_view(attention: ResponseAttention | UnitAttention, *, title: str = "") -> AttentionView:
    """Attention of a response to whole parts of the prompt: each document, the question, the template, the sink.

    The first table on the page has one row per head, with attention averaged over the response. In this table, the
    value of a document is its contextual score (equation 1 of "Focus Directions"). The second table has one row per
    response token, for the head that the reader selects. The first table works without JavaScript. The size of the
    page does not depend on the prompt's length.

    Args:
        attention: Attention of the response. Attention to individual tokens is summed over each part.
        title: The page's title.
    """
    kinds = (ResponseAttention, UnitAttention)
    require_kind(attention, kinds, "attention", "fl.response_attention(model, prompt, heads)")
    units = attention.by_unit() if isinstance(attention, ResponseAttention) else attention
    name = f"{attention.name}: {attention.text}" if isinstance(attention, ResponseAttention) and attention.name else ""
    title = title or name or "Attention of the response to the parts of the prompt"
    shares, heads = with_means(units.shares.float().numpy()), head_choices(units.head_names)
    data = {
        "kind": "units",
        "heads": heads,
        "head": 0,
        "unit": SHARE,
        "panels": [
            {
                "units": list(units.labels),
                "marked": list(units.relevant),
                "response": ["all (mean)", *units.response],
                "said": 0,
                "shares": np.round(shares * SHARE).astype(int).tolist(),
            }
        ],
    }
    note = "Share of attention, averaged over the response tokens." + " ★ marks the relevant part." * bool(
        units.relevant
    )
    body = _FRAME.format(title=escape(title), note=note, means=_means(units, heads, shares[:, 0]))
    scripts = (asset("view.js"), asset("height.js"))
    html = page(title, body + data_block(data), css=asset("view.css"), scripts=scripts)
    return AttentionView(html, title, min(1100, 320 + 26 * (len(heads) + len(units.response))))


def _means(units: UnitAttention, heads: Sequence[str], means: Float[np.ndarray, "choice unit"]) -> str:
    """HTML of the table of mean attention, with one row per head. The table works without JavaScript."""
    top = float(means.max()) or 1.0

    def cell(value: float) -> str:
        share = value / top
        strong = " strong" if share > 0.6 else ""
        return f'<td class="heat{strong}" style="--a:{share:.2f}">{value:.2f}</td>'

    def heading(unit: int, label: str) -> str:
        text = escape(label)
        return (
            f'<th scope="col" class="marked">{text} ★</th>' if unit in units.relevant else f"<th scope=col>{text}</th>"
        )

    head = "".join(heading(unit, label) for unit, label in enumerate(units.labels))
    body = "".join(
        f'<tr><th scope="row">{escape(name)}</th>{"".join(map(cell, line))}</tr>\n'
        for name, line in zip(heads, means.tolist(), strict=True)
    )
    return (
        '<div class="scroll"><table class="units" id="means"><caption>All heads, averaged over the response</caption>'
        f'<thead><tr><th scope="col">head</th>{head}</tr></thead><tbody>\n{body}</tbody></table></div>'
    )


def pool_attention(rows: Float[Tensor, "head query key"], spans: Sequence[Span]) -> Float[Tensor, "head query unit"]:
    """Attention summed over spans of keys, such as documents. Sums have at least float32 precision.

    Args:
        rows: Attention of each head from any number of query tokens to all keys.
        spans: Half-open token ranges, one per unit. The ranges may overlap and need not cover all keys.

    Raises:
        ValueError: If a span is empty or reversed, or extends beyond the keys.
    """
    require_kind(rows, Tensor, "rows", "a tensor [head query key]")
    n_keys = rows.shape[-1]
    member = torch.zeros(n_keys, len(spans), dtype=torch.promote_types(rows.dtype, torch.float32), device=rows.device)
    for unit, (start, end) in enumerate(spans):
        if not 0 <= start < end <= n_keys:
            raise ValueError(
                f"span {unit} = ({start}, {end}) does not lie in {n_keys} keys; "
                "a span is a half-open range with 0 <= start < end <= keys"
            )
        member[start:end, unit] = 1
    return einsum(rows.to(member.dtype), member, "head query key, key unit -> head query unit")
