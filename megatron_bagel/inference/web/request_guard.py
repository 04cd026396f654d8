# SPDX-License-Identifier: Apache-2.0
"""Adds the checks that gradio lacks: it refuses requests of other sites' pages and oversized requests, and loads nothing from outside.

gradio hides its answers from scripts of other origins (CORS), but still executes their requests. A browser names the origin of every
such request, so the guard can refuse it unread.
"""

from __future__ import annotations

import json
from http import HTTPStatus
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from megatron_bagel.common.json_text import MAX_JSON_DEPTH, check_encodable, parse_json

#: Gradio's page contains scripts and styles, and compiles some at run time; everything else comes from the page's server.
_POLICY = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; frame-ancestors 'none'; form-action 'self'; base-uri 'self'"
_HEADERS = {"Content-Security-Policy": _POLICY, "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}


class PageGuard:
    """ASGI middleware that limits a request to ``max_bytes``, and its JSON to ``max_json_depth`` levels."""

    def __init__(self, app: ASGIApp, max_bytes: int, max_json_depth: int = MAX_JSON_DEPTH) -> None:
        self._app, self._max_bytes, self._max_json_depth = app, max_bytes, max_json_depth

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(_HEADERS)
            await send(message)

        headers = Headers(scope=scope)
        refusal = self._refusal(scope["method"], headers)
        if refusal is None and scope["method"] == "POST" and "json" in headers.get("content-type", ""):
            body = await self._body(receive)
            receive = _replayed(body, receive)
            refusal = _json_refusal(body, self._max_json_depth) if body else None
        app = self._app if refusal is None else PlainTextResponse(refusal[1], refusal[0])
        await app(scope, receive, send_with_headers)

    async def _body(self, receive: Receive) -> bytes:
        """Return the body of a request, or its beginning if it is longer than it said."""
        body, more = b"", True
        while more and len(body) <= self._max_bytes:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
        return body

    def _refusal(self, method: str, headers: Headers) -> tuple[HTTPStatus, str] | None:
        origin, length = headers.get("origin"), headers.get("content-length", "")
        if origin is not None and urlsplit(origin).netloc != headers.get("host"):
            return HTTPStatus.FORBIDDEN, f"this page does not accept requests from {origin}"
        if method != "POST":
            return None
        if not length.isdigit():
            return HTTPStatus.LENGTH_REQUIRED, "the request must state its length"
        if int(length) > self._max_bytes:
            return HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"a request may have {self._max_bytes} bytes; send a smaller image"
        return None


def _json_refusal(body: bytes, max_depth: int) -> tuple[HTTPStatus, str] | None:
    """Refuse JSON that would end in an error of the server: nested too deep, with endless numbers, or with half a character."""
    try:
        check_encodable(json.dumps(parse_json(body, max_depth=max_depth), ensure_ascii=False))
    except ValueError as error:
        return HTTPStatus.BAD_REQUEST, f"the request cannot be read: {error}"
    return None


def _replayed(body: bytes, receive: Receive) -> Receive:
    """Return a ``receive`` that gives the body once more, and then what follows it."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive_again() -> Message:
        return messages.pop() if messages else await receive()

    return receive_again
