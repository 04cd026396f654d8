"""``--serve``: a page on this machine to draw, to change pictures and to talk about them, with the standard library's server alone.

The browser keeps the conversation and sends all of it each time; the server keeps nothing. Requests must be JSON, which a page of another
origin cannot send without being asked for permission, and must name the address the server listens on, so that no other site's page can
use a model that was meant for its owner.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
import threading
from dataclasses import dataclass, replace
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
from PIL import Image

from megatron_bagel.data.transforms import decode_rgb
from megatron_bagel.inference.arguments import parse_size
from megatron_bagel.inference.engine import Engine
from megatron_bagel.inference.image import ImageSampling
from megatron_bagel.inference.noise import KeyedNoise
from megatron_bagel.inference.requests import Request, Term, answer
from megatron_bagel.inference.sampling import TextSampling
from megatron_bagel.inference.serve_page import PAGE

#: Limits of one request: bytes (images travel as base64), pixels of an image, terms of a conversation, Euler steps.
MAX_BYTES, MAX_PIXELS, MAX_TERMS, MAX_STEPS = 32 * 2**20, 2**24, 64, 200
LOCAL = ("127.0.0.1", "localhost", "::1")


@dataclass
class Desk:
    """Answers one request after another with the settings of the command line where a request names none."""

    engine: Engine
    text: TextSampling
    image: ImageSampling

    def __post_init__(self) -> None:
        self._turn = threading.Lock()

    def answer(self, body: dict[str, Any]) -> dict[str, str]:
        """``text``, ``thought`` and ``image`` (a data URL), whichever there are. Raises ValueError for a request that cannot be."""
        terms = [_term(term) for term in _list(body, "terms")]
        size = parse_size(body["size"]) if body.get("size") else None
        request = Request(tuple(terms), str(body.get("output", "image")), bool(body.get("think", False)), size=size)
        if request.output == "image":
            self.engine.need_autoencoder()
            if size is not None:
                self.engine.latent_grid(*size)
        guidance = replace(
            self.image.guidance,
            text_scale=_number(body, "text_scale", self.image.guidance.text_scale),
            img_scale=_number(body, "img_scale", self.image.guidance.img_scale),
        )
        steps = int(_number(body, "steps", self.image.num_timesteps - 1))
        if steps > MAX_STEPS:
            raise ValueError(f"steps is {steps}; at most {MAX_STEPS} are made here")
        image = replace(self.image, num_timesteps=steps + 1, guidance=guidance)
        with self._turn:
            (made,) = answer(self.engine, [request], [KeyedNoise(int(_number(body, "seed", 0)))], self.text, image)
        found = {"thought": made.thought and made.thought.text, "text": made.text and made.text.text}
        if made.image is not None:
            found["image"] = _data_url(made.image)
        return {name: value for name, value in found.items() if value is not None}


def make_server(desk: Desk, host: str, port: int) -> ThreadingHTTPServer:
    """A server that listens on ``host`` and ``port`` (0: any free one) and runs with ``serve_forever``."""

    class Handler(BaseHTTPRequestHandler):
        # A request that never ends must not hold its thread for ever.
        timeout = 60

        def do_GET(self) -> None:
            if self.path != "/":
                self._reply(HTTPStatus.NOT_FOUND, {"error": "there is only the page /"})
                return
            self._send(HTTPStatus.OK, "text/html; charset=utf-8", PAGE.encode())

        def do_POST(self) -> None:
            refusal = _refusal(self, host)
            if refusal is not None:
                self.close_connection = True
                self._reply(*refusal)
                return
            try:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if not isinstance(body, dict):
                    raise ValueError(f"expected an object, found {type(body).__name__}")
                self._reply(HTTPStatus.OK, desk.answer(body))
            except ValueError as error:
                self._reply(HTTPStatus.BAD_REQUEST, {"error": str(error)})

        def _reply(self, status: HTTPStatus, content: dict[str, str]) -> None:
            self._send(status, "application/json", json.dumps(content).encode())

        def _send(self, status: HTTPStatus, kind: str, content: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("X-Content-Type-Options", "nosniff")
            self.end_headers()
            self.wfile.write(content)

    return ThreadingHTTPServer((host, port), Handler)


def _refusal(request: BaseHTTPRequestHandler, host: str) -> tuple[HTTPStatus, dict[str, str]] | None:
    """Why a POST is not even read, or None."""
    named = request.headers.get("Host", "").rsplit(":", 1)[0].strip("[]")
    length = request.headers.get("Content-Length", "")
    if host in LOCAL and named not in LOCAL:
        return HTTPStatus.FORBIDDEN, {"error": f"this page is served to this machine alone, not to {named}"}
    if request.path != "/answer":
        return HTTPStatus.NOT_FOUND, {"error": "questions go to /answer"}
    if request.headers.get_content_type() != "application/json":
        return HTTPStatus.UNSUPPORTED_MEDIA_TYPE, {"error": "send application/json"}
    if not length.isdigit():
        return HTTPStatus.LENGTH_REQUIRED, {"error": "say how long the request is"}
    if int(length) > MAX_BYTES:
        return HTTPStatus.REQUEST_ENTITY_TOO_LARGE, {"error": f"a request may have {MAX_BYTES // 2**20} MB; send a smaller image"}
    return None


def _list(body: dict[str, Any], name: str) -> list[Any]:
    value = body.get(name)
    if not isinstance(value, list) or not 0 < len(value) <= MAX_TERMS:
        raise ValueError(f"{name} must be a list of 1 to {MAX_TERMS} texts and images")
    return value


def _number(body: dict[str, Any], name: str, usual: float) -> float:
    value = body.get(name, usual)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name} is {value!r}, not a number")
    return value


def _term(term: Any) -> Term:
    if not (isinstance(term, dict) and len(term) == 1 and set(term) <= {"text", "image"}):
        raise ValueError('a term is {"text": ...} or {"image": a data URL}')
    ((kind, value),) = term.items()
    if not isinstance(value, str):
        raise ValueError(f"the {kind} of a term must be a string")
    return value if kind == "text" else _decoded(value)


def _decoded(url: str) -> Image.Image:
    try:
        data = base64.b64decode(url.partition(",")[2], validate=True)
    except binascii.Error as error:
        raise ValueError(f"an image must be a data URL in base64 ({error})") from error
    return decode_rgb(data, MAX_PIXELS)


def _data_url(pixels: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
