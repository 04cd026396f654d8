# SPDX-License-Identifier: Apache-2.0
"""A headless Chromium driven over WebDriver's HTTP, with the standard library alone: Debian's chromium and chromium-driver."""

from __future__ import annotations

import http.client
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.waiting import PATIENCE

PROGRAMS = (("chromium", "chromium-browser", "google-chrome"), ("chromedriver",))
_ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the key under which WebDriver names an element
_QUIET = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
)  # fmt: skip


def installed() -> bool:
    """Whether this machine has a browser and its driver."""
    return all(any(map(shutil.which, names)) for names in PROGRAMS)


class Browser:
    """One tab."""

    def __init__(self, port: int, profile: Path) -> None:
        self._port, self._session = port, ""
        binary = next(filter(None, map(shutil.which, PROGRAMS[0])))
        options = {"binary": binary, "args": [*_QUIET, f"--user-data-dir={profile}"]}
        made = self._ask("POST", "/session", {"capabilities": {"alwaysMatch": {"goog:chromeOptions": options}}})
        self._session = f"/session/{made['sessionId']}"

    def open(self, url: str) -> None:
        """Load a page."""
        self._ask("POST", "/url", {"url": url})

    def type(self, css: str, text: str) -> None:
        """Replace what a field holds, key by key; for a file field, choose the file."""
        element = self._element(css)
        if self.run("return arguments[0].type !== 'file'", element):
            self._ask("POST", f"/element/{element[_ELEMENT]}/clear", {})
        self._ask("POST", f"/element/{element[_ELEMENT]}/value", {"text": text})

    def click(self, css: str) -> None:
        """Click the first element."""
        self._ask("POST", f"/element/{self._element(css)[_ELEMENT]}/click", {})

    def run(self, script: str, *arguments: Any) -> Any:
        """What JavaScript returns."""
        return self._ask("POST", "/execute/sync", {"script": script, "args": list(arguments)})

    def close(self) -> None:
        """End the browser."""
        self._ask("DELETE", "")

    def _element(self, css: str) -> dict[str, str]:
        return self._ask("POST", "/element", {"using": "css selector", "value": css})

    def _ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=PATIENCE)
        connection.request(method, self._session + path, None if body is None else json.dumps(body), {"Content-Type": "application/json"})
        answer = json.loads(connection.getresponse().read())["value"]
        connection.close()
        if isinstance(answer, dict) and "error" in answer:
            raise RuntimeError(f"{answer['error']}: {answer['message']}")
        return answer


@contextmanager
def browser(profile: Path) -> Iterator[Browser]:
    """A browser with a new ``profile`` folder; it and its driver end with the block."""
    driver = subprocess.Popen(["chromedriver", "--port=0"], stdout=subprocess.PIPE, text=True)
    try:
        started = (re.search(r"started successfully on port (\d+)", line) for line in driver.stdout or ())
        told = next(filter(None, started), None)
        if told is None:
            raise RuntimeError("chromedriver ended without listening")
        tab = Browser(int(told.group(1)), profile)
        try:
            yield tab
        finally:
            tab.close()
    finally:
        driver.terminate()
        driver.wait()
