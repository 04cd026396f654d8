"""The page in a real browser: what a person does on it, and what it shows when a request cannot be."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from megatron_bagel.inference import serve
from megatron_bagel.inference.engine import Engine
from megatron_bagel.inference.noise import KeyedNoise
from megatron_bagel.inference.requests import Request, answer
from tests.browser import Browser, browser, installed
from tests.inference.page import IMAGE, TEXT, picture_of
from tests.waiting import eventually

pytestmark = pytest.mark.skipif(not installed(), reason="no Chromium here (Debian: apt-get install chromium chromium-driver)")


@pytest.fixture
def page(port: int, tmp_path: Path) -> Iterator[Browser]:
    with browser(tmp_path / "profile") as tab:
        tab.open(f"http://127.0.0.1:{port}/")
        yield tab


def send(page: Browser, prompt: str, turns: int, **fields: str) -> None:
    """Fill the form in, send it, and wait until ``turns`` turns are shown and the button works again."""
    for name, text in {"prompt": prompt, **fields}.items():
        page.type(f"#{name}", text)
    page.click("#send")
    eventually(lambda: page.run("return document.querySelectorAll('.turn').length === arguments[0] && !$('send').disabled", turns))


def last(page: Browser, inside: str, value: str) -> str:
    """A property of something inside the last turn."""
    return page.run("return [...document.querySelectorAll('.turn')].pop().querySelector(arguments[0])[arguments[1]]", inside, value)


def test_a_conversation_draws_changes_and_answers(page: Browser, engine: Engine, tmp_path: Path) -> None:
    send(page, "a red circle", 2, size="16x24", steps="2", seed="3", text_scale="2", img_scale="1")
    sampling = serve.replace(IMAGE, guidance=serve.replace(IMAGE.guidance, text_scale=2.0, img_scale=1.0))
    (drawn,) = answer(engine, [Request(("a red circle",), size=(16, 24))], [KeyedNoise(3)], TEXT, sampling)
    shown = picture_of(last(page, "img", "src"))
    assert (shown == drawn.image).all()
    # The whole conversation goes along: the change is made to the picture that was drawn.
    send(page, "make it blue", 4, size="16x24")
    terms = ("a red circle", Image.fromarray(shown), "make it blue")
    (changed,) = answer(engine, [Request(terms, size=(16, 24))], [KeyedNoise(3)], TEXT, sampling)
    assert (picture_of(last(page, "img", "src")) == changed.image).all()
    assert (last(page, "img", "naturalWidth"), last(page, "img", "naturalHeight")) == (24, 16)
    page.click("#again")
    Image.new("RGB", (24, 16), "blue").save(tmp_path / "photo.png")
    page.click("#output option[value=text]")
    send(page, "what color is it?", 2, image=str(tmp_path / "photo.png"))
    request = Request((Image.new("RGB", (24, 16), "blue"), "what color is it?"), output="text")
    (said,) = answer(engine, [request], [KeyedNoise(3)], TEXT, sampling)
    assert said.text is not None and last(page, ".text", "textContent") == said.text.text
    assert page.run("return $('image').files.length") == 0, "an image that was sent is not sent again"


def test_what_cannot_be_is_shown_and_the_conversation_goes_on(
    page: Browser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    send(page, "a", 2, size="17x16")
    assert "height 17" in last(page, ".text", "textContent")
    # Words are shown as words, whatever they look like.
    send(page, "<img src=gone onerror=alert(1)>", 4, size="16x16", steps="2")
    assert page.run("return document.querySelectorAll('.user img').length") == 0
    assert last(page, "img", "naturalWidth") == 16
    monkeypatch.setattr(serve, "MAX_BYTES", 2**20)
    (tmp_path / "large.png").write_bytes(bytes(8 * 2**20))
    send(page, "b", 6, image=str(tmp_path / "large.png"))
    assert "a request may have 1 MB" in last(page, ".text", "textContent")
