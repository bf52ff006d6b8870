"""Representations of results in a console and a notebook are short, informative, and safe for any text."""

from __future__ import annotations

import base64
import io
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import focuslens as fl
from focuslens.evaluation import DocumentScores, bootstrap_mean
from focuslens.heads import HeadList
from focuslens.util.html import Markup, bar, map_image, shorten, table
from tests.support.multidoc_files import oracle_record, write
from tests.support.pages import Elements, loads

HOSTILE = "</td></table><script>alert(1)</script>"


def scores(**changes: Any) -> fl.ContextualScores:
    relevant = torch.zeros(3, 2, 4)
    relevant[:, 1, 2], relevant[:, 0, 3] = torch.tensor([0.2, 0.4, 0.6]), 0.1
    fields: dict[str, Any] = {
        "relevant": relevant, "irrelevant": relevant / 2, "irrelevant_max": relevant / 4, "sink": 1 - relevant,
        "case": "long", "sample_ids": ("a@0", "b@1", "c@2"), "responses": (HOSTILE,) * 3,
        "correct": (True, False, True),
    }  # fmt: skip
    return fl.ContextualScores(**{**fields, **changes})


def evaluation(n: int = 4) -> fl.Evaluation:
    ids = tuple(f"{HOSTILE}{i}" for i in range(n))
    correct = tuple(i % 2 == 0 for i in range(n))
    return fl.Evaluation(ids, ids, (HOSTILE,) * n, correct, bootstrap_mean([float(one) for one in correct]))


def sweep() -> fl.Sweep:
    settings = (fl.Setting("baseline"), fl.Setting(HOSTILE, parameters={"tau": 0.1, "k": 2}))
    ids = ("0", "1")
    right = fl.Evaluation(ids, ids, ids, (True, True), bootstrap_mean([1.0, 1.0]))
    wrong = fl.Evaluation(ids, ids, ids, (False, True), bootstrap_mean([0.0, 1.0]))
    return fl.Sweep(settings, {"baseline": wrong, HOSTILE: right}, {})


def directions(key: bool = False) -> fl.FocusDirections:
    query = torch.tensor([[3.0, 4.0], [0.0, 1.0]])
    made = {"data": {"file": HOSTILE}, "losses": [[-0.1, -0.2], [-0.3, -0.25]]}
    return fl.FocusDirections([(1, 2), (0, 0)], query, query if key else None, "projection", made)


def sample() -> fl.MultiDocSample:
    documents = (fl.Document(HOSTILE, "x" * 500), fl.Document("t", HOSTILE))
    return fl.MultiDocSample(HOSTILE, (HOSTILE,), documents, 1, "q1")


@pytest.fixture
def data(tmp_path: Path) -> fl.MultiDocData:
    records = [oracle_record(i) | {"question": f"{HOSTILE}{i}"} for i in range(6)]
    return fl.load_multidoc(write(tmp_path / "oracle.jsonl", records), num_documents=2, gold_positions=(0,))


RESULTS = {
    "heads": lambda: HeadList([fl.Head(1, 2), fl.Head(0, 3)]),
    "many heads": lambda: HeadList(fl.Head(i, 0) for i in range(100)),
    "scores": scores,
    "scores of nothing": lambda: scores(relevant=torch.full((3, 2, 4), math.nan)),
    "directions": directions,
    "directions with keys": lambda: directions(key=True),
    "published directions": lambda: fl.FocusDirections([(0, 0)], torch.ones(1, 2)),
    "sample": sample,
    "evaluation": evaluation,
    "sweep": sweep,
}


@pytest.mark.parametrize("name", RESULTS)
def test_a_notebook_shows_results_safely_and_in_few_bytes(name: str):
    result = RESULTS[name]()
    html = result._repr_html_()
    assert len(html) < 25_000
    assert not loads(html)
    page = Elements(html)
    tags = {tag for tag, _ in page.elements}
    assert tags <= {
        "div",
        "b",
        "table",
        "thead",
        "tbody",
        "tr",
        "th",
        "td",
        "caption",
        "details",
        "summary",
        "span",
        "img",
    }
    assert html.count("<div") == html.count("</div>")
    assert html.count("<table") == html.count("</table>")
    # The table must be readable on any background: it sets no text colour and fills only bars.
    assert not re.search(r"(?<![-\w])color:", html)
    assert len(repr(result)) < 500
    assert "tensor(" not in repr(result)


def cells(html: str) -> list[list[str]]:
    rows = re.findall(r"<tr>(.*?)</tr>", html, flags=re.DOTALL)
    return [[Elements(cell).text for cell in re.findall(r"<t[hd] .*?</t[hd]>", row)] for row in rows]


def test_heads_are_listed_in_order_and_by_layer():
    heads = HeadList([fl.Head(3, 5), fl.Head(0, 1), fl.Head(3, 2)])
    assert repr(heads) == "[L3H5, L0H1, L3H2]"
    assert "1. L3H5 2. L0H1 3. L3H2" in heads._repr_html_()
    assert cells(heads._repr_html_()) == [["layer", "heads"], ["0", "H1"], ["3", "H2, H5"]]
    assert isinstance(heads[:2], HeadList)
    assert heads == [(3, 5), (0, 1), (3, 2)]
    assert heads[0] == fl.Head(3, 5)
    assert repr(HeadList(fl.Head(i, 0) for i in range(41))).endswith("L39H0, ... 41 heads]")
    assert isinstance(scores().top_heads(2), HeadList)
    assert isinstance(fl.random_heads(2, 4, 3), HeadList)
    assert isinstance(fl.rank_heads(torch.rand(2, 3)), HeadList)


def test_scores_are_shown_best_first():
    html = scores()._repr_html_()
    rows = cells(html)
    assert rows[0] == ["head", "relevant", "irrelevant", "irrelevant max", "sink"]
    assert rows[1] == ["L1H2", "0.400", "0.200", "0.100", "0.600"]
    assert "long: 3 samples, 2 answered right" in html
    assert "&gt; 0.2: 1 heads (12.5%), layers 1 to 1" in html
    assert repr(scores()) == (
        "ContextualScores(long: 3 samples, 2 answered right, 2 layers x 4 heads; "
        "best L1H2 0.400, L0H3 0.100, L0H0 0.000)"
    )
    assert "best" not in repr(scores(relevant=torch.full((3, 2, 4), math.nan)))


def test_a_map_of_heads_has_a_pixel_a_head():
    values = np.array([[0.0, 0.5], [1.0, math.nan], [0.25, 0.75]])
    image = map_image(values.tolist(), 'A "map"')
    (found,) = Elements(image).named("img")
    assert found["alt"] == 'A "map"'
    png = base64.b64decode((found["src"] or "").removeprefix("data:image/png;base64,"))
    pixels = np.asarray(Image.open(io.BytesIO(png)))
    assert pixels.shape == (3, 2, 3)
    assert pixels[0, 0].tolist() == [0, 34, 78]
    assert pixels[1, 0].tolist() == [254, 232, 56]
    assert pixels[1, 1].tolist() == [187, 187, 187]
    grey = pixels.astype(float) @ [0.299, 0.587, 0.114]
    assert grey[0, 0] < grey[2, 0] < grey[0, 1] < grey[2, 1] < grey[1, 0]


def test_directions_show_their_norms_and_what_training_did():
    rows = cells(directions(key=True)._repr_html_())
    assert rows[0] == ["head", "norm of d_Q", "norm of d_K", "score, first epoch", "score, last epoch"]
    assert rows[1] == ["L1H2", "5.000", "5.000", "0.100", "0.300"]
    assert repr(directions()) == (
        "FocusDirections(2 heads at the projection site, d_head 2, norms of d_Q 1.00 to 5.00: [L1H2, L0H0])"
    )
    assert cells(RESULTS["published directions"]()._repr_html_())[0] == ["head", "norm of d_Q"]


def test_a_sample_shows_its_documents_and_which_is_relevant(data: fl.MultiDocData):
    html = sample()._repr_html_()
    assert "2 documents, document 2 is relevant" in html
    rows = cells(html)
    assert [row[1] for row in rows[1:]] == ["", "★"]
    assert rows[1][3] == "x" * 239 + "…"
    assert rows[2][3] == HOSTILE
    short = repr(sample())
    assert "2 documents, gold_index=1, id='q1@1'" in short
    assert "x" * 10 not in short
    shown = data._repr_html_()
    assert not Elements(shown).named("script")
    assert [row[1] for row in cells(shown)[1:]] == [f"{HOSTILE}{i}" for i in range(3)]
    assert Elements(shown).text.startswith("MultiDocData('oracle.jsonl': 6 samples of 6 questions")


def test_evaluations_and_sweeps_show_their_intervals():
    one = evaluation(30)
    html = one._repr_html_()
    assert f"0.500 [{one.em.low:.3f}, {one.em.high:.3f}]" in html
    rows = cells(html)
    assert len(rows) == 1 + 20
    assert [row[1] for row in rows[1:3]] == ["right", "wrong"]
    assert repr(one).startswith("Evaluation(exact match 0.500 [")
    assert repr(one).endswith("15 of 30 samples right, 30 questions)")
    rows = cells(sweep()._repr_html_())
    assert rows[2] == [HOSTILE, "1.000 [1.000, 1.000]", "1", "0", "1"]
    assert rows[1][0] == "baseline"
    assert repr(sweep()).startswith("Sweep(2 settings on 2 samples: baseline 0.500 [0.000, 1.000], ")


def test_other_results_are_short_too(tiny_model: fl.FocusModel):
    assert re.fullmatch(r"FocusModel\('.*': \w+, 3 layers x 4 heads, d_head 16, float32 on cpu\)", repr(tiny_model))
    assert repr(fl.Generation("a b", torch.tensor([1, 2]), True)) == "Generation('a b', 2 tokens, finished=True)"
    budget = fl.AttentionBudget(torch.zeros(2, 3, 4, 6), ("a", "b"), ("", ""), (True, False))
    assert repr(budget) == "AttentionBudget(2 samples, 3 layers x 4 heads)"
    by_document = DocumentScores((torch.zeros(3, 4, 2),), (0,), ("a",), ("a",), ("",), (True,))
    assert repr(by_document) == "DocumentScores(1 samples, 1 answered right)"


# Building blocks


@given(st.text(max_size=30))
def test_text_stays_text(text: str):
    html = table((text,), [(text,), (Markup("<b>x</b>"),)])
    page = Elements(html)
    assert [tag for tag, _ in page.elements] == ["table", "thead", "tr", "th", "tbody", "tr", "td", "tr", "td", "b"]


@given(st.floats(0, 2), st.floats(0.1, 3))
def test_bars_stay_in_their_place(value: float, full: float):
    widths = [float(one) for one in re.findall(r"width:([\d.]+)%", bar(value, value / 2, value, full=full))]
    assert widths[0] == pytest.approx(100 * min(1, value / full), abs=0.06)
    assert all(0 <= width <= 100 for width in widths)


def test_pieces_take_what_is_not_there():
    assert bar(math.nan) == "-"
    assert Elements(table(("a",), [(math.nan,)])).text == "a-"
    assert table(("a",), []).count("<tr>") == 1
    assert shorten("a\n b   c", 3) == "a …"
    assert "width:0.0%" in bar(1.0, full=0)
