# SPDX-License-Identifier: Apache-2.0
"""A turn at the page's desk: what the engine makes of it, one after another, and one sentence for what cannot be."""

from __future__ import annotations

import io
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from megatron_bagel.common.text_limits import TextLimits
from megatron_bagel.inference.batch.requests import Answer
from megatron_bagel.inference.core.engine import Engine
from megatron_bagel.inference.core.guidance import Guidance
from megatron_bagel.inference.core.image_sampling import ImageSampling
from megatron_bagel.inference.core.sampling import TextSampling
from megatron_bagel.inference.web import chat_session as module
from megatron_bagel.inference.web.chat_session import ChatSession, Reply, read_image
from tests.inference.web.page import directly, same


@pytest.fixture
def desk(engine: Engine) -> ChatSession:
    return ChatSession(engine, TextSampling(max_length=6), ImageSampling(num_timesteps=3, guidance=Guidance(2.0, 1.0)))


def test_a_reply_is_what_the_engine_makes(desk: ChatSession, engine: Engine) -> None:
    assert (desk.default_settings.steps, desk.default_settings.text_scale, desk.default_settings.img_scale) == (2, 2.0, 1.0), (
        "the options of the command line"
    )
    drawn = desk.reply(["a red circle"], replace(desk.default_settings, size="16x24", seed=3))
    assert same(np.asarray(drawn.image), directly(engine, "a red circle", size=(16, 24), seed=3).image)
    assert (drawn.thought, drawn.text, drawn.terms) == (None, None, (drawn.image,))
    changed = desk.reply(["a red circle", drawn.image, "blue"], replace(desk.default_settings, seed=3, think=True))
    expected = directly(engine, "a red circle", drawn.image, "blue", seed=3, think=True)
    assert same(np.asarray(changed.image), expected.image) and changed.thought == expected.thought.text
    said = desk.reply([drawn.image, "what color is it?"], replace(desk.default_settings, output="text"))
    assert said == Reply(text=directly(engine, drawn.image, "what color is it?", output="text", seed=0).text.text)


@pytest.mark.parametrize(
    ("terms", "asked", "said"),
    [
        ([], {}, "at least one text or image"),
        (["a"] * 65, {}, "at most 64"),
        (["a"], {"size": "17x16"}, "height 17"),
        (["a"], {"size": "large"}, "not of the form HxW"),
        (["a"], {"steps": 10_000}, "1 to 200"),
        (["a"], {"steps": 0}, "1 to 200"),
        (["a"], {"seed": None}, "seed is empty"),
        (["a"], {"text_scale": 0.5}, "at least 1"),
        (["a"], {"output": "sound"}, "output 'sound'"),
    ],
)
def test_what_cannot_be_is_said(desk: ChatSession, terms: list[str], asked: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        desk.reply(terms, replace(desk.default_settings, **asked))


def test_a_message_is_as_long_as_the_flag_allows(desk: ChatSession) -> None:
    with pytest.raises(ValueError, match=r"this message: a text has 9 bytes, above the limit of 8 \(--max_text_bytes\)"):
        replace(desk, limits=TextLimits(max_text_bytes=8)).reply(["a" * 8, "a" * 9], desk.default_settings)


def test_a_model_without_an_autoencoder_answers_only(desk: ChatSession, engine: Engine) -> None:
    engine.autoencoder = None
    with pytest.raises(ValueError, match="no autoencoder"):
        desk.reply(["a"], desk.default_settings)
    assert desk.reply(["a"], replace(desk.default_settings, output="text")).text is not None


def test_images_are_read_within_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = io.BytesIO()
    Image.new("RGBA", (11, 10), (0, 0, 0, 0)).save(buffer, format="PNG")
    path = tmp_path / "image.png"
    path.write_bytes(buffer.getvalue())
    assert read_image(path).getpixel((0, 0)) == (255, 255, 255)
    monkeypatch.setattr(module, "MAX_PIXELS", 100)
    with pytest.raises(ValueError, match="above the limit"):
        read_image(path)
    path.write_text("no image")
    with pytest.raises(ValueError, match="not a readable image"):
        read_image(path)


def test_one_reply_after_another(desk: ChatSession, monkeypatch: pytest.MonkeyPatch) -> None:
    at_work, most = [0], [0]

    def slow(*_: Any) -> list[Answer]:
        at_work[0] += 1
        most[0] = max(most[0], at_work[0])
        time.sleep(0.05)
        at_work[0] -= 1
        return [Answer()]

    monkeypatch.setattr(module, "answer", slow)
    threads = [threading.Thread(target=desk.reply, args=(["a"], desk.default_settings)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1]


@pytest.mark.parametrize("output", ["image", "text"])
def test_a_reply_is_stopped_at_the_next_step(desk: ChatSession, output: str) -> None:
    asked, stop = replace(desk.default_settings, output=output), threading.Event()
    stop.set()
    with pytest.raises(ValueError, match="has been stopped"):
        desk.reply(["a"], asked, stop)
    desk.reply(["a"], asked)
    desk.close()
    with pytest.raises(ValueError, match="has been stopped"):
        desk.reply(["a"], asked)
