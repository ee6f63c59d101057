"""A page in headless Chromium: what tests look at, and pictures of reports for the documentation.

    python -m experiments.browser runs/scale_smoke/scale_smoke.html docs/report.png --height=2360

Spoken is the DevTools protocol, over two pipes (`--remote-debugging-pipe`): nothing but Chromium is
needed for it. https://chromedevtools.github.io/devtools-protocol/
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import json
import os
import pathlib
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
# The protocol wants them as file descriptors 3 and 4, which Python passes on under other numbers.
_START = 'read=$1 write=$2; shift 2; exec "$@" 3<&"$read" 4>&"$write"'
_SECONDS = 30.0


class BrowserError(RuntimeError):
    """Chromium is missing, has ended, or the page has failed. The message is one line."""

    exit_code = 2


def find() -> str:
    """The path of Chromium; "" where there is none."""
    return next(filter(None, map(shutil.which, NAMES)), "")


class Page:
    """A context in which a local page is open; what it asks for and complains of is written down.

    Args:
      path: of the HTML file.
      width, height: of the window, in pixels.
      dark: whether the page is told that its reader prefers dark colours.

    Attributes:
      requests: the addresses that the page has asked for, its own first.
      complaints: errors and warnings of its console.
    """

    def __init__(
        self, path: str | os.PathLike, *, width: int = 1280, height: int = 900, dark: bool = False
    ):
        self._url = pathlib.Path(path).absolute().as_uri()
        self._size, self._dark = (width, height), dark
        self._last, self._buffer, self._session = 0, b"", ""
        self._loaded = False
        self.requests: list[str] = []
        self.complaints: list[str] = []

    def __enter__(self) -> Page:
        program = find()
        if not program:
            raise BrowserError("there is no Chromium; apt-get install chromium gives one")
        read, self._write = os.pipe()
        self._read, write = os.pipe()
        self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        flags = [
            *("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
            *("--no-first-run", "--disable-background-networking", "--hide-scrollbars"),
            *(f"--user-data-dir={self._profile.name}", "--remote-debugging-pipe"),
        ]
        self._process = subprocess.Popen(
            ["bash", "-c", _START, "bash", str(read), str(write), program, *flags],
            pass_fds=(read, write),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(read)
        os.close(write)
        try:
            self._open()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc_info) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._read)
        os.close(self._write)
        self._profile.cleanup()

    def _open(self) -> None:
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        found = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = found["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")
        width, height = self._size
        sizes = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", **sizes)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if self._dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.load()

    def load(self, fragment: str = "") -> None:
        """Opens the page anew, at a place in it, and returns when it is there."""
        self.call("Page.navigate", url="about:blank")
        self._wait()
        self.call("Page.navigate", url=self._url + fragment)
        self._wait()

    def _wait(self) -> None:
        self._until(lambda: self._loaded, "the page is loaded")
        self._loaded = False

    def evaluate(self, script: str) -> Any:
        """The value of an expression in the page, as JSON would have it."""
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        if "exceptionDetails" in found:
            raise BrowserError(f"{script}: {found['exceptionDetails'].get('exception')}")
        return found["result"].get("value")

    def until(self, script: str) -> None:
        """Returns when an expression in the page is true: what a click leads to may take a while,
        and another page may come meanwhile."""
        deadline = time.monotonic() + _SECONDS
        while True:
            with contextlib.suppress(BrowserError):
                if self.evaluate(f"Boolean({script})"):
                    return
            if time.monotonic() > deadline:
                raise BrowserError(f"not within {_SECONDS:.0f} s: {script}")
            time.sleep(0.02)

    def middle(self, selector: str) -> tuple[float, float]:
        """Where the first element that a CSS selector finds is, brought into view: x, y."""
        box = self.evaluate(
            f"(() => {{ const it = document.querySelector({json.dumps(selector)}); if (!it) return;"
            "it.scrollIntoView({block: 'center'}); const box = it.getBoundingClientRect();"
            "return [box.x + box.width / 2, box.y + box.height / 2]; })()"
        )
        if not box:
            raise BrowserError(f"{self._url} has no {selector}")
        return box[0], box[1]

    def click(self, selector: str) -> None:
        """Clicks, as a mouse does, on the middle of an element."""
        x, y = self.middle(selector)
        for kind in ("mousePressed", "mouseReleased"):
            where = {"type": kind, "x": x, "y": y, "button": "left", "clickCount": 1}
            self.call("Input.dispatchMouseEvent", **where)

    def point(self, x: float, y: float) -> None:
        """Moves the mouse there, in pixels of the window."""
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def picture(self) -> bytes:
        """The window as a PNG."""
        return base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Calls a method of the protocol and returns its result."""
        self._last += 1
        message = {"id": self._last, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        answer: dict[str, Any] = {}

        def answered() -> bool:
            return answer.get("id") == self._last

        self._until(answered, method, answer)
        if "error" in answer:
            raise BrowserError(f"{method}: {answer['error'].get('message')}")
        return answer["result"]

    def _until(self, done, what: str, answer: dict[str, Any] | None = None) -> None:
        """Reads messages until `done()`; an answer is put into `answer`."""
        deadline = time.monotonic() + _SECONDS
        while not done():
            text, found, rest = self._buffer.partition(b"\0")
            if not found:
                left = max(0.0, deadline - time.monotonic())
                ready, _, _ = select.select([self._read], [], [], left)
                got = os.read(self._read, 1 << 20) if ready else b""
                if not got:
                    why = "has ended" if ready else f"took more than {_SECONDS:.0f} s"
                    raise BrowserError(f"Chromium {why}: {what}")
                self._buffer += got
                continue
            self._buffer = rest
            message = json.loads(text)
            if "id" in message and answer is not None:
                answer.update(message)
            self._note(message.get("method", ""), message.get("params", {}))

    def _note(self, event: str, told: dict[str, Any]) -> None:
        if event == "Page.loadEventFired":
            self._loaded = True
        elif event == "Network.requestWillBeSent":
            self.requests.append(told["request"]["url"])
        elif event == "Log.entryAdded" and told["entry"]["level"] in ("error", "warning"):
            self.complaints.append(told["entry"]["text"])
        elif event == "Runtime.consoleAPICalled" and told["type"] in ("error", "warning"):
            self.complaints.append(str([it.get("value") for it in told["args"]]))
        elif event == "Runtime.exceptionThrown":
            details = told["exceptionDetails"]
            self.complaints.append(details.get("exception", details).get("description", "error"))


def main(arguments: Sequence[str]) -> int:
    """Takes the picture of a page, and returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m experiments.browser")
    parser.add_argument("page", metavar="PAGE.html")
    parser.add_argument("picture", metavar="PICTURE.png")
    parser.add_argument("--width", type=int, default=1280, help="of the window, in pixels")
    parser.add_argument("--height", type=int, default=1400)
    given = parser.parse_args(arguments)
    if not pathlib.Path(given.page).is_file():
        print(f"error: there is no {given.page}", file=sys.stderr)
        return 2
    try:
        with Page(given.page, width=given.width, height=given.height) as page:
            pathlib.Path(given.picture).write_bytes(page.picture())
    except (BrowserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {given.picture}, {given.width} × {given.height} px")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
