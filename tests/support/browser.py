"""A headless Chromium without network access that records a page's requests and console errors."""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import numpy as np
import pytest
from PIL import Image

__all__ = ["Browser", "chromium", "found", "required"]

_BROWSERS = ("chromium", "chromium-browser", "google-chrome")
_DRIVERS = ("chromedriver", "chromium.chromedriver")
_SECONDS = 20
"""Seconds before an operation on a page times out; machines for continuous integration are slow."""

T = TypeVar("T")


def required() -> bool:
    """Whether a missing browser is an error: true where one was installed for tests, so that no test is skipped."""
    return os.environ.get("FOCUSLENS_TEST_BROWSER") == "required"


def found() -> tuple[str, str] | None:
    """Paths of Chromium and its driver, or ``None`` if one of them is missing.

    Both are taken from ``PATH``. A distribution's packages of the two have matching versions.
    """
    paths = [next(filter(None, map(shutil.which, names)), None) for names in (_BROWSERS, _DRIVERS)]
    return None if None in paths else (str(paths[0]), str(paths[1]))


class Browser:
    """One browser window.

    Args:
        driver: Selenium WebDriver.
    """

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def open(self, page: Path | str, *, width: int = 1200, height: int = 900, dark: bool = False) -> None:
        """Open a file or URL with the given window size and colour scheme, and discard earlier :meth:`problems`."""
        self.problems()
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme})
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        self.driver.get(page.as_uri() if isinstance(page, Path) else page)
        self.until(lambda: self.run("return document.readyState") == "complete")

    def run(self, script: str, *arguments: Any) -> Any:
        """Value that a script returns when it is run in the page."""
        return self.driver.execute_script(script, *arguments)

    def all(self, selector: str) -> list[Any]:
        """All elements that match a CSS selector."""
        return self.driver.find_elements("css selector", selector)

    def one(self, selector: str) -> Any:
        """First element that matches a CSS selector."""
        return self.driver.find_element("css selector", selector)

    def text(self, selector: str) -> str:
        """Text of the first element that matches a CSS selector, even if the element is hidden."""
        return str(self.run("return arguments[0].textContent", self.one(selector)))

    def hover(self, element: Any) -> None:
        """Move the pointer onto an element."""
        from selenium.webdriver import ActionChains

        self.run("arguments[0].scrollIntoView({block: 'center'})", element)
        ActionChains(self.driver).move_to_element(element).perform()

    def hover_inside(self, frame: Any, selector: str) -> None:
        """Move the pointer onto an element inside an ``iframe``.

        The driver must already be switched to the frame, and stays there.
        """
        from selenium.webdriver.common.actions.action_builder import ActionBuilder

        place = """const node = document.querySelector(arguments[0]); node.scrollIntoView({block: "center"});
            const box = node.getBoundingClientRect(); return [box.x + box.width / 2, box.y + box.height / 2]"""
        inner = self.run(place, selector)
        # The driver reports wrong positions in cross-origin frames. The position is therefore computed from the outer
        # page.
        self.driver.switch_to.default_content()
        place = """scrollBy({top: arguments[0].getBoundingClientRect().y + arguments[1][1] - innerHeight / 2,
            behavior: "instant"}); const box = arguments[0].getBoundingClientRect();
            return [box.x + arguments[1][0], box.y + arguments[1][1]]"""
        x, y = self.run(place, frame, inner)
        action = ActionBuilder(self.driver)
        action.pointer_action.move_to_location(int(x), int(y))
        action.perform()
        self.driver.switch_to.frame(frame)

    def press(self, *keys: str) -> None:
        """Press keys by name. The element that has the focus receives them."""
        from selenium.webdriver import ActionChains, Keys

        ActionChains(self.driver).send_keys(*(getattr(Keys, key.upper(), key) for key in keys)).perform()

    def choose(self, selector: str, text: str) -> None:
        """Select an option of a ``<select>`` element by its text."""
        from selenium.webdriver.support.select import Select

        Select(self.one(selector)).select_by_visible_text(text)

    def until(self, true: Callable[[], T]) -> T:
        """Wait until a condition is truthy, and return its value."""
        from selenium.webdriver.support.wait import WebDriverWait

        return WebDriverWait(self.driver, _SECONDS).until(lambda _: true())

    def picture(self, element: Any | None = None) -> np.ndarray:
        """Screenshot of the window or of one element, as ``[row column colour]``."""
        png = self.driver.get_screenshot_as_png() if element is None else element.screenshot_as_png
        return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(float)

    def overflow(self) -> int:
        """Number of pixels by which the page is wider than its window."""
        return int(self.run("return document.documentElement.scrollWidth - document.documentElement.clientWidth"))

    def problems(self) -> list[str]:
        """Console errors and requests since the last call, except requests for local files and embedded data."""
        said = [f"{entry['level']}: {entry['message']}" for entry in self.driver.get_log("browser")]
        asked = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        urls = [
            str(one["params"].get("request", one["params"])["url"])
            for one in asked
            if one["method"] in ("Network.requestWillBeSent", "Network.webSocketCreated")
        ]
        return said + [url for url in urls if urlsplit(url).scheme not in ("file", "data", "about", "blob")]


@contextmanager
def chromium(*, local: bool = False) -> Generator[Browser]:
    """A browser window that is closed at the end. If no browser is installed, the test is skipped.

    Args:
        local: Whether the browser can reach servers at 127.0.0.1. It can reach no others.
    """
    paths = found()
    if paths is None and not required():
        pytest.skip("no chromium and chromedriver found (Debian: apt-get install chromium chromium-driver)")
    if not required():
        pytest.importorskip("selenium", reason="selenium is not installed: pip install 'focuslens[browser]'")
    assert paths, "FOCUSLENS_TEST_BROWSER=required, and there is no chromium with its driver"
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = paths[0]
    for argument in (
        "--headless=new",
        "--no-sandbox",  # Chromium refuses to run as root with its sandbox
        "--disable-dev-shm-usage",
        "--disable-gpu",
        "--force-color-profile=srgb",
        "--hide-scrollbars",
        "--disable-features=IsolateSandboxedIframes",  # otherwise the log omits requests of sandboxed frames
        f"--host-resolver-rules=MAP * ~NOTFOUND{', EXCLUDE 127.0.0.1' if local else ''}",
        "--proxy-server=127.0.0.1:9",
        f"--proxy-bypass-list={'127.0.0.1' if local else '<-loopback>'}",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(paths[1]))
    try:
        yield Browser(driver)
    finally:
        driver.quit()
