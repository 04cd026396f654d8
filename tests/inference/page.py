"""The page served by a thread of this process, for its tests over HTTP and in a browser."""

from __future__ import annotations

import base64
import io
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import Image

from megatron_bagel.inference import serve
from megatron_bagel.inference.engine import Engine
from megatron_bagel.inference.image import ImageSampling
from megatron_bagel.inference.sampling import TextSampling

TEXT, IMAGE = TextSampling(max_length=6), ImageSampling(num_timesteps=3)


@contextmanager
def served(engine: Engine) -> Iterator[int]:
    """The port on which the page answers within the block."""
    server = serve.make_server(serve.Desk(engine, TEXT, IMAGE), "127.0.0.1", 0)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def picture_of(url: str) -> np.ndarray:
    """Pixels of a data URL."""
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))))
