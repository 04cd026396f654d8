"""The page answers as generation does, and refuses what is too large, malformed, or sent by another site's page."""

from __future__ import annotations

import base64
import http.client
import io
import json
from typing import Any

import pytest
from PIL import Image

from megatron_bagel.inference import serve
from megatron_bagel.inference.engine import Engine
from megatron_bagel.inference.noise import KeyedNoise
from megatron_bagel.inference.requests import Request, answer
from tests.inference.page import IMAGE, TEXT, picture_of


def post(port: int, body: Any, path: str = "/answer", **headers: str) -> tuple[int, dict[str, str]]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    connection.request("POST", path, content, {"Content-Type": "application/json", **headers})
    reply = connection.getresponse()
    return reply.status, json.loads(reply.read())


def test_page_and_answers(port: int, engine: Engine) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("GET", "/")
    page = connection.getresponse()
    assert page.status == 200 and b'fetch("answer"' in page.read()
    status, drawn = post(port, {"terms": [{"text": "a red circle"}], "size": "16x24", "seed": 3, "text_scale": 2.0, "img_scale": 1})
    assert status == 200 and set(drawn) == {"image"}
    sampling = serve.replace(IMAGE, guidance=serve.replace(IMAGE.guidance, text_scale=2.0, img_scale=1.0))
    (expected,) = answer(engine, [Request(("a red circle",), size=(16, 24))], [KeyedNoise(3)], TEXT, sampling)
    assert (picture_of(drawn["image"]) == expected.image).all()
    # The next turn sends the whole conversation, the drawn picture included.
    terms = [{"text": "a red circle"}, {"image": drawn["image"]}, {"text": "what color is it?"}]
    status, said = post(port, {"terms": terms, "output": "text", "think": True})
    assert status == 200 and "text" in said


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({}, "terms must be a list"),
        ({"terms": [{"text": "a"}] * 65}, "1 to 64"),
        ({"terms": [{"text": 3}]}, "must be a string"),
        ({"terms": [{"sound": "a"}]}, "a term is"),
        ({"terms": [{"image": "data:image/png;base64,!!"}]}, "base64"),
        ({"terms": [{"image": "data:image/png;base64," + base64.b64encode(b"no image").decode()}]}, "not a readable image"),
        ({"terms": [{"text": "a"}], "size": "17x16"}, "height 17"),
        ({"terms": [{"text": "a"}], "steps": 10_000}, "at most 200"),
        ({"terms": [{"text": "a"}], "seed": "x"}, "seed is 'x'"),
        ({"terms": [{"text": "a"}], "output": "sound"}, "output 'sound'"),
        (b"{", "Expecting"),
        ([1], "expected an object"),
    ],
)
def test_what_cannot_be_is_said(port: int, body: Any, said: str) -> None:
    status, reply = post(port, body)
    assert status == 400 and said in reply["error"]


def test_images_beyond_the_limit_are_refused(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "MAX_PIXELS", 100)
    buffer = io.BytesIO()
    Image.new("RGB", (11, 10)).save(buffer, format="PNG")
    url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    status, reply = post(port, {"terms": [{"image": url}, {"text": "a"}]})
    assert status == 400 and "above the limit" in reply["error"]


def test_requests_of_others_are_refused(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    body = {"terms": [{"text": "a"}]}
    assert post(port, body, Host="evil.example")[0] == 403
    assert post(port, body, **{"Content-Type": "text/plain"})[0] == 415
    assert post(port, body, path="/other")[0] == 404
    monkeypatch.setattr(serve, "MAX_BYTES", 10)
    assert post(port, body)[0] == 413
