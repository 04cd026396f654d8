# SPDX-License-Identifier: Apache-2.0
"""The page in a real browser: what a person does on it, and what it shows when a turn cannot be."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megatron_bagel.inference.core.engine import Engine
from megatron_bagel.inference.web.chat_session import MAX_BYTES
from tests.browser import Browser, browser, installed
from tests.inference.web.page import Served, directly, same, served
from tests.waiting import eventually

pytest.importorskip("gradio", reason="no gradio here: bash tests/page.sh")
pytestmark = pytest.mark.skipif(not installed(), reason="no Chromium here (Debian: apt-get install chromium chromium-driver)")
#: What the conversation shows: of each bubble who speaks, its words, and the addresses of its pictures.
TURNS = """return [...document.querySelectorAll('#talk .message-row')].map(row =>
    [row.className.includes('user-row') ? 'user' : 'model', row.innerText.trim(), [...row.querySelectorAll('img')].map(img => img.src)])"""
#: A picture's pixels, as the browser has decoded them.
PIXELS = """const img = [...document.querySelectorAll('#talk img')].pop(), canvas = document.createElement('canvas');
    [canvas.width, canvas.height] = [img.naturalWidth, img.naturalHeight];
    canvas.getContext('2d').drawImage(img, 0, 0);
    return img.complete && canvas.toDataURL();"""


@pytest.fixture(scope="module")
def page(tiny_folder: Path) -> Iterator[Served]:
    with served(tiny_folder) as page:
        yield page


@pytest.fixture
def tab(page: Served, tmp_path: Path) -> Iterator[Browser]:
    with browser(tmp_path / "profile") as tab:
        tab.open(page.url)
        eventually(lambda: tab.run("return !!document.querySelector('#message textarea') && !!document.querySelector('#img_scale input')"))
        fill(tab, size="16x24", steps="2", seed="3", text_scale="2", img_scale="1")
        yield tab


def fill(tab: Browser, **fields: str) -> None:
    """Fill fields in."""
    for name, text in fields.items():
        tab.type(f"#{name} {'textarea' if name == 'size' else 'input'}", text)


def send(tab: Browser, prompt: str, turns: int) -> list[tuple[str, str, list[str]]]:
    """Write and send, and wait until ``turns`` bubbles are there and the next can be written; returns the bubbles."""
    tab.type("#message textarea", prompt)
    tab.click("#message .submit-button")
    return eventually(lambda: idle(tab) and len(shown := tab.run(TURNS)) == turns and shown)


def idle(tab: Browser) -> bool:
    """Whether the turn has ended: no spinner, and the page would send another."""
    return tab.run("return document.querySelector('#talk [data-testid=status-tracker]').classList.contains('hide')")


def picture(tab: Browser) -> np.ndarray:
    """Pixels of the last picture shown."""
    url = eventually(lambda: tab.run(PIXELS))
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).convert("RGB"))


def test_a_conversation_draws_changes_and_answers(tab: Browser, engine: Engine, tmp_path: Path) -> None:
    send(tab, "a red circle", 2)
    drawn = directly(engine, "a red circle", size=(16, 24), seed=3)
    assert same(picture(tab), drawn.image)
    # The whole conversation goes along: the change is made to the picture that was drawn.
    tab.click("#think input")
    *_, (_, said, _) = send(tab, "make it blue", 4)
    changed = directly(engine, "a red circle", Image.fromarray(drawn.image), "make it blue", size=(16, 24), seed=3, think=True)
    assert same(picture(tab), changed.image) and said == f"Thought\n{changed.thought.text}".strip()
    # A long drawing is stopped by starting again.
    fill(tab, steps="200", size="64x64")
    tab.type("#message textarea", "a long one")
    tab.click("#message .submit-button")
    eventually(lambda: len(tab.run(TURNS)) == 5)
    tab.click("#again")
    eventually(lambda: not tab.run(TURNS))
    tab.click("#think input")
    tab.click("#output input[value=text]")
    photo = Image.new("RGB", (24, 16), "blue")
    photo.save(tmp_path / "photo.png")
    tab.type("#message input[type=file]", str(tmp_path / "photo.png"))
    eventually(lambda: tab.run("return !!document.querySelector('#message img')"))
    (_, _, asked), (_, said, _) = send(tab, "what color is it?", 2)
    assert len(asked) == 1 and said == directly(engine, photo, "what color is it?", output="text", seed=3).text.text
    assert tab.run("return !document.querySelector('#message img')"), "an image that was sent is not sent again"


def test_what_cannot_be_is_shown_and_the_conversation_goes_on(tab: Browser, engine: Engine, page: Served, tmp_path: Path) -> None:
    fill(tab, size="<img src=gone>")
    words = "**a** <img src=gone onerror=alert(1)> $$x$$ &amp; [b](http://evil.example)"
    (_, said, _), (_, wrong, pictures) = send(tab, words, 2)
    assert said == words, "words are shown as words, whatever they look like"
    assert wrong.startswith("This cannot be") and "<img src=gone> is not of the form HxW" in wrong and not pictures
    (tmp_path / "large.png").write_bytes(bytes(MAX_BYTES + 1))
    tab.type("#message input[type=file]", str(tmp_path / "large.png"))
    eventually(lambda: "maximum allowed size of 32" in tab.run("return document.body.innerText"))
    fill(tab, size="16x24")
    send(tab, "a red circle", 4)
    assert same(picture(tab), directly(engine, "a red circle", size=(16, 24), seed=3).image)
    loaded = tab.run("return performance.getEntriesByType('resource').map(entry => entry.name)")
    assert loaded and all(name.startswith((page.url, "data:", "blob:")) for name in loaded), "nothing comes from elsewhere"
