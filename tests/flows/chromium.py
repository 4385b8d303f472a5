"""A real browser for tests: headless Chromium (Debian: `apt install chromium`), driven over its remote debugging protocol."""

import asyncio
import base64
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import aiohttp


class Page:
    """A page of a browser of its own. ``errors`` are what its console said of exceptions and errors so far."""

    def __init__(self, folder: Path, width: int = 1500, height: int = 950, dark: bool = False):
        self._folder, self._width, self._height, self._dark = folder, width, height, dark
        self._loop = asyncio.new_event_loop()
        self._number = 0
        self.errors: list[str] = []

    def __enter__(self):
        program = shutil.which("chromium") or shutil.which("google-chrome")
        assert program, "browser tests need chromium: apt install chromium"
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"]
        options += ["--remote-debugging-port=0", f"--user-data-dir={self._folder}", f"--window-size={self._width},{self._height}"]
        self._process = subprocess.Popen([program, *options, "about:blank"], stderr=subprocess.DEVNULL)
        try:
            self._loop.run_until_complete(self._connect())
        except BaseException:
            self._process.kill()
            raise
        return self

    def __exit__(self, *reason):
        self._loop.run_until_complete(self._close())
        self._loop.close()
        self._process.terminate()
        self._process.wait(20)

    def open(self, address: str) -> None:
        self._call("Page.navigate", url=address)

    def evaluate(self, expression: str):
        """The value of a JavaScript expression."""
        answer = self._call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait(self, expression: str, seconds: float = 90) -> None:
        """Until a JavaScript expression is true."""
        end = time.monotonic() + seconds
        while not self.evaluate(f"Boolean({expression})"):
            assert time.monotonic() < end, f"never true: {expression}\n{self.evaluate('document.body.innerText')[:3000]}"
            time.sleep(0.3)

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self._call("Page.captureScreenshot", format="png")["data"]))

    def _call(self, method: str, **parameters):
        return self._loop.run_until_complete(self._send(method, parameters))

    async def _connect(self):
        end = time.monotonic() + 60
        port = self._folder / "DevToolsActivePort"
        while not (port.is_file() and port.read_text().count("\n")):
            assert self._process.poll() is None, "chromium ended"
            assert time.monotonic() < end, "chromium did not start"
            await asyncio.sleep(0.1)
        self._session = aiohttp.ClientSession()
        async with self._session.get(f"http://127.0.0.1:{port.read_text().split()[0]}/json/list") as answer:
            (target, *_) = [page for page in await answer.json() if page["type"] == "page"]
        self._socket = await self._session.ws_connect(target["webSocketDebuggerUrl"], max_msg_size=0)
        for domain in ("Page", "Runtime", "Log"):
            await self._send(f"{domain}.enable", {})
        size = {"width": self._width, "height": self._height, "deviceScaleFactor": 1, "mobile": self._width < 600}
        await self._send("Emulation.setDeviceMetricsOverride", size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if self._dark else "light"}
        await self._send("Emulation.setEmulatedMedia", {"features": [scheme]})

    async def _send(self, method, parameters):
        self._number += 1
        await self._socket.send_json({"id": self._number, "method": method, "params": parameters})
        while True:
            message = json.loads((await asyncio.wait_for(self._socket.receive(), 60)).data)
            if message.get("id") == self._number:
                assert "error" not in message, message["error"]
                return message["result"]
            self._hear(message)

    def _hear(self, event):
        details = event.get("params", {})
        if event["method"] == "Runtime.exceptionThrown":
            self.errors.append(details["exceptionDetails"].get("exception", {}).get("description", "exception"))
        elif event["method"] == "Log.entryAdded" and details["entry"]["level"] == "error":
            self.errors.append(details["entry"]["text"])

    async def _close(self):
        await self._socket.close()
        await self._session.close()


def main() -> None:
    """A picture of an MLflow page for the docs: ``python -m tests.flows.chromium ADDRESS FILE.png``."""
    address, file = sys.argv[1:]
    close = "document.querySelector('[data-component-id=\"mlflow.assistant.chat_panel.close\"]')"
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, Page(Path(folder), 1400, 900) as page:
        page.open(address)
        page.wait("document.querySelectorAll('.ag-row').length > 2")
        page.wait(close)
        page.evaluate(f"{close}.click()")
        time.sleep(5)  # charts come one after the other, and redraw
        page.screenshot(Path(file))


if __name__ == "__main__":
    main()
