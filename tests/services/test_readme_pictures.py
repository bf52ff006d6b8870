"""The command that draws the README's pictures: its error messages, and screenshots of a page."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image

pictures = pytest.importorskip("readme_pictures", reason="the experiments are not here")

if TYPE_CHECKING:
    from tests.support.browser import Browser


def test_it_says_what_it_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "argv", ["readme_pictures.py", "--run", str(tmp_path)])
    with pytest.raises(SystemExit, match=f"run this first: focuslens demo --out {tmp_path}"):
        pictures.main()
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit, match=r"found none of chromium, .* apt-get install chromium"):
        pictures.screenshot(tmp_path / "page.html", tmp_path / "page.png", 100, 100)
    assert list(tmp_path.iterdir()) == []


def test_a_picture_is_of_the_page_as_its_scripts_leave_it(browser: Browser, tmp_path: Path):
    page = tmp_path / "page.html"
    page.write_text(
        "<body style='margin:0;background:#fff'><div id=a style='height:60px'></div>"
        "<script>setTimeout(() => { document.getElementById('a').style.background = '#0072b2' }, 500)</script>"
    )
    pictures.screenshot(page, tmp_path / "docs" / "page.png", 500, 300)
    picture = np.asarray(Image.open(tmp_path / "docs" / "page.png").convert("RGB")).astype(int)
    assert picture.shape == (450, 750, 3)  # scaled by 1.5
    assert np.abs(picture[:85] - [0, 0x72, 0xB2]).max() <= 2
    assert (picture[95:] == 255).all()
