# SPDX-License-Identifier: Apache-2.0
"""A small video, written by PyAV (the extra ``video``); tests that need it skip without."""

from __future__ import annotations

import io

import numpy as np
import pytest

FRAMES = 20


def video() -> bytes:
    """A clip of 20 frames that grow brighter."""
    av = pytest.importorskip("av")
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in range(FRAMES):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 12 * number, dtype=np.uint8), format="rgb24")
            for packet in stream.encode(frame):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return file.getvalue()
