"""The system's Chromium, headless, driven by playwright. No browser is ever downloaded.

The tests of pages skip where playwright or Chromium is absent: `pytestmark = NEEDS_CHROMIUM`.
"""

from __future__ import annotations

import importlib.util
import shutil
import time
from typing import Any, Literal

import pytest

EXECUTABLE = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
HAS_PLAYWRIGHT = importlib.util.find_spec("playwright") is not None
NEEDS_CHROMIUM = pytest.mark.skipif(
    EXECUTABLE is None or not HAS_PLAYWRIGHT,
    reason="needs Chromium on the PATH" if HAS_PLAYWRIGHT else "needs playwright",
)
WAIT_S = 30
# As root, which CI is, Chromium starts only without its sandbox.
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
SHOWN = "document.documentElement?.dataset.view !== undefined"  # a page of the feature browser


class Chromium:
    """One page in a browser of its own. Use as a context manager."""

    def __init__(self) -> None:
        from playwright.sync_api import sync_playwright

        self._playwright = sync_playwright().start()
        self._browser = self._playwright.chromium.launch(executable_path=EXECUTABLE, args=FLAGS)
        self._page = self._browser.new_page()
        self._page.set_default_timeout(WAIT_S * 1000)
        self.troubles: list[str] = []  # console messages, exceptions, refusals by policy
        self.requests: list[str] = []  # addresses, but those of data: which ask nobody
        self._page.on("console", lambda message: self.troubles.append(message.text))
        self._page.on("pageerror", lambda error: self.troubles.append(str(error)))
        self._page.on("request", lambda request: self.requests.append(request.url))

    def __enter__(self) -> Chromium:
        return self

    def __exit__(self, *_: object) -> None:
        self._browser.close()
        self._playwright.stop()

    def js(self, expression: str) -> Any:
        """The value of an expression in the page."""
        return self._page.evaluate(expression)

    def until(self, expression: str) -> None:
        """Wait until an expression in the page is true.

        Not by `wait_for_function`, which calls eval in the page: our pages' policy forbids it.
        """
        end = time.monotonic() + WAIT_S
        while not self.js(f"Boolean({expression})"):
            assert time.monotonic() < end, f"never came true: {expression}"
            time.sleep(0.01)

    def open(self, url: str, ready: str = SHOWN) -> None:
        """Go to a page and wait until `ready` is true in it. Troubles and requests begin anew."""
        self._page.goto("about:blank")
        self.troubles.clear()
        self.requests.clear()
        self._page.goto(url)
        self.until(ready)

    def press(self, key: str) -> None:
        """Press a key of the keyboard; what has the focus gets it."""
        self._page.keyboard.press(key)

    def point(self, x: float, y: float, *, click: bool = False) -> None:
        """Move the mouse to a place of the window, in CSS pixels, and press it there or not."""
        self._page.mouse.move(x, y)
        if click:
            self._page.mouse.click(x, y)

    def resize(self, width: int, height: int) -> None:
        """Set the size of the window, in CSS pixels."""
        self._page.set_viewport_size({"width": width, "height": height})

    def media(
        self,
        kind: Literal["print", "screen", "null"] = "null",
        scheme: Literal["light", "dark", "null"] = "null",
    ) -> None:
        """Show the page as on paper or screen, in light or dark; "null" is the browser's own."""
        self._page.emulate_media(media=kind, color_scheme=scheme)

    def pdf(self) -> bytes:
        """The page as it is printed."""
        return self._page.pdf()
