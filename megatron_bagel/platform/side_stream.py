# SPDX-License-Identifier: Apache-2.0
"""Second queues of work for the device, beside the one of the training step. On a CPU their work is done at once."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch


def apart(device: torch.device) -> AbstractContextManager[object]:
    """Run a block on a CUDA stream that waits for nothing queued elsewhere, for numbers of the host alone. A CPU has no streams."""
    return torch.cuda.stream(_stream_of_host_numbers(device)) if device.type == "cuda" else nullcontext()


@cache
def _stream_of_host_numbers(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


class SideStream:
    """Runs work on a CUDA stream of its own, in the order in which it is queued. Without a GPU there is no stream."""

    def __init__(self, device: torch.device | str) -> None:
        self.device = torch.device(device)
        self._stream: torch.cuda.Stream | None = None  # made with the first work, because most runs have none

    def queue(self, work: Callable[[], list[torch.Tensor]]) -> Callable[[], list[torch.Tensor]]:
        """Queue ``work`` behind what the current stream holds now, and beside what it gets later.

        Args:
            work: Computes tensors. It may read what the current stream has written, and must not make the host wait.

        Returns:
            A function that makes the stream current at its call wait for the work, and returns the tensors. The host does not wait.
        """
        if self.device.type != "cuda":
            tensors = work()
            return lambda: tensors
        return self._queue_on_gpu(work)

    def _queue_on_gpu(self, work: Callable[[], list[torch.Tensor]]) -> Callable[[], list[torch.Tensor]]:
        stream = self._stream = self._stream or torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            tensors = work()
            finished = stream.record_event()

        def hand_over() -> list[torch.Tensor]:
            reader = torch.cuda.current_stream(self.device)
            reader.wait_event(finished)
            for tensor in tensors:
                tensor.record_stream(reader)  # or their memory could be given to later side work while the reader still uses it
            return tensors

        return hand_over
