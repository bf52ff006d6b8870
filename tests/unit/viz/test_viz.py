"""Attention views and the report: their content, and no network requests."""

from __future__ import annotations

import base64
import dataclasses
import json
import re
from collections.abc import Callable
from html import unescape
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import Float

from focuslens import ResponseAttention, UnitAttention, WindowAttention, viz
from focuslens.viz.packing import PackedRows, pack_rows
from focuslens.viz.page import page
from tests.support.pages import Elements, data_of, loads, stands_alone

HOSTILE = "</script><script>alert(1)</script>"


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    plt.close("all")


def test_the_check_for_foreign_loads_finds_them():
    for bad in (
        '<script src="https://a.b/c.js"></script>',
        '<link href="//a.b/c.css">',
        "<style>@import 'x'</style>",
        '<script type="module">import { render } from "https://a.b/c.js"</script>',
        '<iframe srcdoc="&lt;img src=&quot;x.png&quot;&gt;"></iframe>',
        '<a href="https://a.b/c"></a>',
    ):
        assert loads(bad), bad
    assert not stands_alone("<p>no policy</p>")
    assert stands_alone(page("t", '<p>x</p><a href="#x"></a><a href="data/x.csv"></a>'))


def test_viz_is_there_when_it_is_asked_for():
    import focuslens as fl

    assert fl.viz is viz
    assert "viz" not in fl.__all__  # otherwise a star import would import plotting libraries
    with pytest.raises(AttributeError, match="'focuslens' has no attribute 'vizz'"):
        fl.vizz  # noqa: B018  # pyright: ignore[reportAttributeAccessIssue]


# Attention between tokens


def causal_pattern(n_heads: int, n_tokens: int, seed: int = 0) -> np.ndarray:
    pattern = np.tril(np.random.default_rng(seed).random((n_heads, n_tokens, n_tokens)))
    return pattern / pattern.sum(-1, keepdims=True)


def drawn(view: viz.AttentionView) -> dict[str, Any]:
    """Properties that the page's script passes to circuitsvis."""
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
    plain = viz.attention_view(["a", "b"], causal_pattern(1, 2), ["x"])
    assert len(Elements(view.html).named("script")) == len(Elements(plain.html).named("script"))
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


@settings(max_examples=40)  # each example is a page of more than a megabyte
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


# Attention to documents, and in the text


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


def looked(n_prompt: int, n_heads: int, n_said: int, *, seed: int = 0, spread: float = 1.0) -> ResponseAttention:
    """Random attention to twenty documents, a question and a template. A larger ``spread`` evens it out."""
    rng = np.random.default_rng(seed)
    rows = rng.random((n_heads, n_said, n_prompt + n_said)) ** (1 / spread)
    for row in range(n_said):
        rows[:, row, n_prompt + row + 1 :] = 0
    rows /= rows.sum(-1, keepdims=True)
    size = (n_prompt - 40) // 20
    documents = tuple((10 + i * size, 8 + (i + 1) * size) for i in range(20))
    spans = {"document": documents, "relevant": documents[7:8], "question": ((n_prompt - 20, n_prompt - 5),)}
    tokens = tuple(f" token{i % 997}" for i in range(n_prompt + n_said))
    names = tuple(f"L{i}H{i}" for i in range(n_heads))
    return ResponseAttention(torch.tensor(rows).float(), names, tokens, spans, "a response", "baseline")


def drawn_rows(panel: dict[str, Any]) -> np.ndarray:
    """Attention of a panel, decoded as in the page's script: column steps, and values in units of 1/65,535."""
    counts, steps, values = (
        np.frombuffer(base64.b64decode(panel["rows"][name]), kind)
        for name, kind in (("counts", "<u4"), ("steps", "u1"), ("values", "<u2"))
    )
    rows = np.zeros((len(counts), len(panel["tokens"])))
    entry = 0
    for row, count in zip(rows, counts, strict=True):
        at = -1
        for _ in range(count):
            at += int(steps[entry])
            row[at] = int(values[entry]) / 65535
            entry += 1
    assert entry == len(steps) == len(values)
    return rows


VIEWS: dict[str, Callable[[ResponseAttention], viz.AttentionView]] = {
    "text": viz.text_view,
    "compare": lambda attention: viz.compare_view(attention, attention),
    "documents": viz.document_view,
}


@pytest.mark.parametrize("name", VIEWS)
@pytest.mark.parametrize("spread", [0.02, 100.0])
def test_a_page_of_3000_tokens_and_20_heads_stays_below_5_megabytes(name: str, spread: float):
    for n_said in (12, 100):
        view = VIEWS[name](looked(3000, 20, n_said, spread=spread))
        assert len(view.html.encode()) < 5_000_000
        assert stands_alone(view.html)


def test_a_window_of_20_heads_stays_below_5_megabytes():
    n = 160  # maximum of `window_attention` for 20 heads
    window = WindowAttention(
        torch.tensor(causal_pattern(20, n)), tuple(map(str, range(20))), ("x",) * n, tuple(range(n)), 3000, 7
    )
    view = viz.token_view(window)
    assert len(view.html.encode()) < 5_000_000
    assert "7 tokens of the chosen spans did not fit" in Elements(view.html).text
    assert "tokens 0 to 159 of the text" in Elements(view.html).text


def test_documents_stay_light():
    assert len(viz.document_view(looked(3000, 20, 20)).html) < 150_000


@pytest.mark.parametrize("n_heads", [1, 3])
def test_the_text_view_holds_the_attention_and_its_means(n_heads: int):
    attention = looked(300, n_heads, 4)
    data = data_of(viz.text_view(attention).html)
    (panel,) = data["panels"]
    rows = attention.rows.double().numpy()
    heads = [*(["mean of 3 heads"] if n_heads > 1 else []), *attention.head_names]
    assert data["heads"] == heads
    found = drawn_rows(panel).reshape(len(heads), 5, 304)
    if n_heads > 1:
        np.testing.assert_allclose(found[0, 1:], rows.mean(axis=0), atol=1e-5)
        np.testing.assert_allclose(found[0, 0], rows.mean(axis=(0, 1)), atol=1e-5)
    np.testing.assert_allclose(found[-n_heads:, 1:], rows, atol=1e-5)
    np.testing.assert_allclose(found[-n_heads:, 0], rows.mean(axis=1), atol=1e-5)
    assert panel["tokens"] == list(attention.tokens)
    assert panel["response"] == ["all (mean)", *attention.response]
    # Full colour stands for the largest value outside the sink, for each choice of heads.
    np.testing.assert_allclose(data["tops"][-1], [found[-1, 0, 2:300].max(), found[-1, 1:, 2:300].max()], atol=1e-4)


def test_what_is_left_out_of_a_text_is_the_smallest_and_is_said():
    attention = looked(3000, 20, 100, spread=0.2)
    view = viz.text_view(attention)
    everything = drawn_rows(data_of(view.html)["panels"][0]).reshape(21, 101, 3100)
    found, rows = everything[1:, 1:], attention.rows.double().numpy()
    shown = found > 0
    np.testing.assert_allclose(found[shown], rows[shown], atol=1e-5)
    for head, row in ((0, 0), (19, 99)):
        assert rows[head, row][~shown[head, row]].max() <= rows[head, row][shown[head, row]].min() + 1e-5
    said = re.search(r"every row shows at least ([\d.]+)% of its sum", Elements(view.html).text)
    assert said
    assert float(said.group(1)) / 100 == pytest.approx(everything.sum(-1).min(), abs=0.02)
    assert "left out" not in Elements(viz.text_view(looked(300, 2, 4)).html).text


@pytest.mark.parametrize("name", ["text", "documents"])
def test_parts_of_the_prompt_are_shown_with_what_they_get(name: str):
    attention = looked(300, 2, 3)
    (panel,) = data_of(VIEWS[name](attention).html)["panels"]
    rows = attention.rows.double().numpy()
    unit = panel["units"].index("Document [8]")
    assert panel["marked"] == [unit]
    start, end = attention.spans["relevant"][0]
    shares = np.array(panel["shares"])[..., unit] / 10_000
    np.testing.assert_allclose(shares[1:, 1:], rows[:, :, start:end].sum(-1), atol=1e-4)
    np.testing.assert_allclose(shares[1:, 0], rows[:, :, start:end].sum(-1).mean(-1), atol=1e-4)
    np.testing.assert_allclose(shares[0, 0], rows[:, :, start:end].sum(-1).mean(), atol=1e-4)


def test_text_cannot_end_the_data_that_holds_it():
    attention = looked(200, 2, 2)
    tokens = (HOSTILE, "<!--<script>", "\u2028", *attention.tokens[3:])
    hostile = ResponseAttention(attention.rows, ("<b>", "&amp;"), tokens, attention.spans, HOSTILE, HOSTILE)
    for name, draw in VIEWS.items():
        page, plain = Elements(draw(hostile).html), Elements(draw(attention).html)
        assert page.elements[-1] == plain.elements[-1], name
        assert [tag for tag, _ in page.elements] == [tag for tag, _ in plain.elements], name
        assert data_of(draw(hostile).html)["heads"][1:] == ["<b>", "&amp;"]
    assert data_of(viz.text_view(hostile).html)["panels"][0]["tokens"][:3] == [HOSTILE, "<!--<script>", "\u2028"]


def test_one_text_is_read_first_and_of_two_the_table():
    attention = looked(200, 2, 2)
    one, two = viz.text_view(attention).html, viz.compare_view(attention, attention).html
    assert one.index('id="panels"') < one.index('id="parts"') < one.index('id="status"')
    assert two.index('id="parts"') < two.index('id="panels"') < two.index('id="status"')


def test_a_view_can_begin_with_a_head_and_a_token():
    data = data_of(viz.text_view(looked(200, 3, 2), head=1, said=0).html)
    assert (data["head"], data["panels"][0]["said"]) == (2, 1)
    single = data_of(viz.text_view(looked(200, 1, 2), head=0, said=1).html)
    assert (single["heads"], single["head"], single["panels"][0]["said"]) == (["L0H0"], 0, 2)
    with pytest.raises(ValueError, match="no head 3: there are 3"):
        viz.text_view(looked(200, 3, 2), head=3)
    with pytest.raises(ValueError, match="no response token -1"):
        viz.text_view(looked(200, 3, 2), said=-1)


def test_only_the_same_prompt_and_heads_stand_side_by_side():
    before = looked(200, 2, 2)
    longer = looked(200, 2, 3, seed=1)
    data = data_of(viz.compare_view(before, longer).html)
    assert [len(panel["response"]) for panel in data["panels"]] == [3, 4]
    each = [data_of(viz.text_view(one).html)["tops"] for one in (before, longer)]
    np.testing.assert_array_equal(data["tops"], np.maximum(*each))  # one scale for both panels
    for what, other in (
        ("prompt", dataclasses.replace(before, tokens=("x", *before.tokens[1:]))),
        ("parts", dataclasses.replace(before, spans={})),
        ("heads", dataclasses.replace(before, head_names=("x", "y"))),
    ):
        with pytest.raises(ValueError, match=f"do not have the same {what}"):
            viz.compare_view(before, other)


def test_documents_are_there_without_a_script():
    shares = torch.tensor([[[0.1, 0.9], [0.3, 0.5]], [[0.0, 0.2], [1.0, 0.0]]])
    units = UnitAttention(("sink", "Document [1]"), shares, ("L0H0", "L2<H1>"), (" a", HOSTILE), (1,))
    page = viz.document_view(units).html
    (table,) = re.findall(r"<table[^>]*>(.*?)</table>", page, flags=re.DOTALL)
    rows = re.findall(r"<tr>(.*?)</tr>", table, flags=re.DOTALL)
    cells = [[unescape(one) for one in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row)] for row in rows]
    assert cells == [
        ["head", "sink", "Document [1] ★"],
        ["mean of 2 heads", "0.35", "0.40"],
        ["L0H0", "0.20", "0.70"],
        ["L2<H1>", "0.50", "0.10"],
    ]
    # The colour scale ends at the largest value of the table.
    assert '<td class="heat strong" style="--a:1.00">0.70</td>' in page
    assert '<td class="heat" style="--a:0.14">0.10</td>' in page


# Packing


def unpack_rows(packed: PackedRows, n_columns: int) -> Float[np.ndarray, "row {n_columns}"]:
    """Rows as the page's script decodes them, with 0 for omitted entries."""
    rows = np.zeros((len(packed.counts), n_columns))
    start = 0
    for row, count in zip(rows, packed.counts.tolist(), strict=True):
        columns = np.cumsum(packed.steps[start : start + count].astype(np.int64)) - 1
        row[columns] = packed.values[start : start + count] / 65535
        start += count
    return rows


@given(st.data())
def test_packed_rows_are_what_they_were(data: st.DataObject):
    n_rows, n_columns = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 1200))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    rows = rng.random((n_rows, n_columns)) * (rng.random((n_rows, n_columns)) < data.draw(st.sampled_from([0.002, 1])))
    packed = pack_rows(rows, 10**9)
    np.testing.assert_allclose(unpack_rows(packed, n_columns), rows, atol=1e-5)
    assert packed.kept == 1
    cut = pack_rows(rows, 0)  # eight entries per row
    shown = unpack_rows(cut, n_columns)
    levels = np.round(rows * 65535)
    for row, level, kept in zip(shown, levels, np.minimum((levels > 0).sum(1), 8), strict=True):
        assert (row > 0).sum() == kept
        assert np.sort(np.round(row[row > 0] * 65535)).tolist() == np.sort(level)[::-1][:kept][::-1].tolist()


def test_packing_keeps_to_the_size_it_is_given():
    rows = np.full((50, 3000), 1 / 3000)
    packed = pack_rows(rows, 200_000)
    assert sum(map(len, packed.to_json().values())) < 210_000
    assert packed.kept == pytest.approx(1 / 3, abs=0.01)


# Report page


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
