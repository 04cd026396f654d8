"""The page over HTTP: gradio in a server of its own, which is told who may ask."""

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

#: What an upload says beside its image.
_AROUND_AN_IMAGE = 2**16
#: Pictures of small models are a few pixels wide. Gradio's button to share a picture works on Hugging Face Spaces alone.
_CSS = "#talk img { min-width: 8rem; object-fit: contain; } #talk a[download] ~ button { display: none; }"


def make_server(desk: ChatSession, host: str, folder: str) -> uvicorn.Server:
    """The page's server, which runs by ``run(sockets=[a socket that listens on host])``; pictures lie in ``folder`` meanwhile."""
    # A name that another site points at this machine (DNS rebinding) is none that the page goes by.
    names = ["127.0.0.1", "localhost", "[::1]"] if host in ("127.0.0.1", "localhost", "::1") else ["*"]
    middleware = [Middleware(TrustedHostMiddleware, allowed_hosts=names), Middleware(PageGuard, max_bytes=MAX_BYTES + _AROUND_AN_IMAGE)]
    app = gr.mount_gradio_app(
        FastAPI(openapi_url=None, middleware=middleware), build_page(desk, folder), "/", show_error=True, max_file_size=MAX_BYTES,
        footer_links=[], run_history=False, ssr_mode=False, enable_monitoring=False, mcp_server=False, css=_CSS,
        theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
    )  # fmt: skip
    return _Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1), desk)


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, desk: ChatSession) -> None:
        super().__init__(config)
        self._desk = desk

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        # A reply would be waited for.
        self._desk.close()
        # An open page holds a connection that never ends by itself; uvicorn cuts it after its timeout, with a traceback for each.
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        await super().shutdown(sockets)
