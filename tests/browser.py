"""A real headless Chromium for tests, spoken to over two pipes (the DevTools protocol): no port, no driver."""

import base64
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
    "--force-color-profile=srgb",
    "--remote-debugging-pipe",
)
PATIENCE_S = 60.0
QUIT_S = 10


class Page:
    """One open page.

    Attributes:
        complaints: what the page wrote to the console as an error or warning, and exceptions nobody caught.
        requests: addresses the page asked for.
    """

    def __init__(self, reader: Any, writer: Any) -> None:
        self._reader, self._writer = reader, writer
        self._last_id = 0
        self._session = ""
        self.complaints: list[str] = []
        self.requests: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def open(self, path: Path, fragment: str = "", *, width: int = 1440, height: int = 900) -> None:
        """Opens a file and waits until it says that it is ready, or has failed."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.call("Page.navigate", url="about:blank")
        self.complaints.clear()
        self.requests.clear()
        self.call("Page.navigate", url=f"{path.resolve().as_uri()}#{fragment}")
        self.wait_for("document.documentElement?.dataset.state")
        self.settle()

    def wait_for(self, expression: str) -> None:
        """Returns once `expression` is true in the page."""
        give_up = time.monotonic() + PATIENCE_S
        while not self.evaluate(f"Boolean({expression})"):
            if time.monotonic() > give_up:
                raise TimeoutError(f"{expression} stayed false; the page said {self.complaints}")
            time.sleep(0.02)

    def settle(self) -> None:
        """Returns after two frames: whatever was asked for is drawn."""
        self.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done(1))))")

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression, awaited."""
        answer = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(json.dumps(answer["exceptionDetails"]))
        return answer["result"].get("value")

    def text(self, selector: str) -> str:
        """What stands in the first element of this CSS selector."""
        return str(self.evaluate(f"document.querySelector({json.dumps(selector)}).textContent"))

    def press(self, key: str) -> None:
        """One key, as a user would."""
        text = {"text": key} if len(key) == 1 else {}
        self.call("Input.dispatchKeyEvent", type="keyDown", key=key, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key)
        self.settle()

    def wheel(self, point: tuple[float, float], turn: float) -> None:
        """The wheel over a point; above zero towards the user."""
        self.call("Input.dispatchMouseEvent", type="mouseWheel", x=point[0], y=point[1], deltaX=0, deltaY=turn)
        self.settle()

    def drag(self, start: tuple[float, float], stop: tuple[float, float], *, button: str = "left") -> None:
        """Presses at one point, moves to another, lets go."""
        held = {"left": 1, "right": 2}[button]
        mouse = {"button": button, "clickCount": 1}
        self.call("Input.dispatchMouseEvent", type="mousePressed", x=start[0], y=start[1], **mouse)
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=stop[0], y=stop[1], button=button, buttons=held)
        self.call("Input.dispatchMouseEvent", type="mouseReleased", x=stop[0], y=stop[1], **mouse)
        self.settle()

    def click(self, selector: str) -> None:
        """A click in the middle of the first element of this CSS selector."""
        point = self.middle(selector)
        self.drag(point, point)

    def middle(self, selector: str) -> tuple[float, float]:
        """The point in the middle of an element."""
        x, y = self.evaluate(
            f"(r => [r.x + r.width / 2, r.y + r.height / 2])"
            f"(document.querySelector({json.dumps(selector)}).getBoundingClientRect())"
        )
        return x, y

    def screenshot(self) -> NDArray[np.uint8]:
        """What is seen: uint8 (rows, columns, RGB), a pixel a CSS pixel."""
        png = base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])
        return np.asarray(Image.open(BytesIO(png)).convert("RGB"))

    def call(self, method: str, **parameters: Any) -> Any:
        """One command of the DevTools protocol and its result."""
        self._last_id += 1
        message = {"id": self._last_id, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        self._writer.write(json.dumps(message).encode() + b"\0")
        self._writer.flush()
        while True:
            answer = self._receive()
            if answer.get("id") == self._last_id:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]
            self._note(answer)

    def _receive(self) -> Any:
        received = bytearray()
        while (byte := self._reader.read(1)) != b"\0":
            if not byte:
                raise RuntimeError("Chromium ended")
            received += byte
        return json.loads(received)

    def _note(self, event: Any) -> None:
        parameters = event.get("params", {})
        if event["method"] == "Runtime.exceptionThrown":
            self.complaints.append(json.dumps(parameters["exceptionDetails"]))
        elif event["method"] == "Log.entryAdded" and parameters["entry"]["level"] in ("error", "warning"):
            self.complaints.append(parameters["entry"]["text"])
        elif event["method"] == "Runtime.consoleAPICalled" and parameters["type"] in ("error", "warning", "assert"):
            self.complaints.append(json.dumps(parameters["args"]))
        elif event["method"] == "Network.requestWillBeSent":
            self.requests.append(parameters["request"]["url"])


@contextmanager
def chromium(profile: Path) -> Iterator[Page]:
    """Chromium with an empty profile in the folder `profile`, and one page in it; ends with the block."""
    assert CHROMIUM
    to_browser, from_browser = os.pipe(), os.pipe()
    # Chromium reads commands from descriptor 3 and answers on 4.
    redirect = f'exec "$@" 3<&{to_browser[0]} 4>&{from_browser[1]}'
    command = ["bash", "-c", redirect, "bash", CHROMIUM, *FLAGS, f"--user-data-dir={profile}", "about:blank"]
    process = subprocess.Popen(
        command, pass_fds=(to_browser[0], from_browser[1]), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    os.close(to_browser[0])
    os.close(from_browser[1])
    with os.fdopen(from_browser[0], "rb") as reader, os.fdopen(to_browser[1], "wb") as writer:
        try:
            page = Page(reader, writer)
            yield page
            with suppress(RuntimeError):
                page._session = ""
                page.call("Browser.close")
            process.wait(QUIT_S)
        finally:
            process.kill()
            process.wait()
