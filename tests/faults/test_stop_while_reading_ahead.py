# SPDX-License-Identifier: Apache-2.0
"""SIGTERM to a run that encodes the pictures of the next step early: it saves, ends with 0, and continues bit for bit.

When a signal comes, the batch of the next step may be read and its latents queued. Neither may be lost, trained twice, or saved as done.
Ranks signal themselves at the very moment that a case is about, so that no case depends on how fast the machine is.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import threading
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_bagel.checkpoint.dist.step_folders import latest_checkpoint
from megatron_bagel.config.parser import Config
from tests.faults.conftest import STEPS
from tests.faults.ranks import after_gradients, run_numbers, start_ranks
from tests.runs import run_config
from tests.training.equal_runs import Result, cases, stored_tensors

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]

AT = 2  # the step, counted from 0, in which the signal comes
PACKS = 2  # of a step, over all replicas
SHARED = {"pipeline_model_parallel_size": 2}  # both ranks encode pictures of the same packs


def config_of(world: Path, results: Path, ranks: int, **flags: Any) -> Config:
    return run_config(
        world, results, ranks, **{"total_steps": STEPS, "save_every": 100, "global_batch_size": PACKS, "overlap_vae_encode": True, **flags}
    )


def whole_result(config: Config) -> Result:
    return run_numbers(config), stored_tensors(Path(config.training.checkpoint_dir) / f"{STEPS:07d}")


@pytest.fixture(scope="module")
def uninterrupted(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, bool], Result]:
    """Results of the runs that encode everything in its own step and get no signal."""

    @cache
    def result(ranks: int, shared: bool) -> Result:
        flags = SHARED if shared else {}
        config = config_of(world, tmp_path_factory.mktemp("whole"), ranks, overlap_vae_encode=False, **flags)
        started = start_ranks(config, ranks)
        assert started.wait() == [0] * ranks, started.printed()
        return whole_result(config)

    return result


def stop_myself() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def while_computing() -> None:
    after_gradients(lambda model, computation: stop_myself() if computation == AT else None)


def at_read_ahead(enter: Callable[[], None], leave: Callable[[], None] = lambda: None) -> None:
    """Call ``enter`` before step ``AT`` reads the batch of the step after it, and ``leave`` afterwards."""
    from megatron_bagel.data.loading.loader import PackLoader

    original, steps = PackLoader.read_ahead, itertools.count()

    def read_ahead(self: PackLoader) -> None:
        now = next(steps) == AT
        if now:
            enter()
        original(self)
        if now:
            leave()

    PackLoader.read_ahead = read_ahead


def while_reading_ahead() -> None:
    """The first pack of the next step is read, and the batch of this step is in hand."""
    from megatron_bagel.data.loading.loader import PackLoader

    original, armed = PackLoader._next_pack, []
    at_read_ahead(lambda: armed.append(True), armed.clear)

    def next_pack(self: PackLoader) -> Any:
        pack = original(self)
        if armed:
            stop_myself()
        return pack

    PackLoader._next_pack = next_pack


def after_reading_ahead() -> None:
    """The next step's batch is read. This step's ranks agree to stop before any of its pictures is encoded."""
    at_read_ahead(lambda: None, stop_myself)


def while_data_stall() -> None:
    """The next step's data do not come. The run gives up after half of the grace, and this step can still be trained."""
    from megatron_bagel.data.loading.pack_reader import PackReader

    original = PackReader.__getitem__

    def stalling(self: PackReader, plan: Any) -> Any:
        if plan.packs[plan.number].number >= PACKS * (AT + 1):
            time.sleep(600)
        return original(self, plan)

    PackReader.__getitem__ = stalling
    at_read_ahead(lambda: threading.Timer(0.5, stop_myself).start())


def while_encoding_ahead() -> None:
    """The latents of the next step are being queued."""
    from megatron_bagel.encoders.early_latents import EarlyLatents

    original, encodings = EarlyLatents.start, itertools.count()

    def start(self: EarlyLatents, packs: Any, encode: Callable[[], list[torch.Tensor]]) -> None:
        def encode_and_stop() -> list[torch.Tensor]:
            if next(encodings) == AT:
                stop_myself()
            return encode()

        original(self, packs, encode_and_stop)

    EarlyLatents.start = start


#: Where the signal comes; the steps that are done then; flags.
#: All ranks learn of a signal when a step has read ahead. One that comes later stops the run a step later.
MOMENTS: dict[str, tuple[Callable[[], None], int, dict[str, Any]]] = {
    "computing": (while_computing, AT + 2, {}),
    "after reading ahead": (after_reading_ahead, AT + 1, {}),
    "reading ahead": (while_reading_ahead, AT + 1, {}),
    "workers read ahead": (while_reading_ahead, AT + 1, {"num_workers": 1}),
    "data stall": (while_data_stall, AT + 1, {"num_workers": 1, "preemption_grace_seconds": 4.0}),
    "encoding ahead": (while_encoding_ahead, AT + 2, {}),
    "shared pictures": (while_encoding_ahead, AT + 2, SHARED),
}


def scenarios() -> dict[str, tuple]:
    """Each moment on one process, and on two of which all or one gets the signal."""
    made: dict[str, tuple] = {}
    for name, moment in MOMENTS.items():
        if moment[2] is not SHARED:
            made[f"{name}, one process"] = (1, [0], *moment)
        made[f"{name}, both of two"] = (2, [0, 1], *moment)
        made[f"{name}, one of two"] = (2, [1], *moment)
    return made


@pytest.mark.parametrize(
    ("ranks", "signalled", "moment", "done", "flags"),
    cases(scenarios(), "reading ahead, one process", "encoding ahead, one of two"),
)
def test_a_stop_continues_bit_for_bit(
    world: Path, tmp_path: Path, uninterrupted: Callable[[int, bool], Result], ranks: int, signalled: list[int], moment: Callable[[], None],
    done: int, flags: dict[str, Any],
) -> None:  # fmt: skip
    config = config_of(world, tmp_path, ranks, **flags)

    def fault(rank: int) -> None:
        if rank in signalled:
            moment()

    stopped = start_ranks(config, ranks, fault)
    assert stopped.wait() == [0] * ranks, stopped.printed()
    assert len(run_numbers(config)) == done, stopped.printed()
    assert latest_checkpoint(tmp_path / "checkpoints").name == f"{done:07d}"
    (event,) = [event for event in map(json.loads, (tmp_path / "events.jsonl").read_text().splitlines()) if event["event"] == "stop"]
    assert event["text"].startswith("SIGTERM" if 0 in signalled else "a signal") and f"saving after {done} steps" in event["text"]
    again = start_ranks(config, ranks)
    assert again.wait() == [0] * ranks, again.printed()
    numbers, tensors = whole_result(config)
    expected_numbers, expected_tensors = uninterrupted(ranks, flags is SHARED)
    assert numbers == expected_numbers and len(numbers) == STEPS
    assert tensors.keys() == expected_tensors.keys()
    assert [name for name in tensors if not torch.equal(tensors[name], expected_tensors[name])] == []
