# SPDX-License-Identifier: Apache-2.0
"""The page over HTTP: it answers as the engine does, turn after turn, and refuses what is too large or not its own page's."""

from __future__ import annotations

import http.client
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from megatron_bagel.inference.core.engine import Engine
from megatron_bagel.inference.web.chat_session import MAX_BYTES
from tests.inference.web.page import Served, directly, same, served
from tests.waiting import PATIENCE

gradio_client = pytest.importorskip("gradio_client", reason="no gradio here: bash tests/page.sh")


@pytest.fixture(scope="module")
def page(tiny_folder: Path) -> Iterator[Served]:
    with served(tiny_folder) as page:
        yield page


@pytest.fixture
def tab(page: Served, tmp_path: Path) -> Iterator[gradio_client.Client]:
    """A conversation of its own."""
    client = gradio_client.Client(page.url, verbose=False, analytics_enabled=False, download_files=tmp_path)
    yield client
    client.close()
    client.executor.shutdown()


def send(
    tab: gradio_client.Client, text: str, *images: Path, output: str = "image", think: bool = False, size: str = "16x24", steps: int = 2
) -> list:
    """A turn; what the conversation shows after it, as (role, title, "text" or "file", text or path)."""
    message = {"text": text, "files": [gradio_client.handle_file(str(image)) for image in images]}
    _, shown = tab.predict(message, output, think, size, steps, 3, 2.0, 1.0, api_name="/send")
    return [
        (turn["role"], (turn["metadata"] or {}).get("title"), part["type"], part[part["type"]])
        for turn in shown
        for part in turn["content"]
    ]


def pixels(path: str) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_a_conversation_draws_changes_and_answers(tab: gradio_client.Client, engine: Engine, tmp_path: Path) -> None:
    prompt = "a red circle\n  on <b>green</b> & "
    first, (role, title, kind, path) = send(tab, prompt)
    assert first == ("user", None, "text", prompt.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;"))
    drawn = directly(engine, prompt, size=(16, 24), seed=3)
    assert (role, title, kind) == ("assistant", None, "file") and same(pixels(path), drawn.image)
    # The picture that was drawn is changed, and all that was said goes along; a thought is shown, and not read again.
    *_, (_, title, _, thought), (*_, path) = send(tab, "make it blue", think=True, size="")
    picture = Image.fromarray(drawn.image)
    changed = directly(engine, prompt, picture, "make it blue", seed=3, think=True)
    assert (title, thought) == ("Thought", changed.thought.text) and same(pixels(path), changed.image)
    Image.new("RGB", (24, 16), "blue").save(tmp_path / "photo.png")
    *_, (*_, said) = send(tab, "and this?", tmp_path / "photo.png", output="text")
    terms = (prompt, picture, "make it blue", Image.fromarray(changed.image), Image.new("RGB", (24, 16), "blue"), "and this?")
    assert said == directly(engine, *terms, output="text", seed=3).text.text


def test_what_cannot_be_is_shown_and_the_conversation_goes_on(tab: gradio_client.Client, engine: Engine, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_text("no image")
    for said, wrong in (
        ("height 17", send(tab, "a", size="17x16")),
        ("1 to 200", send(tab, "a", steps=201)),
        ("not a readable image", send(tab, "a", tmp_path / "broken.png")),
        ("nothing to read", send(tab, "")),
    ):
        assert wrong[-1][1] == "This cannot be" and said in wrong[-1][3]
    shown = send(tab, "a red circle")
    assert same(pixels(shown[-1][3]), directly(engine, "a red circle", size=(16, 24), seed=3).image), "what failed is not read"
    assert len(shown) > 8, "and stays to be seen"


def ask(page: Served, method: str, path: str, body: bytes = b"", **headers: str) -> tuple[int, str]:
    """(status, text) of a request; ``headers`` with underscores for dashes."""
    connection = http.client.HTTPConnection("127.0.0.1", page.port, timeout=PATIENCE)
    connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
    reply = connection.getresponse()
    status, text = reply.status, reply.read().decode()
    connection.close()
    return status, text


def turn_of(page: Served) -> bytes:
    """The request by which the page sends a turn."""
    config = json.loads(ask(page, "GET", "/config")[1])
    (number,) = (event["id"] for event in config["dependencies"] if event["api_name"] == "send")
    fields: list[Any] = [{"text": "a", "files": []}, None, "image", False, "16x16", 2, 0, 2, 1]
    return json.dumps({"data": fields, "fn_index": number, "session_hash": "other"}).encode()


def test_pages_of_others_cannot_use_it(page: Served) -> None:
    body, kind, join = turn_of(page), "application/json", "/gradio_api/queue/join"
    own = f"http://127.0.0.1:{page.port}"
    assert ask(page, "POST", join, body, Content_Type=kind, Origin=own)[0] == 200
    for origin in ("http://evil.example", "null", f"http://127.0.0.1:{page.port + 1}"):
        assert ask(page, "POST", join, body, Content_Type=kind, Origin=origin)[0] == 403
        assert ask(page, "POST", "/gradio_api/upload", Origin=origin)[0] == 403
    assert ask(page, "GET", "/", Host="evil.example")[0] == 400
    # Nor a program that takes no place in the queue, or asks for a file that is none of the page's.
    assert ask(page, "POST", "/gradio_api/run/send", body, Content_Type=kind)[0] == 404
    assert ask(page, "GET", f"/gradio_api/file={Path(__file__)}")[0] == 403


def test_large_requests_are_refused(page: Served) -> None:
    head, tail = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n', b"\r\n--x--\r\n"
    body = head + bytes(MAX_BYTES + 1) + tail
    status, said = ask(page, "POST", "/gradio_api/upload", body, Content_Type="multipart/form-data; boundary=x")
    assert status == 413 and "maximum allowed size" in said
    for length, expected in ((str(2 * MAX_BYTES), 413), (None, 411)):
        connection = http.client.HTTPConnection("127.0.0.1", page.port, timeout=PATIENCE)
        connection.putrequest("POST", "/gradio_api/queue/join")
        if length is not None:
            connection.putheader("Content-Length", length)
        connection.endheaders()
        assert connection.getresponse().status == expected
        connection.close()


def test_nothing_is_loaded_from_elsewhere(page: Served) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", page.port, timeout=PATIENCE)
    connection.request("GET", "/")
    reply = connection.getresponse()
    assert "default-src 'self'" in reply.headers["Content-Security-Policy"]
    config = json.loads(ask(page, "GET", "/config")[1])
    assert not config["analytics_enabled"] and not config["stylesheets"]


def test_it_ends_with_an_open_page_and_leaves_nothing(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with served(tiny_folder) as page:
        connection = http.client.HTTPConnection("127.0.0.1", page.port, timeout=PATIENCE)
        connection.request("GET", "/gradio_api/heartbeat/a")
        assert connection.getresponse().status == 200 and any(tmp_path.iterdir())
        os.kill(page.process.pid, signal.SIGTERM)
        page.process.join(PATIENCE)
        assert page.process.exitcode == 0 and not [*tmp_path.iterdir()]
