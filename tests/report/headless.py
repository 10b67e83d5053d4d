"""A real Chromium without a window, spoken to over pipes (Chrome DevTools Protocol): no driver and no port is needed."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--disable-dev-shm-usage", "--remote-debugging-pipe")
QUIET = ("--disable-background-networking", "--disable-component-update", "--no-first-run", "--disable-sync")


class Browser:
    def __init__(self, write: int, read: int):
        self.write, self.read, self.rest, self.number, self.events = write, read, b"", 0, []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    session: str | None = None

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self.number += 1
        session = {"sessionId": self.session} if self.session else {}
        os.write(self.write, json.dumps({"id": self.number, "method": method, "params": parameters} | session).encode() + b"\0")
        while (message := self._next()).get("id") != self.number:
            self.events.append(message)
        assert "error" not in message, message
        return message["result"]

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self.rest:
            more = os.read(self.read, 1 << 20)
            assert more, "chromium has ended"
            self.rest += more
        message, self.rest = self.rest.split(b"\0", 1)
        return json.loads(message)

    def show(self, page: Path, width: int, scheme: str, media: str = "screen") -> None:
        """Open a page at a width in CSS pixels, and wait until it is loaded."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600)
        self.call("Emulation.setEmulatedMedia", media=media, features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.events.clear()
        self.call("Page.navigate", url=page.resolve().as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self._next())

    def ask(self, expression: str) -> Any:
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def complaints(self) -> list[str]:
        """What the console says, and what went wrong."""
        names = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
        return [json.dumps(event) for event in self.events if event.get("method") in names]

    def requests(self) -> list[str]:
        """Everything that was asked for."""
        sent = (event for event in self.events if event.get("method") == "Network.requestWillBeSent")
        return [event["params"]["request"]["url"] for event in sent]

    def picture(self, path: Path, whole: bool = True) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", captureBeyondViewport=whole)["data"]))


@contextmanager
def chromium(home: Path) -> Iterator[Browser]:
    """A browser with a profile of its own, which ends with the block."""
    commands, told = os.pipe(), os.pipe()
    words = [CHROMIUM, *FLAGS, *QUIET, f"--user-data-dir={home}"]
    line = f'exec "$@" 3<&{commands[0]} 4>&{told[1]}'  # Chromium reads from 3 and writes to 4
    log = home.with_name(f"{home.name}.log").open("wb")
    process = subprocess.Popen(["bash", "-c", line, "bash", *words], pass_fds=(commands[0], told[1]), stdout=log, stderr=log)
    os.close(commands[0])
    os.close(told[1])
    try:
        yield Browser(commands[1], told[0])
    finally:
        process.kill()
        process.wait()
        os.close(commands[1])
        os.close(told[0])
