"""Attention views opened from disk in a real browser without network access: their content and their controls."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from focuslens import ResponseAttention, WindowAttention, viz

if TYPE_CHECKING:
    from tests.support.browser import Browser

HOSTILE = "</script><script>window.pwned = 1</script><img src=https://example.com/x.png onerror=window.pwned=2>"
PROMPT = ("<s>", "Write", " an", " answer", ".\n", "Document [1](", "red", " roof", "\n", "Document [2](", "blue",
          " gate", HOSTILE, "\n\nQuestion: ", "which", " gate", "?")  # fmt: skip
RED, BLUE, GATE = 6, 10, 11
SPANS = {"document": ((6, 8), (10, 13)), "relevant": ((10, 13),), "question": ((14, 17),)}


def look(name: str = "baseline", to: int = RED, response: tuple[str, ...] = (" blue", " & <b>")) -> ResponseAttention:
    """Attention of two heads.

    In the first response row, the first head puts 0.7 on token ``to``, and the second head puts 0.6 on the sink.
    """
    tokens = (*PROMPT, *response)
    rows = torch.full((2, len(response), len(tokens)), 0.2 / len(tokens))
    rows[0, 0, to], rows[0, 1, GATE], rows[1, 0, 0], rows[1, 1, 14] = 0.7, 0.6, 0.6, 0.5
    return ResponseAttention(rows, ("L0H1", "L3H<2>"), tokens, SPANS, "".join(response).strip(), name)


def window() -> WindowAttention:
    """Attention of two heads over six tokens.

    In every row, the first head attends to the row's own token, and the second head to the first token.
    """
    pattern = torch.stack([torch.eye(6), torch.zeros(6, 6)])
    pattern[1, :, 0] = 1
    return WindowAttention(pattern, ("L0H1", "L3H2"), ("<s>", *"abcd", HOSTILE), (0, 1, 2, 9, 10, 11), 12)


VIEWS = {
    "text": lambda: viz.text_view(look()),
    "compare": lambda: viz.compare_view(look(), look("steered", BLUE)),
    "documents": lambda: viz.document_view(look()),
    "tokens": lambda: viz.token_view(window()),
}


@pytest.fixture
def show(browser: Browser, tmp_path: Path):
    """Function that opens a view from disk. After the test, the page must have no errors and no requests."""

    def open_view(name: str, **settings: Any) -> Browser:
        browser.open(VIEWS[name]().save(tmp_path / f"{name}.html"), **settings)
        return browser

    yield open_view
    assert browser.problems() == []


def blueness(picture: np.ndarray) -> float:
    """Median over pixels of the blue minus the red channel, as a fraction of 1."""
    return float(np.median(picture[..., 2] - picture[..., 0]) / 255)


def token(browser: Browser, place: int, panel: int = 0) -> Any:
    return browser.all(f"section:nth-of-type({panel + 1}) .text b")[place]


# Browser logs


def test_the_browser_tells_of_requests_and_errors(browser: Browser, tmp_path: Path):
    inner = "&lt;img src=&quot;http://example.com/inner.png&quot;&gt;"
    page = tmp_path / "bad.html"
    page.write_text(
        f'<img src="https://example.com/outer.png"><iframe sandbox="allow-scripts" srcdoc="{inner}"></iframe>'
        "<script>null.x</script>"
    )
    browser.open(page)
    told: list[str] = []

    def everything() -> bool:
        told.extend(browser.problems())
        return {"https://example.com/outer.png", "http://example.com/inner.png"} <= set(told)

    browser.until(everything)
    assert any("Cannot read properties of null" in one for one in told)


@pytest.mark.parametrize("name", VIEWS)
@pytest.mark.parametrize("dark", [False, True])
def test_views_open_from_disk_and_keep_text_as_text(show, name: str, dark: bool):
    browser = show(name, dark=dark)
    browser.until(lambda: browser.all("option, canvas"))
    assert browser.run("return window.pwned") is None
    assert not browser.all("img")
    background = browser.run("return getComputedStyle(document.body).backgroundColor")
    assert background == ("rgb(20, 24, 29)" if dark else "rgb(255, 255, 255)")
    assert browser.text("h1")


@pytest.mark.parametrize("name", VIEWS)
def test_views_fit_a_phone(show, name: str):
    browser = show(name, width=390, height=800)
    browser.until(lambda: browser.all("option, canvas"))
    assert browser.overflow() <= 0


def test_a_long_prompt_with_many_heads_can_be_read(browser: Browser, tmp_path: Path):
    """A prompt of the page's design size is readable: 3,000 tokens, 20 heads and 12 response tokens."""
    rows = np.random.default_rng(0).random((20, 12, 3012)) ** 40
    rows /= rows.sum(-1, keepdims=True)
    tokens = tuple(f" word{i}" for i in range(3012))
    spans = {"document": tuple((10 + 140 * i, 140 + 140 * i) for i in range(20)), "relevant": ((1130, 1260),)}
    names = tuple(f"L{i}H{i}" for i in range(20))
    attention = ResponseAttention(torch.tensor(rows).float(), names, tokens, spans, "words", "baseline")
    browser.open(viz.text_view(attention, head=7, said=3).save(tmp_path / "long.html"))
    browser.until(lambda: len(browser.all("#head option")) == 21)
    browser.run("arguments[0].focus()", browser.one(".text"))
    browser.press("arrow_down")
    hottest = int(rows[7, 3].argmax())
    assert f"“ word{hottest}”, token {hottest}" in browser.text("#status")
    assert f"gets {rows[7, 3, hottest]:.3f} of the attention of L7H7" in browser.text("#status")
    bottom = token(browser, hottest).rect["y"] + token(browser, hottest).rect["height"]
    assert bottom <= browser.run("return scrollY + document.getElementById('status').getBoundingClientRect().y")
    assert blueness(browser.picture(token(browser, hottest))) > 0.5
    assert browser.problems() == []


# Text view


def test_a_token_says_what_it_gets_when_pointed_at(show):
    browser = show("text")
    browser.all("[role=radio]")[1].click()
    browser.choose("#head", "L0H1")
    browser.hover(token(browser, RED))
    said = browser.text("#status")
    assert "“red”, token 6 of Document [1], gets 0.700 of the attention of L0H1 from “ blue”" in said
    browser.hover(token(browser, GATE))
    assert "“ gate”, token 11 of Document [2] ★, gets 0.011" in browser.text("#status")
    browser.choose("#head", "L3H<2>")
    assert "of the attention of L3H<2>" in browser.text("#status")


def test_colours_follow_the_head_and_the_response_token(show):
    browser = show("text")
    browser.all("[role=radio]")[1].click()
    browser.choose("#head", "L0H1")
    hot, cold = (browser.picture(token(browser, place)) for place in (RED, 7))
    assert blueness(hot) > 0.5
    assert blueness(cold) < 0.2
    browser.choose("#head", "L3H<2>")
    assert blueness(browser.picture(token(browser, RED))) < 0.2
    browser.choose("#head", "L0H1")
    browser.all("[role=radio]")[2].click()
    assert blueness(browser.picture(token(browser, RED))) < 0.2
    assert blueness(browser.picture(token(browser, GATE))) > 0.5


def test_the_relevant_document_is_outlined(show):
    browser = show("text")
    (marked,) = browser.all(".text .marked")
    assert marked.text.replace("★ relevant ", "") == f"blue gate{HOSTILE}"
    assert marked.get_attribute("aria-label") == "Document [2], relevant"
    assert browser.run("return getComputedStyle(arguments[0]).outlineStyle", marked) == "solid"
    picture = browser.picture(browser.one(".text"))
    gold = np.abs(picture - [0xB3, 0x59, 0x00]).max(axis=-1) < 8
    assert gold.sum() > 100


def test_the_text_can_be_read_by_keyboard(show):
    browser = show("text")
    browser.run("arguments[0].focus()", browser.one("[role=radio][tabindex='0']"))
    browser.press("arrow_right")
    assert [button.get_attribute("aria-checked") for button in browser.all("[role=radio]")] == [
        "false",
        "true",
        "false",
    ]
    browser.choose("#head", "L0H1")
    browser.run("arguments[0].focus()", browser.one(".text"))
    browser.press("arrow_down")
    assert "“red”, token 6" in browser.text("#status")
    browser.press("arrow_right")
    assert "“ roof”, token 7" in browser.text("#status")
    browser.press("end")
    assert "token 18 of response" in browser.text("#status")
    assert [node.get_attribute("data-i") for node in browser.all(".text b.at")] == ["18"]


def test_the_parts_of_the_prompt_are_listed(show):
    browser = show("text")
    browser.all("[role=radio]")[1].click()
    browser.choose("#head", "L0H1")
    rows = [row.text.split("\n") for row in browser.all("#parts tbody tr")]
    shares = {row[0].rsplit(" ", 1)[0]: float(row[0].rsplit(" ", 1)[1]) for row in rows}
    small = 0.2 / 19
    assert shares == pytest.approx(
        {
            "sink": 2 * small,
            "Document [1]": 0.7 + small,
            "Document [2] ★": 3 * small,
            "question": 3 * small,
            "template": 7 * small,
            "response": 2 * small,
        },
        abs=6e-4,
    )


def test_the_mean_of_heads_and_tokens_stands_first(show):
    browser = show("text")
    assert [option.text for option in browser.all("#head option")] == ["mean of 2 heads", "L0H1", "L3H<2>"]
    browser.hover(token(browser, RED))
    mean = (0.7 + 3 * 0.2 / 19) / 4
    assert f"gets {mean:.3f} of the attention of mean of 2 heads from the response (mean)" in browser.text("#status")


# Comparison view


def test_before_and_after_stand_side_by_side(show):
    browser = show("compare")
    browser.choose("#head", "L0H1")
    left, right = browser.all("section")
    assert (left.rect["y"], left.rect["x"] < right.rect["x"]) == (right.rect["y"], True)
    for panel in (0, 1):
        browser.all(f"section:nth-of-type({panel + 1}) [role=radio]")[1].click()
    assert blueness(browser.picture(token(browser, RED, 0))) > 0.5 > blueness(browser.picture(token(browser, RED, 1)))
    assert blueness(browser.picture(token(browser, BLUE, 1))) > 0.5 > blueness(browser.picture(token(browser, BLUE, 0)))
    row = next(row for row in browser.all("#parts tbody tr") if "Document [2]" in row.text)
    before, after, change = (cell.text for cell in row.find_elements("css selector", "td")[:3])
    assert (float(before), float(after)) == pytest.approx((0.0316, 0.7211), abs=6e-4)
    assert change[0] == "+"
    assert float(change) == pytest.approx(0.6895, abs=6e-4)
    browser.hover(token(browser, BLUE, 1))
    assert browser.text("#status").startswith("steered: “blue”")


def test_before_and_after_stand_one_above_the_other_on_a_phone(show):
    browser = show("compare", width=390, height=800)
    above, below = browser.all("section")
    assert above.rect["y"] + above.rect["height"] <= below.rect["y"]


# Document view


def test_a_head_is_chosen_among_the_documents(show):
    browser = show("documents")
    assert [button.text for button in browser.all("#means tbody button")] == ["mean of 2 heads", "L0H1", "L3H<2>"]
    browser.all("#means tbody button")[1].click()
    assert browser.text("#tokens caption") == "L0H1, from every token of the response"
    cells = [cell.text for cell in browser.all("#tokens tbody tr:first-child > *")]
    assert cells == ["0  blue", "0.02", "0.71", "0.03", "0.03", "0.07", "0.02"]
    hot, cold = (browser.picture(browser.all("#tokens tbody tr:first-child td")[i]) for i in (1, 0))
    assert blueness(hot) > 0.5 > blueness(cold)
    browser.choose("#head", "L3H<2>")
    assert browser.text("#tokens caption").startswith("L3H<2>")
    pressed = [button.get_attribute("aria-pressed") for button in browser.all("#means button")]
    assert pressed == ["false", "false", "true"]


# Token view (circuitsvis)


def test_circuitsvis_draws_and_changes_heads_by_pointer_and_keyboard(show):
    browser = show("tokens")
    browser.until(lambda: len(browser.all("#view canvas")) >= 3)
    tiles = browser.until(lambda: browser.all("[role=button]"))
    assert [tile.get_attribute("aria-label") for tile in tiles] == ["Show head L0H1", "Show head L3H2"]
    zoomed = lambda: " ".join(heading.text for heading in browser.all("#view h3, #view h2"))  # noqa: E731
    assert "L0H1 Zoomed" in zoomed()
    tiles[1].click()
    browser.until(lambda: "L3H2 Zoomed" in zoomed())
    canvas = browser.all("#view canvas")[-1]
    first_column = hottest_column(browser.picture(canvas))
    browser.run("arguments[0].focus()", tiles[0])
    browser.press("enter")
    browser.until(lambda: "L0H1 Zoomed" in zoomed())
    # All of L3H2's attention is in the first column, and L0H1's is on the diagonal.
    browser.until(lambda: hottest_column(browser.picture(browser.all("#view canvas")[-1])) < first_column / 2)


def hottest_column(picture: np.ndarray) -> float:
    """Number of strongly blue pixels in the column that has most of them, as a fraction of the picture's height."""
    blue = (picture[..., 2] > 180) & (picture[..., 0] < 60) & (picture[..., 1] < 60)
    columns = blue.sum(axis=0)
    return float(columns.max() / picture.shape[0])


# Notebook cells


@pytest.mark.parametrize("name", VIEWS)
def test_a_cell_shows_the_view_and_keeps_it_apart(browser: Browser, tmp_path: Path, name: str):
    page = tmp_path / "notebook.html"
    page.write_text(f"<p>before</p>{VIEWS[name]()._repr_html_()}<script>window.mine = 1</script>", encoding="utf-8")
    browser.open(page)
    browser.driver.switch_to.frame(0)
    browser.until(lambda: browser.all("option, canvas"))
    assert browser.run("try { return parent.mine } catch (error) { return 'apart' }") == "apart"
    browser.driver.switch_to.default_content()
    assert browser.problems() == []
