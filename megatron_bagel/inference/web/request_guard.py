"""Adds the checks that gradio lacks: it refuses requests of other sites' pages and oversized requests, and loads nothing from outside.

gradio hides its answers from scripts of other origins (CORS), but still executes their requests. A browser names the origin of every
such request, so the guard can refuse it unread.
"""

from __future__ import annotations

from http import HTTPStatus
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

#: Gradio's page contains scripts and styles, and compiles some at run time; everything else comes from the page's server.
_POLICY = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; frame-ancestors 'none'; form-action 'self'; base-uri 'self'"
_HEADERS = {"Content-Security-Policy": _POLICY, "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}


class PageGuard:
    """ASGI middleware that limits a request to ``max_bytes``."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app, self._max_bytes = app, max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(_HEADERS)
            await send(message)

        refusal = self._refusal(scope["method"], Headers(scope=scope))
        app = self._app if refusal is None else PlainTextResponse(refusal[1], refusal[0])
        await app(scope, receive, send_with_headers)

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
