# SPDX-License-Identifier: Apache-2.0
"""Reads the next tensor while the last one is written: converting keeps the disk busy both ways, with one more tensor in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import torch

from megatron_bagel.platform import enter_thread

TensorGetter = Callable[[str], torch.Tensor]


@contextmanager
def read_ahead(get: TensorGetter, names: Sequence[str]) -> Iterator[TensorGetter]:
    """Yield a getter that reads the next of ``names`` in a separate thread before the caller requests it.

    Names may also be requested in another order, but then nothing is read early. A request raises the errors of ``get``.
    """
    next_names = dict(zip(names, names[1:], strict=False))
    with ThreadPoolExecutor(max_workers=1, initializer=enter_thread) as pool:
        pending: dict[str, Future[torch.Tensor]] = {}

        def get_and_prefetch(name: str) -> torch.Tensor:
            future = pending.pop(name, None)
            tensor = future.result() if future is not None else pool.submit(get, name).result()
            if name in next_names and not pending:
                pending[next_names[name]] = pool.submit(get, next_names[name])
            return tensor

        yield get_and_prefetch
