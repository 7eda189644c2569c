"""A headless Chromium, told what to do over two pipes: JSON messages that end in NUL
(--remote-debugging-pipe).
"""

from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

FOUND = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
WAIT_S = 30

# Chromium reads from descriptor 3 and writes to 4; ours may have any numbers.
_START = """
import fcntl, os, sys
ours = [fcntl.fcntl(int(at), fcntl.F_DUPFD, 10) for at in sys.argv[1:3]]
os.dup2(ours[0], 3), os.dup2(ours[1], 4)
os.execv(sys.argv[3], sys.argv[3:])
"""


class Chromium:
    """One page in a browser of its own. Use as a context manager."""

    def __init__(self, profile: Path) -> None:
        assert FOUND is not None
        theirs_in, self._to = os.pipe()
        self._from, theirs_out = os.pipe()
        flags = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--no-first-run",
            "--disable-background-networking",
        ]
        flags += [
            f"--user-data-dir={profile}",
            "--disable-dev-shm-usage",
            "--remote-debugging-pipe",
            "about:blank",
        ]
        self._process = subprocess.Popen(
            [sys.executable, "-c", _START, str(theirs_in), str(theirs_out), FOUND, *flags],
            pass_fds=(theirs_in, theirs_out),
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self._number, self._rest, self._session = 0, b"", None
        self.troubles: list[str] = []  # what the console and the security policy complain of
        self.requests: list[str] = []
        target = self.tell("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.tell("Target.attachToTarget", targetId=target, flatten=True)[
            "sessionId"
        ]
        for domain in ("Runtime", "Log", "Network", "Page"):
            self.tell(f"{domain}.enable")

    def __enter__(self) -> Chromium:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._to)  # upon which it ends
        try:
            self._process.wait(WAIT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._from)

    def tell(self, method: str, **params: Any) -> Any:
        """The answer to one command."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while (found := self._read()).get("id") != self._number:
            self._note(found)
        assert "error" not in found, (method, found)
        return found["result"]

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._from], [], [], WAIT_S)
            part = os.read(self._from, 1 << 16) if ready else b""
            assert part, "Chromium has ended or does not answer"
            self._rest += part
        one, _, self._rest = self._rest.partition(b"\0")
        found: dict[str, Any] = json.loads(one)
        return found

    def _note(self, event: dict[str, Any]) -> None:
        method = event.get("method")
        if method in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded"):
            self.troubles.append(json.dumps(event["params"]))
        elif method == "Network.requestWillBeSent":
            self.requests.append(event["params"]["request"]["url"])

    def js(self, expression: str) -> Any:
        """The value of an expression in the page."""
        found = self.tell(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def until(self, expression: str) -> None:
        """Wait until an expression in the page is true."""
        end = time.monotonic() + WAIT_S
        while not self.js(f"Boolean({expression})"):
            assert time.monotonic() < end, f"never came true: {expression}"
            time.sleep(0.01)

    def open(
        self, url: str, ready: str = "document.documentElement?.dataset.view !== undefined"
    ) -> None:
        """Go to a page and wait until it is shown, by default one of the feature browser's. Notes
        are forgotten.
        """
        self.tell("Page.navigate", url="about:blank")
        self.until("location.href === 'about:blank'")
        self.troubles.clear()
        self.requests.clear()
        self.tell("Page.navigate", url=url)
        self.until(ready)

    def press(self, key: str) -> None:
        """A key of the keyboard, into whatever has the focus."""
        text = {"text": key} if len(key) == 1 else {"text": "\r"} if key == "Enter" else {}
        codes = {"Enter": 13, "Escape": 27, "Tab": 9, "ArrowLeft": 37, "ArrowRight": 39}
        code = {"windowsVirtualKeyCode": codes[key]} if key in codes else {}
        self.tell("Input.dispatchKeyEvent", type="keyDown", key=key, **text, **code)
        self.tell("Input.dispatchKeyEvent", type="keyUp", key=key, **code)
