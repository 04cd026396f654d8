# SPDX-License-Identifier: Apache-2.0
"""Serves the page over HTTP: gradio inside a server that restricts who may send requests."""

from __future__ import annotations

import logging
import socket

import gradio as gr
import uvicorn
from fastapi import FastAPI
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware

from megatron_bagel.inference.web.chat_session import MAX_BYTES, ChatSession
from megatron_bagel.inference.web.page import build_page
from megatron_bagel.inference.web.request_guard import PageGuard

#: Bytes of an upload besides its image.
_UPLOAD_OVERHEAD = 2**16
#: Pictures of small models are only a few pixels wide. Gradio's button to share a picture works only on Hugging Face Spaces.
_CSS = "#talk img { min-width: 8rem; object-fit: contain; } #talk a[download] ~ button { display: none; }"


def make_server(session: ChatSession, host: str, folder: str) -> uvicorn.Server:
    """Return the page's server, to be started with ``run(sockets=[a socket on host])``; pictures are stored in ``folder``."""
    # Another site may point its name at this machine (DNS rebinding), so only the page's names are accepted.
    names = ["127.0.0.1", "localhost", "[::1]"] if host in ("127.0.0.1", "localhost", "::1") else ["*"]
    guard = Middleware(PageGuard, max_bytes=MAX_BYTES + _UPLOAD_OVERHEAD, max_json_depth=session.limits.max_json_depth)
    middleware = [Middleware(TrustedHostMiddleware, allowed_hosts=names), guard]
    app = gr.mount_gradio_app(
        FastAPI(openapi_url=None, middleware=middleware), build_page(session, folder), "/", show_error=True, max_file_size=MAX_BYTES,
        footer_links=[], run_history=False, ssr_mode=False, enable_monitoring=False, mcp_server=False, css=_CSS,
        theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
    )  # fmt: skip
    return _Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1), session)


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, session: ChatSession) -> None:
        super().__init__(config)
        self._session = session

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        # A graceful shutdown would wait for a reply.
        self._session.close()
        # An open page holds a connection that never ends; uvicorn cuts it after its timeout and logs a traceback for each.
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        await super().shutdown(sockets)
