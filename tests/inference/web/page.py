# SPDX-License-Identifier: Apache-2.0
"""The page of the tiny model as the command serves it, in a process of its own, for its tests over HTTP and in a browser."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_bagel.cli import generate
from megatron_bagel.inference.batch.requests import Answer, Request, answer
from megatron_bagel.inference.core.engine import Engine
from megatron_bagel.inference.core.guidance import Guidance
from megatron_bagel.inference.core.image_sampling import ImageSampling
from megatron_bagel.inference.core.noise import KeyedNoise
from megatron_bagel.inference.core.sampling import TextSampling
from tests.waiting import PATIENCE

QUICK = ("--num-timesteps", "3", "--max-length", "6", "--vae-transform", "32", "16", "--vit-transform", "42", "14")


@dataclass(frozen=True)
class Served:
    """A page that is there: its port, and its process."""

    port: int
    process: multiprocessing.Process

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/"


@contextmanager
def served(model: Path) -> Iterator[Served]:
    """``--serve`` on a free port, from a fork, which has Megatron-Core imported already; ended as by Ctrl-C."""
    context = multiprocessing.get_context("fork")
    reading, writing = os.pipe()
    process = context.Process(target=_serve, args=(model, writing))
    process.start()
    os.close(writing)
    with open(reading) as said:
        try:
            told = next(filter(None, (re.search(r"http://127\.0\.0\.1:(\d+)/", line) for line in said)), None)
            if told is None:
                raise RuntimeError("the page ended before it was there")
            yield Served(int(told.group(1)), process)
        finally:
            if process.is_alive():
                os.kill(process.pid, signal.SIGINT)
            process.join(PATIENCE)
            process.kill()


def _serve(model: Path, output: int) -> None:
    sys.addaudithook(_stay_here)
    os.dup2(output, 1)
    with open(1, "w", closefd=False) as stdout:
        sys.stdout = stdout
        status = generate.main(["--model", str(model), "--serve", "--port", "0", *QUICK])
    os._exit(status)


def _stay_here(event: str, details: tuple) -> None:
    """End the page where it turns to another machine."""
    if event not in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname"):
        return
    asked = details[1][0] if event == "socket.connect" and isinstance(details[1], tuple) else details[0]
    if isinstance(asked, str) and asked not in ("127.0.0.1", "localhost"):
        os.write(2, f"the page calls {asked}\n".encode())
        os._exit(3)


def directly(engine: Engine, *terms: object, seed: int, **asked: object) -> Answer:
    """What the engine makes of ``terms``, with two steps and the guidance that the tests fill in."""
    image = ImageSampling(num_timesteps=3, guidance=Guidance(text_scale=2.0, img_scale=1.0))
    (made,) = answer(engine, [Request(terms, **asked)], [KeyedNoise(seed)], TextSampling(max_length=6), image)
    return made


def same(shown: np.ndarray, drawn: np.ndarray | None) -> bool:
    """Whether two pictures agree pixel by pixel."""
    return drawn is not None and shown.shape == drawn.shape and bool((shown == drawn).all())
