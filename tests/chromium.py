"""A headless Chromium, driven by its own DevTools protocol over aiohttp's WebSocket; no driver besides.

What it is asked for is written down, and all its names of hosts resolve to nothing, so that a page cannot reach anyone.
"""

import asyncio
import base64
import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
PATIENCE_SECONDS = 120


def find() -> str | None:
    return next((path for name in NAMES if (path := shutil.which(name))), None)


@dataclass
class Tab:
    """A page of the browser, and what it complained about and asked for since it was opened."""

    socket: aiohttp.ClientWebSocketResponse
    complaints: list[str] = field(default_factory=list)
    asked_for: list[str] = field(default_factory=list)
    happened: list[str] = field(default_factory=list)
    last_id: int = 0

    async def send(self, method: str, **options: Any) -> dict[str, Any]:
        self.last_id += 1
        await self.socket.send_json({"id": self.last_id, "method": method, "params": options})
        while (message := await self.next()).get("id") != self.last_id:
            pass
        assert "error" not in message, message
        return message["result"]

    async def next(self) -> dict[str, Any]:
        message = await self.socket.receive_json(timeout=PATIENCE_SECONDS)
        method, said = message.get("method", ""), message.get("params", {})
        self.happened.append(method)
        if method == "Network.requestWillBeSent":
            self.asked_for.append(said["request"]["url"])
        elif method in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded"):
            self.complaints.append(str(said))
        return message

    async def open(self, address: str, *, width: int, scheme: str) -> None:
        """At that many CSS pixels of width, in the "light" or "dark" scheme; back when it has loaded."""
        for domain in ("Page", "Runtime", "Log", "Network"):
            await self.send(f"{domain}.enable")
        metrics = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 600}
        await self.send("Emulation.setDeviceMetricsOverride", **metrics)
        feature = {"name": "prefers-color-scheme", "value": scheme}
        await self.send("Emulation.setEmulatedMedia", features=[feature])
        self.happened.clear()
        await self.send("Page.navigate", url=address)
        while "Page.loadEventFired" not in self.happened:
            await self.next()

    async def ask(self, expression: str) -> Any:
        """What the JavaScript comes to; promises are awaited."""
        answer = await self.send("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    async def press(self, key: str, code: int) -> None:
        for kind in ("rawKeyDown", "keyUp"):
            await self.send("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code)

    async def screenshot(self, file: Path) -> None:
        """Of the whole page."""
        size = (await self.send("Page.getLayoutMetrics"))["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        taken = await self.send("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)
        file.write_bytes(base64.b64decode(taken["data"]))


@contextlib.asynccontextmanager
async def browser(folder: Path) -> AsyncIterator[str]:
    """A Chromium that keeps its things in the folder; the address of its DevTools."""
    program = find()
    assert program is not None
    options = [
        "--headless=new", "--remote-debugging-port=0", f"--user-data-dir={folder}", "--no-first-run", "--disable-gpu",
        "--disable-dev-shm-usage", "--disable-background-networking", "--disable-component-update", "--disable-sync",
        "--host-resolver-rules=MAP * ~NOTFOUND", *(["--no-sandbox"] if os.geteuid() == 0 else []),
    ]  # fmt: skip
    with subprocess.Popen([program, *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            port = folder / "DevToolsActivePort"
            until = time.monotonic() + PATIENCE_SECONDS
            while not (port.is_file() and port.read_text().strip()):
                assert process.poll() is None, f"{program} ended with {process.returncode}"
                assert time.monotonic() < until, f"{program} does not answer"
                await asyncio.sleep(0.05)
            yield f"http://127.0.0.1:{port.read_text().split()[0]}"
        finally:
            process.terminate()


@contextlib.asynccontextmanager
async def tab(devtools: str) -> AsyncIterator[Tab]:
    """A new one; closed at the end."""
    async with aiohttp.ClientSession() as session:
        async with session.put(f"{devtools}/json/new?about:blank") as answer:
            target = await answer.json()
        async with session.ws_connect(target["webSocketDebuggerUrl"], max_msg_size=2**28) as socket:
            yield Tab(socket)
        async with session.get(f"{devtools}/json/close/{target['id']}"):
            pass
