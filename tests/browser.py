"""A headless Chromium over its own pipe, by nothing but the standard library: what a page shows, asks for and says."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome")
# the browser's own traffic (updates, variations) is none of the page's
_OPTIONS = (
    "--headless=new", "--remote-debugging-pipe", "--no-first-run", "--disable-gpu", "--disable-dev-shm-usage",
    "--hide-scrollbars", "--disable-background-networking", "--disable-component-update", "--disable-extensions",
    "--force-color-profile=srgb",
)


def find() -> str | None:
    """The browser on PATH, if any."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """One page of a headless browser. ``events`` are all that it reported so far, as ``(method, parameters)``."""

    def __init__(self, program: str, profile: Path, seconds: float = 60):
        self.events: list[tuple[str, dict]] = []
        self._deadline, self._number, self._pending = time.monotonic() + seconds, 0, b""
        theirs, self._write = os.pipe()
        self._read, answers = os.pipe()
        # as root, as in a container, Chromium runs without its sandbox or not at all; the page is our own
        root = ("--no-sandbox",) if os.geteuid() == 0 else ()
        command = [program, *_OPTIONS, *root, f"--user-data-dir={profile}", "about:blank"]
        # it reads commands from descriptor 3 and answers on 4; bash, as sh knows only descriptors of one digit
        self._process = subprocess.Popen(
            ["bash", "-c", f'exec "$@" 3<&{theirs} 4>&{answers}', "browser", *command], pass_fds=(theirs, answers),
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(theirs)
        os.close(answers)
        self._session: str | None = None
        try:
            pages = [t for t in self("Target.getTargets")["targetInfos"] if t["type"] == "page"]
            attached = self("Target.attachToTarget", targetId=pages[0]["targetId"], flatten=True)
            self._session = attached["sessionId"]
            for domain in ("Page", "Runtime", "Log", "Network"):
                self(f"{domain}.enable")
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """End the browser."""
        self._process.kill()
        self._process.wait()
        for descriptor in (self._read, self._write):
            os.close(descriptor)

    def _message(self) -> dict:
        while b"\0" not in self._pending:
            left = self._deadline - time.monotonic()
            if left <= 0 or not select.select([self._read], [], [], left)[0]:
                raise TimeoutError("the browser does not answer")
            piece = os.read(self._read, 1 << 20)
            if not piece:
                raise ConnectionError("the browser ended")
            self._pending += piece
        text, _, self._pending = self._pending.partition(b"\0")
        found = json.loads(text)
        if "method" in found:
            self.events.append((found["method"], found["params"]))
        return found

    def __call__(self, method: str, **parameters) -> dict:
        """The result of a command of the DevTools protocol."""
        self._number += 1
        command = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            command["sessionId"] = self._session
        os.write(self._write, json.dumps(command).encode() + b"\0")
        while (found := self._message()).get("id") != self._number:
            pass
        if "error" in found:
            raise RuntimeError(f"{method}: {found['error']['message']}")
        return found["result"]

    def open(self, page: Path, width: int, dark: bool) -> None:
        """Load a file for a screen of ``width`` and a reader who prefers dark or light, and wait until it is drawn."""
        self("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self("Emulation.setEmulatedMedia", features=[scheme])
        at = len(self.events)
        self("Page.navigate", url=page.as_uri())
        self.wait(lambda: any(method == "Page.loadEventFired" for method, _ in self.events[at:]))

    def wait(self, done: Callable[[], bool]) -> None:
        """Take messages until ``done``."""
        while not done():
            self._message()

    def evaluate(self, expression: str):
        """The value of a JavaScript expression on the page; the page's own policy does not hold for it."""
        found = self("Runtime.evaluate", expression=expression, returnByValue=True)
        if "exceptionDetails" in found:
            raise RuntimeError(f"{expression}: {found['exceptionDetails']['text']}")
        return found["result"].get("value")

    def picture(self, file: Path) -> None:
        """The whole page as a PNG."""
        shot = self("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        file.write_bytes(base64.b64decode(shot["data"]))
