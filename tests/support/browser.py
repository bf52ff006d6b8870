"""A headless Chromium without a network, that tells what a page asked for and complained about."""

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
"""How long a page may take; the machines of continuous integration are slow."""

T = TypeVar("T")


def required() -> bool:
    """Whether a missing browser is an error: where one was installed, these tests must not be passed over."""
    return os.environ.get("FOCUSLENS_TEST_BROWSER") == "required"


def found() -> tuple[str, str] | None:
    """Chromium and its driver, of the same version as a distribution's packages are; ``None`` where one is missing."""
    paths = [next(filter(None, map(shutil.which, names)), None) for names in (_BROWSERS, _DRIVERS)]
    return None if None in paths else (str(paths[0]), str(paths[1]))


class Browser:
    """One window.

    Args:
        driver: Selenium's.
    """

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def open(self, page: Path | str, *, width: int = 1200, height: int = 900, dark: bool = False) -> None:
        """Open a file, or HTML, in a window of some size, under either colour scheme; what was noted is forgotten."""
        self.problems()
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme})
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        self.driver.get(page.as_uri() if isinstance(page, Path) else page)
        self.until(lambda: self.run("return document.readyState") == "complete")

    def run(self, script: str, *arguments: Any) -> Any:
        """What a script in the page returns."""
        return self.driver.execute_script(script, *arguments)

    def all(self, selector: str) -> list[Any]:
        """Elements by a CSS selector."""
        return self.driver.find_elements("css selector", selector)

    def one(self, selector: str) -> Any:
        """The first such element."""
        return self.driver.find_element("css selector", selector)

    def text(self, selector: str) -> str:
        """The text of the first such element, seen or not."""
        return str(self.run("return arguments[0].textContent", self.one(selector)))

    def hover(self, element: Any) -> None:
        """Move the pointer onto an element."""
        from selenium.webdriver import ActionChains

        self.run("arguments[0].scrollIntoView({block: 'center'})", element)
        ActionChains(self.driver).move_to_element(element).perform()

    def hover_inside(self, frame: Any, selector: str) -> None:
        """Move the pointer onto an element of a page within the page, which is open for commands and stays so."""
        from selenium.webdriver.common.actions.action_builder import ActionBuilder

        place = """const node = document.querySelector(arguments[0]); node.scrollIntoView({block: "center"});
            const box = node.getBoundingClientRect(); return [box.x + box.width / 2, box.y + box.height / 2]"""
        inner = self.run(place, selector)
        # The driver is wrong about places in frames that have an origin of their own, so the outer page is asked.
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
        """Press keys, by their names, wherever the focus is."""
        from selenium.webdriver import ActionChains, Keys

        ActionChains(self.driver).send_keys(*(getattr(Keys, key.upper(), key) for key in keys)).perform()

    def choose(self, selector: str, text: str) -> None:
        """Choose an entry of a list of choices."""
        from selenium.webdriver.support.select import Select

        Select(self.one(selector)).select_by_visible_text(text)

    def until(self, true: Callable[[], T]) -> T:
        """Wait until something is true, and give it."""
        from selenium.webdriver.support.wait import WebDriverWait

        return WebDriverWait(self.driver, _SECONDS).until(lambda _: true())

    def picture(self, element: Any | None = None) -> np.ndarray:
        """The window, or one element, as ``[row column colour]``."""
        png = self.driver.get_screenshot_as_png() if element is None else element.screenshot_as_png
        return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(float)

    def overflow(self) -> int:
        """Pixels by which the page is wider than its window."""
        return int(self.run("return document.documentElement.scrollWidth - document.documentElement.clientWidth"))

    def problems(self) -> list[str]:
        """Errors of the console, and requests for anything that is not a file or in the page, since the last time."""
        said = [f"{entry['level']}: {entry['message']}" for entry in self.driver.get_log("browser")]
        asked = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        urls = [
            str(one["params"].get("request", one["params"])["url"])
            for one in asked
            if one["method"] in ("Network.requestWillBeSent", "Network.webSocketCreated")
        ]
        return said + [url for url in urls if urlsplit(url).scheme not in ("file", "data", "about", "blob")]


@contextmanager
def chromium() -> Generator[Browser]:
    """A window, closed in the end; the test is skipped where there is no browser."""
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
        "--no-sandbox",  # of the process; it does not start as root otherwise
        "--disable-dev-shm-usage",
        "--disable-gpu",
        "--force-color-profile=srgb",
        "--hide-scrollbars",
        "--disable-features=IsolateSandboxedIframes",  # whose requests the log would not tell of
        "--host-resolver-rules=MAP * ~NOTFOUND",
        "--proxy-server=127.0.0.1:9",
        "--proxy-bypass-list=<-loopback>",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(paths[1]))
    try:
        yield Browser(driver)
    finally:
        driver.quit()
