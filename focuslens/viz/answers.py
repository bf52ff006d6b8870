"""Picture of the documents that responses came from: one bar per document, below each question and its response."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape

from focuslens.prompts.sample import MultiDocSample
from focuslens.scores.answer_sources import AnswerSources
from focuslens.util.html import shorten
from focuslens.viz.arrays import require_kind
from focuslens.viz.page import asset, page
from focuslens.viz.report import CSS
from focuslens.viz.view import AttentionView

__all__ = ["answer_view", "source_findings"]

_LONGEST_TEXT = 1500
"""Maximum number of characters of a document on the page."""

_CLEAR = 0.1
"""Margin below which the page calls a source unclear."""


def answer_view(
    sources: AnswerSources,
    samples: Sequence[MultiDocSample],
    *,
    title: str = "",
    lengths: Sequence[Sequence[int]] | None = None,
    facts: Mapping[str, str] | None = None,
    links: Mapping[str, str] | None = None,
    most: int = 300,
) -> AttentionView:
    """Documents that responses came from: for each sample its question, its response, and a bar per document.

    A bar is the document's share of the attention that the response pays to all documents. The source is the document
    with the largest share. The page needs no script, and its documents fold out.

    Args:
        sources: Shares of the documents, from :meth:`DocumentScores.sources`.
        samples: The samples, in the same order.
        title: The page's title.
        lengths: Number of tokens of each document of each sample. A line on each bar then marks the share that equal
            attention to all tokens of the documents would give.
        facts: Facts that are needed to repeat the run, by name, at the end of the page.
        links: Address of a further page on a sample, by sample id.
        most: Maximum number of samples on the page.

    Raises:
        ValueError: If the samples or lengths are not those of the sources.
    """
    require_kind(sources, AnswerSources, "sources", "scores.sources(heads)")
    if [sample.id for sample in samples] != list(sources.sample_ids):
        raise ValueError("the samples are not those of the sources, or in another order; give both in the same order")
    if lengths is not None and [len(one) for one in lengths] != [len(one) for one in sources.scores]:
        raise ValueError("lengths do not have one number of tokens per document; leave them out, or give all of them")
    title = title or f"Documents that {len(sources)} responses came from"
    cards = [
        _card(sources, samples[i], i, None if lengths is None else lengths[i], (links or {}).get(samples[i].id))
        for i in range(min(len(sources), most))
    ]
    left_out = f"<p>The page shows the first {most} of {len(sources)} samples.</p>" if len(sources) > most else ""
    findings = source_findings(sources.top, sources.top_shares, sources.margins)
    judged = [
        top in one.gold_indices
        for top, one in zip(sources.top, samples, strict=True)
        if one.gold_indices and top is not None
    ]
    if judged:
        findings.append(
            f"The source is a relevant document in {sum(judged)} of {len(judged)} responses to samples with one (★)."
        )
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<section><h2>Findings</h2><ul class="findings">{_items(findings)}</ul></section>',
        f'<section><h2>Answers</h2><p class="soft">{_legend(lengths is not None)}</p>{left_out}',
        "".join(cards) + "</section>",
        _facts(facts) if facts else "",
    ]
    html = page(title, "\n".join(filter(None, parts)), css=CSS + asset("answers.css"))
    return AttentionView(html, title, 900)


def _legend(has_lengths: bool) -> str:
    line = " The line on a bar marks the share of the document's tokens in the tokens of all documents." * has_lengths
    return (
        "A bar is the document's share of the attention that the response pays to all documents, averaged over the "
        f"response's tokens and over heads. ★ marks the document that is known to be relevant.{line}"
    )


def source_findings(tops: Sequence[int | None], top_shares: Sequence[float], margins: Sequence[float]) -> list[str]:
    """Findings on the sources of responses, one sentence each.

    Args:
        tops: Index of the source of each response; ``None`` for a response without a source.
        top_shares: Share of each source.
        margins: Share of each source minus the share of the next document.
    """
    known = [i for i, top in enumerate(tops) if top is not None]
    empty = len(tops) - len(known)
    findings: list[str] = []
    if known:
        shares = sorted(top_shares[i] for i in known)
        median = (shares[(len(shares) - 1) // 2] + shares[len(shares) // 2]) / 2
        findings.append(
            f"{len(known)} responses have a source. Its share of the attention to the documents has the median "
            f"{median:.0%}."
        )
        unclear = sum(margins[i] < _CLEAR for i in known)
        if unclear:
            findings.append(
                f"The source of {unclear} responses is unclear: the next document's share is less than "
                f"{100 * _CLEAR:.0f} percentage points below."
            )
        counts = Counter(top for top in tops if top is not None)
        if len(known) > 1:
            often = ", ".join(f"Document [{place + 1}]: {n}" for place, n in sorted(counts.items())[:12])
            findings.append(f"Number of responses per source: {often}.")
    if empty:
        findings.append(f"{empty} responses are empty, or pay no attention to any document, and have no source.")
    return findings


def _items(texts: Sequence[str]) -> str:
    return "".join(f"<li>{escape(text)}</li>" for text in texts)


def _card(
    sources: AnswerSources, sample: MultiDocSample, place: int, lengths: Sequence[int] | None, link: str | None
) -> str:
    """HTML of one sample."""
    top, shares = sources.top[place], sources.shares[place].tolist()
    even = [n / max(1, sum(lengths)) for n in lengths] if lengths is not None else [None] * len(shares)
    response = sources.responses[place].strip()
    answer = f"“{escape(response)}”" if response else "<em>an empty response</em>"
    if top is None:
        verdict = "no source"
    else:
        unclear = "unclear: " if sources.margins[place] < _CLEAR else ""
        ahead = f"{100 * sources.margins[place]:.0f} points ahead"
        verdict = f"{unclear}from Document [{top + 1}], {shares[top]:.0%}, {ahead}"
    more = f' <a href="{escape(link)}">token by token</a>' if link else ""
    bars = "".join(
        _bar(sample, document, share, expected, is_source=document == top)
        for document, (share, expected) in enumerate(zip(shares, even, strict=True))
    )
    return (
        f'<article class="card" id="answer-{place + 1}"><h3>{escape(sample.question)}</h3>'
        f'<p class="answer">{answer}</p><p class="soft">{verdict}{more}</p><ol class="bars">{bars}</ol></article>\n'
    )


def _bar(sample: MultiDocSample, document: int, share: float, even: float | None, *, is_source: bool) -> str:
    """HTML of one document with its bar."""
    content = sample.documents[document]
    name = shorten(content.title.strip() or content.text, 90)
    star = " ★" if document in sample.gold_indices else ""
    width = 0.0 if share != share else share  # NaN differs from itself
    shown = "-" if share != share else f"{share:.0%}"
    line = "" if even is None else f'<span class="even" style="left:{100 * even:.1f}%"></span>'
    mark = ' class="source"' if is_source else ""
    text = escape(shorten(content.text, _LONGEST_TEXT))
    return (
        f'<li{mark}><span class="number">{document + 1}</span><details><summary>{escape(name)}{star}</summary>'
        f'<p>{text}</p></details><span class="track" aria-hidden="true"><span class="fill" '
        f'style="width:{100 * width:.1f}%"></span>{line}</span><span class="number">{shown}</span></li>'
    )


def _facts(facts: Mapping[str, str]) -> str:
    lines = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts.items())
    return f'<section><h2>How it was made</h2><div class="card"><dl>{lines}</dl></div></section>'
