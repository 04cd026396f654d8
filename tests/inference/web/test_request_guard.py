# SPDX-License-Identifier: Apache-2.0
"""The guard reads JSON before the page does, and gives the page the same bytes again."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator

import pytest

pytest.importorskip("starlette", reason="no starlette here: bash tests/page.sh")

from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.types import Message, Receive, Scope, Send

from megatron_bagel.common.json_text import MAX_JSON_DEPTH
from megatron_bagel.inference.web.request_guard import PageGuard


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    """An application that answers with the body it received."""
    await PlainTextResponse(await Request(scope, receive).body())(scope, receive, send)


def ask(body: bytes, kind: str = "application/json", pieces: int = 3, depth: int = MAX_JSON_DEPTH) -> tuple[int, bytes]:
    """Status and body of the guard's answer to a POST that arrives in pieces."""
    size = max(1, -(-len(body) // pieces))
    parts: Iterator[bytes] = iter([body[start : start + size] for start in range(0, len(body), size)] or [b""])
    left, answer = -(-len(body) // size) or 1, []

    async def receive() -> Message:
        nonlocal left
        left -= 1
        return {"type": "http.request", "body": next(parts), "more_body": left > 0}

    async def send(message: Message) -> None:
        answer.append(message)

    headers = [(b"host", b"localhost"), (b"content-length", str(len(body)).encode()), (b"content-type", kind.encode())]
    scope = {"type": "http", "method": "POST", "path": "/", "query_string": b"", "headers": headers}
    asyncio.run(PageGuard(echo, 1 << 20, depth)(scope, receive, send))
    return answer[0]["status"], b"".join(message.get("body", b"") for message in answer)


@pytest.mark.parametrize("body", [b"", json.dumps({"data": ["a\U0001f600", [[1]]]}).encode(), b'{"data": "x"}' + b" " * 5000])
def test_a_good_request_reaches_the_page_as_it_was(body: bytes) -> None:
    assert ask(body) == (200, body)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"[" * 200_000, b"nested deeper"),
        (b'{"data": ' + b"7" * 5000 + b"}", b"number that cannot be read"),
        (b'{"data": "\\ud83d"}', b"lone surrogate"),
        (b'{"\\ud83d": 1}', b"lone surrogate"),
        (b"\xff", b"not UTF-8"),
        (b"{", b"not JSON"),
    ],
)
def test_bad_json_is_refused_with_a_sentence(body: bytes, said: bytes) -> None:
    status, answer = ask(body)
    assert status == 400 and said in answer


def test_the_depth_is_that_of_the_flag() -> None:
    assert ask(b"[[[1]]]", depth=3) == (200, b"[[[1]]]")
    status, answer = ask(b"[[[1]]]", depth=2)
    assert status == 400 and b"nested deeper than 2 levels" in answer


def test_other_kinds_of_requests_are_not_read() -> None:
    assert ask(b"\xff" * 99, "multipart/form-data") == (200, b"\xff" * 99)
