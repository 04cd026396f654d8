"""The next tensor is read while the last one is written: converting keeps the disk busy both ways, with one tensor more in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import torch

from megatron_bagel.platform import enter_thread

TensorGetter = Callable[[str], torch.Tensor]


@contextmanager
def read_ahead(get: TensorGetter, names: Sequence[str]) -> Iterator[TensorGetter]:
    """A getter that has asked `get` for the next of `names` by the time it is wanted, on a thread of its own.

    Names may be asked for in another order, only then nothing is gained. Errors of `get` are raised when the tensor is asked for.
    """
    after = dict(zip(names, names[1:], strict=False))
    with ThreadPoolExecutor(max_workers=1, initializer=enter_thread) as pool:
        coming: dict[str, Future] = {}

        def ask(name: str) -> torch.Tensor:
            future = coming.pop(name, None)
            tensor = future.result() if future is not None else pool.submit(get, name).result()
            if name in after and not coming:
                coming[after[name]] = pool.submit(get, after[name])
            return tensor

        yield ask
