"""Attention views and the report: what they show, and that they ask nothing of the network."""

from __future__ import annotations

import base64
import json
import re
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from focuslens import viz
from focuslens.viz.page import page

HOSTILE = "</script><script>alert(1)</script>"


class Elements(HTMLParser):
    """Every element with its attributes, and the text outside of scripts and styles."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.cdata_elem is None:
            self.text += data

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    plt.close("all")


def loads(html: str) -> list[str]:
    """Whatever a page would fetch from elsewhere, pages inside it included."""
    found = re.findall(r"""@import|url\(\s*['"]?(?!data:)[^)]+""", html)
    # Static and dynamic imports of modules by address; the bundled library has neither.
    found += re.findall(r"""(?:\bfrom|\bimport)\s*\(?\s*["'](?:https?:)?//[^"']+""", html)
    for tag, attributes in Elements(html).elements:
        for name in ("src", "href", "data", "poster", "action", "srcset"):
            value = attributes.get(name)
            if value and not value.startswith(("data:", "#")):
                found.append(f"{tag} {name}={value}")
        if attributes.get("srcdoc"):
            found += loads(attributes["srcdoc"] or "")
    return found


def stands_alone(html: str) -> bool:
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]+)"', html)
    return bool(policy) and policy.group(1).startswith("default-src 'none'") and not loads(html)


def test_the_check_for_foreign_loads_finds_them():
    for bad in (
        '<script src="https://a.b/c.js"></script>',
        '<link href="//a.b/c.css">',
        "<style>@import 'x'</style>",
        '<script type="module">import { render } from "https://a.b/c.js"</script>',
        '<iframe srcdoc="&lt;img src=&quot;x.png&quot;&gt;"></iframe>',
    ):
        assert loads(bad), bad
    assert not stands_alone("<p>no policy</p>")
    assert stands_alone(page("t", "<p>x</p>"))


# Attention between tokens


def causal_pattern(n_heads: int, n_tokens: int, seed: int = 0) -> np.ndarray:
    pattern = np.tril(np.random.default_rng(seed).random((n_heads, n_tokens, n_tokens)))
    return pattern / pattern.sum(-1, keepdims=True)


def drawn(view: viz.AttentionView) -> dict[str, Any]:
    """What the page's script hands to circuitsvis."""
    call = re.search(r'CircuitsVis\.render\(\s*"attention",\s*CircuitsVis\.AttentionHeads,\s*(\{.*\})\s*\)', view.html)
    assert call, "the page does not call circuitsvis"
    return json.loads(call.group(1))


def test_attention_view_draws_the_pattern_it_was_given():
    pattern = causal_pattern(2, 5)
    props = drawn(viz.attention_view(["a", " b", "\n", " d", "e"], pattern, ["L0H1", "L3H2"]))
    np.testing.assert_allclose(np.array(props["attention"]), pattern, atol=0.0005)
    assert props["tokens"] == ["a", " b", "⏎", " d", "e"]
    assert props["attentionHeadNames"] == ["L0H1", "L3H2"]
    assert (props["minValue"], props["maxValue"]) == (0.0, pattern.max())


def test_attention_view_rounds_to_keep_the_page_small():
    view = viz.attention_view(["a"] * 60, causal_pattern(4, 60), list("wxyz"))
    (numbers,) = re.findall(r'"attention": (\[.*?\]\]\])', view.html)
    assert max(len(number) for number in re.findall(r"[\d.]+", numbers)) <= len("0.123")
    assert not re.search(r"\b0\.0[,\]]", numbers)


def test_attention_view_stands_alone_in_a_file_and_in_a_notebook(tmp_path: Path):
    view = viz.attention_view(list("abc"), causal_pattern(1, 3), ["L0H0"])
    assert view.html.startswith("<!DOCTYPE html>")
    assert stands_alone(view.html)
    saved = view.save(tmp_path / "deep" / "view.html")
    assert saved.read_text(encoding="utf-8") == view.html
    assert [file.name for file in saved.parent.iterdir()] == ["view.html"]

    cell = view._repr_html_()
    (frame,) = Elements(cell).named("iframe")
    assert frame["srcdoc"] == view.html
    assert not loads(cell)


def test_attention_view_is_the_same_for_the_same_input():
    views = [viz.attention_view(list("abc"), causal_pattern(1, 3), ["L0H0"]) for _ in range(2)]
    assert views[0].html == views[1].html


def test_a_token_cannot_end_the_script_that_holds_it():
    token = "</script><b>x"
    view = viz.attention_view([token, HOSTILE], causal_pattern(1, 2), [HOSTILE])
    assert len(Elements(view.html).named("script")) == 1
    assert not Elements(view.html).named("b")
    props = drawn(view)
    assert props["tokens"] == [token, HOSTILE[:23] + "…"]
    assert props["attentionHeadNames"] == [HOSTILE]


def test_attention_view_takes_tensors_and_the_last_rows_only():
    pattern = torch.tensor(causal_pattern(2, 6)).to(torch.bfloat16)
    props = drawn(viz.attention_view(list("abcdef"), pattern[:, -2:], ["x", "y"]))
    shown = np.array(props["attention"])
    assert not shown[:, :4].any()
    np.testing.assert_allclose(shown[:, 4:], pattern[:, 4:].float().numpy(), atol=0.0005)


@settings(max_examples=40)  # each is a page of more than a megabyte
@given(st.data())
def test_a_window_shows_that_part_of_the_pattern(data: st.DataObject):
    n_tokens = data.draw(st.integers(1, 9))
    n_rows = data.draw(st.integers(1, n_tokens))
    start = data.draw(st.integers(0, n_tokens - 1))
    end = data.draw(st.integers(start + 1, n_tokens))
    pattern = causal_pattern(1, n_tokens)
    expected = np.zeros((end - start, end - start))
    for row in range(start, end):
        for column in range(start, end):
            if row >= n_tokens - n_rows:
                expected[row - start, column - start] = pattern[0, row, column]
    tokens = [str(i) for i in range(n_tokens)]
    view = viz.attention_view(tokens, pattern[:, n_tokens - n_rows :], ["x"], window=(start, end))
    assert drawn(view)["tokens"] == tokens[start:end]
    np.testing.assert_allclose(np.array(drawn(view)["attention"])[0], expected, atol=0.0005)


def test_a_long_text_shows_its_end_and_says_so():
    tokens = [str(i) for i in range(10)]
    view = viz.attention_view(tokens, causal_pattern(1, 10), ["x"], max_tokens=4)
    assert drawn(view)["tokens"] == ["6", "7", "8", "9"]
    assert "tokens 6 to 9 of 0 to 9" in Elements(view.html).text
    whole = viz.attention_view(tokens, causal_pattern(1, 10), ["x"], max_tokens=10)
    assert "left out" not in Elements(whole.html).text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": ["a", "b"]}, r"shape \(1, 3, 3\) .* for 2 tokens"),
        ({"head_names": ["x", "y"]}, "1 heads and there are 2 head names"),
        ({"pattern": np.full((1, 3, 3), np.nan)}, "NaN"),
        ({"pattern": np.full((1, 3, 3), -1.0)}, "negative"),
        ({"pattern": np.zeros((1, 0, 3))}, "no more queries"),
        ({"window": (2, 2)}, r"window \(2, 2\) is not inside 3 tokens"),
        ({"window": (0, 4)}, r"window \(0, 4\)"),
        ({"window": (0, 3), "max_tokens": 2}, "3 tokens, more than max_tokens = 2"),
    ],
)
def test_attention_view_refuses_what_does_not_fit(changes: dict[str, Any], message: str):
    arguments: dict[str, Any] = {"tokens": list("abc"), "pattern": causal_pattern(1, 3), "head_names": ["x"], **changes}
    with pytest.raises(ValueError, match=message):
        viz.attention_view(**arguments)


# Attention onto documents


@given(st.data())
def test_pool_attention_is_a_sum_over_each_span(data: st.DataObject):
    n_keys = data.draw(st.integers(1, 12))
    rows = torch.rand(2, 3, n_keys, dtype=torch.float64, generator=torch.Generator().manual_seed(n_keys))
    starts = data.draw(st.lists(st.integers(0, n_keys - 1), max_size=4))
    spans = [(start, data.draw(st.integers(start + 1, n_keys))) for start in starts]
    pooled = viz.pool_attention(rows, spans)
    assert pooled.shape == (2, 3, len(spans))
    for head in range(2):
        for query in range(3):
            for unit, (start, end) in enumerate(spans):
                expected = sum(float(rows[head, query, key]) for key in range(start, end))
                assert float(pooled[head, query, unit]) == pytest.approx(expected, abs=1e-12)


def test_pool_attention_adds_up_half_precision_in_single():
    rows = torch.full((1, 1, 4096), 1 / 4096, dtype=torch.bfloat16)
    pooled = viz.pool_attention(rows, [(0, 4096)])
    assert pooled.dtype == torch.float32
    assert float(pooled) == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("span", [(2, 2), (3, 1), (-1, 2), (0, 5)])
def test_pool_attention_refuses_spans_outside_the_keys(span: tuple[int, int]):
    with pytest.raises(ValueError, match=re.escape(f"span 1 = {span}")):
        viz.pool_attention(torch.rand(1, 1, 4), [(0, 1), span])


def heat_tables(html: str) -> list[list[list[str]]]:
    """The text of every cell, by table and row; headings included."""
    tables = re.findall(r"<table>(.*?)</table>", html, flags=re.DOTALL)
    rows = [re.findall(r"<tr>(.*?)</tr>", table, flags=re.DOTALL) for table in tables]
    cell = re.compile(r"<t[hd][^>]*>(.*?)</t[hd]>", flags=re.DOTALL)
    return [[[unescape(text) for text in cell.findall(row)] for row in table] for table in rows]


def test_document_view_shows_means_then_every_response_token():
    attention = np.array([[[0.1, 0.9], [0.3, 0.5]], [[0.0, 0.2], [1.0, 0.0]]])
    view = viz.document_view(
        ["sink", "Document [1]"], attention, ["L0H0", "L2H1"], response=[" a", HOSTILE], marked=[1]
    )
    means, first, second = heat_tables(view.html)
    assert means == [["", "sink", "Document [1] ★"], ["L0H0", "0.20", "0.70"], ["L2H1", "0.50", "0.10"]]
    assert [row[1:] for row in first[1:]] == [["0.10", "0.90"], ["0.30", "0.50"]]
    assert [row[1:] for row in second[1:]] == [["0.00", "0.20"], ["1.00", "0.00"]]
    assert first[1][0] == "0  a"
    assert not Elements(view.html).named("script")
    assert stands_alone(view.html)
    # Colour goes by the largest value of a table: 0.70 is as dark as it gets, 0.50 is not.
    assert '<td style="--a:1.00" class="strong">0.70</td>' in view.html
    assert '<td style="--a:0.71" class="strong">0.50</td>' in view.html
    assert '<td style="--a:0.14">0.10</td>' in view.html


def test_document_view_takes_tensors_without_tokens():
    view = viz.document_view(["a"], torch.zeros(1, 2, 1), ["x"])
    assert heat_tables(view.html)[1] == [["", "a"], ["0 ", "0.00"], ["1 ", "0.00"]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": ["a"]}, r"shape \(1, 2, 2\); for these names it must be \(1, 2, 1\)"),
        ({"head_names": []}, r"must be \(0, 2, 2\)"),
        ({"response": ["x"]}, r"must be \(1, 1, 2\)"),
        ({"attention": np.zeros((1, 0, 2))}, "none of them 0"),
        ({"attention": np.full((1, 2, 2), np.nan)}, "NaN"),
        ({"marked": [2]}, "marked unit 2 does not exist: there are 2"),
        ({"marked": [-1]}, "marked unit -1"),
    ],
)
def test_document_view_refuses_what_does_not_fit(changes: dict[str, Any], message: str):
    arguments: dict[str, Any] = {"labels": ["a", "b"], "attention": np.ones((1, 2, 2)), "head_names": ["x"], **changes}
    with pytest.raises(ValueError, match=message):
        viz.document_view(**arguments)


# The report


def test_a_report_holds_everything_and_loads_nothing(tmp_path: Path):
    picture = viz.save_figure(viz.head_map(np.eye(3)), tmp_path / "map.png")
    view = viz.attention_view(list("abc"), causal_pattern(1, 3), ["L0H0"])
    table = viz.Table("Scores <share>", ("head", "relevant", "n"), (("L0H0", 0.12345, 40), ("<i>", 0.5, 1)))
    path = viz.write_report(
        tmp_path / "out" / "report.html",
        title="A & B",
        facts={"model": HOSTILE, "seed": "0"},
        findings=["5 <b> 6"],
        tables=[table],
        figures=[('Heads "here"', picture)],
        views=[("One head", view)],
    )
    html = path.read_text(encoding="utf-8")
    assert stands_alone(html)
    found = Elements(html)
    for text in ("A & B", HOSTILE, "5 <b> 6", "Scores <share>", "0.123", "40", "<i>", 'Heads "here"', "One head"):
        assert text in found.text, text
    assert "0.12345" not in found.text
    assert not found.named("script")
    assert not found.named("i")
    (image,) = found.named("img")
    assert base64.b64decode((image["src"] or "").removeprefix("data:image/png;base64,")) == picture.read_bytes()
    assert image["alt"] == 'Heads "here"'
    (frame,) = found.named("iframe")
    assert frame["srcdoc"] == view.html
    assert "prefers-color-scheme: dark" in html
    assert 'name="viewport"' in html
    assert re.findall(r"<h2>(.*?)</h2>", html) == ["Findings", "Figures", "Numbers", "Attention", "How it was made"]
    assert [file.name for file in path.parent.iterdir()] == ["report.html"]


def test_a_report_leaves_out_what_it_has_nothing_for(tmp_path: Path):
    path = viz.write_report(tmp_path / "report.html", title="t", facts={}, findings=["x"])
    assert re.findall(r"<h2>(.*?)</h2>", path.read_text()) == ["Findings"]


def test_numbers_and_their_headings_are_on_the_right(tmp_path: Path):
    table = viz.Table("c", ("name", "value"), (("a", 1), ("b", 2.0)))
    html = viz.write_report(tmp_path / "r.html", title="t", facts={}, findings=[], tables=[table]).read_text()
    assert '<tr><th>name</th><th class="number">value</th></tr>' in html
    assert '<tr><td>b</td><td class="number">2.000</td></tr>' in html


def test_a_small_number_is_not_shown_as_nothing(tmp_path: Path):
    values = (0.0, 0.0005, 0.0004, -0.000123, 2.8e-14, 1 / 3)
    table = viz.Table("c", ("value",), tuple((value,) for value in values))
    html = viz.write_report(tmp_path / "r.html", title="t", facts={}, findings=[], tables=[table]).read_text()
    shown = re.findall(r'<td class="number">(.*?)</td>', html)
    assert shown == ["0.000", "0.001", "0.0004", "-0.00012", "2.8e-14", "0.333"]


def test_a_report_that_fails_leaves_the_old_one(tmp_path: Path):
    path = tmp_path / "report.html"
    path.write_text("old")
    (tmp_path / "not.png").write_text("text")
    with pytest.raises(ValueError, match=r"not\.png is not a PNG"):
        viz.write_report(path, title="t", facts={}, findings=[], figures=[("c", tmp_path / "not.png")])
    with pytest.raises(FileNotFoundError):
        viz.write_report(path, title="t", facts={}, findings=[], figures=[("c", tmp_path / "none.png")])
    assert path.read_text() == "old"


def test_a_table_is_checked():
    with pytest.raises(ValueError, match=r"row 1 of table 'c' has 1 cells for 2 columns: \('x',\)"):
        viz.Table("c", ("a", "b"), (("x", 1), ("x",)))
