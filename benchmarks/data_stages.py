# SPDX-License-Identifier: Apache-2.0
"""Where the loader's time goes: processor seconds of each stage on the way from a plan to pixels in the training process.

``benchmarks/data.py --part stages`` prints it. One process does all stages one after the other, on one thread, and then the whole
work of the plain reader (``plain_reader.py``).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from unittest.mock import patch

import torch

from benchmarks.data_reading import PATCH, World, make_world
from megatron_bagel.data.index import reader as index_reader
from megatron_bagel.data.loading import pack_reader
from megatron_bagel.data.loading.memory_transfer import Parcel
from megatron_bagel.data.planner import group_source
from megatron_bagel.data.transforms import ready_images, ready_patches

STAGES = ("plan", "samples", "layout", "bytes", "decode", "resize", "patches and buffers", "send", "receive", "normalize")


class Clock:
    """Processor seconds by stage. A stage inside another one is taken out of the outer one."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(STAGES, 0.0)
        self._inside = [0.0]

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        began = time.process_time()
        self._inside.append(0.0)
        try:
            yield
        finally:
            taken = time.process_time() - began
            self.seconds[stage] += taken - self._inside.pop()
            self._inside[-1] += taken


def measure_stages(rows: int, side: int, capacity: int, packs: int) -> dict[str, object]:
    """Microseconds per sample of each stage, over ``packs`` packs after the first."""
    with make_world(rows, side, capacity) as world:
        clock, samples = _read(world, packs)
        plain = _plain_seconds(world, packs)
    per_sample = {stage: seconds / samples * 1e6 for stage, seconds in clock.seconds.items()}
    return {
        "rows": rows, "side": side, "capacity": capacity, "packs": packs, "samples": samples,
        "microseconds_per_sample": per_sample, "sum": sum(per_sample.values()), "plain_microseconds_per_sample": plain * 1e6,
        "times_plain": plain * 1e6 / sum(per_sample.values()),
    }  # fmt: skip


def _read(world: World, packs: int) -> tuple[Clock, int]:
    loader, clock, samples = world.loader(), Clock(), 0
    loader.reader.threads.threads = 0  # processor time of other threads would not be counted
    next(loader)
    with _watched(clock):
        for _ in range(packs):
            with clock("plan"):
                (plan,) = loader.plan_next()
            with clock("patches and buffers"):
                loaded = loader.reader[plan]
            with clock("send"):
                parcel = Parcel.of(loaded)
            with clock("receive"):
                loaded = _received(parcel)
            with clock("normalize"):
                _ = ready_images(loaded.vae_images(), "cpu"), ready_patches(loaded.vit_images(), PATCH, "cpu")
            samples += len(plan.samples)
    return clock, samples


def _plain_seconds(world: World, packs: int) -> float:
    """Processor seconds per sample of the plain reader, which follows the original's algorithm, in one process and without a transfer."""
    reader = iter(world.plain())
    next(reader)
    began = time.process_time()
    samples = sum(pack.count for pack in islice(reader, packs))
    return (time.process_time() - began) / samples


def _received(parcel: Parcel) -> pack_reader.LoadedPack:
    """Open a parcel in the process that made it, and read its pages as another process would."""
    loaded = parcel.open()
    for values in (loaded.vit_patches, loaded.vae_buffer):
        values.view(-1).view(torch.uint8)[::4096].sum()
    return loaded


@contextmanager
def _watched(clock: Clock) -> Iterator[None]:
    """Count the functions of the stages that the reader calls."""

    def watched(function, stage):  # type: ignore[no-untyped-def]
        def call(*args, **kwargs):  # type: ignore[no-untyped-def]
            with clock(stage):
                return function(*args, **kwargs)

        return call

    functions = (
        (group_source.GroupSource, "sample", "samples"), (pack_reader, "build_pack", "layout"),
        (index_reader.DatasetReader, "image_bytes", "bytes"), (index_reader.DatasetReader, "picture", "decode"),
        (group_source, "resized", "resize"),
    )  # fmt: skip
    patches = [patch.object(owner, name, watched(getattr(owner, name), stage)) for owner, name, stage in functions]
    for one in patches:
        one.start()
    try:
        yield
    finally:
        for one in patches:
            one.stop()
