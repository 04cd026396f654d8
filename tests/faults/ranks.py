# SPDX-License-Identifier: Apache-2.0
"""Ranks as processes of their own that meet over a port, as a launcher would start them, forked so that a run costs seconds."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from megatron_bagel import platform, train
from megatron_bagel.checkpoint.dist.step_folders import latest_checkpoint
from megatron_bagel.config.parser import Config
from megatron_bagel.platform.launch.process_group import reserved_port
from megatron_bagel.training.observability.metrics_file import read_history
from tests.conftest import ROOT
from tests.distributed import fork
from tests.runs import numbers, preload

#: Called in a rank's process before it trains: what goes wrong there.
Fault = Callable[[int], None]


def no_fault(rank: int) -> None:
    """Nothing goes wrong."""


@dataclass
class Ranks:
    """The processes of one run. ``out`` holds what each printed, in ``rank-N.txt``; ``reservation`` keeps their port."""

    processes: list[Any]
    out: Path
    reservation: ExitStack

    def wait(self, seconds: float = 240) -> list[int | None]:
        """Exit codes in rank order; a process that does not end in time is killed and counts as None."""
        deadline = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        codes = [process.exitcode for process in self.processes]
        self.kill()
        return codes

    def kill(self) -> None:
        """SIGKILL to what is left."""
        for process in self.processes:
            process.kill()
            process.join()
        self.reservation.close()

    def send(self, number: signal.Signals, rank: int | None = None) -> None:
        """A signal to one rank, or to all."""
        for process in self.processes if rank is None else [self.processes[rank]]:
            os.kill(process.pid, number)

    def printed(self) -> str:
        """Everything that all ranks wrote to stdout and stderr."""
        return "".join(path.read_text(errors="replace") for path in sorted(self.out.glob("rank-*.txt")))


def start_ranks(
    config: Config,
    size: int,
    fault: Fault = no_fault,
    environment: Mapping[str, str] | None = None,
    others: Mapping[int, Config] | None = None,
) -> Ranks:
    """Start ``python -m megatron_bagel.train`` on ``size`` forked ranks. ``others`` are configurations of single ranks."""
    preload()
    out = Path(config.training.results_dir) / "printed"
    out.mkdir(parents=True, exist_ok=True)
    reservation = ExitStack()
    port = reservation.enter_context(reserved_port())
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(size), **(environment or {})}
    processes = []
    for rank in range(size):
        path = out / f"config-{rank}.yaml"
        (others or {}).get(rank, config).save(path)
        processes.append(fork(_rank_main, rank, path, out / f"rank-{rank}.txt", meeting, fault))
    return Ranks(processes, out, reservation)


def _rank_main(rank: int, config: Path, printed: Path, meeting: Mapping[str, str], fault: Fault) -> None:
    os.environ.update(meeting, RANK=str(rank), LOCAL_RANK=str(rank))
    # Both the descriptors, for what C++ prints, and Python's objects, which the test's own capture has replaced.
    file = os.open(printed, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for number in (1, 2):
        os.dup2(file, number)
    sys.stdout = sys.stderr = os.fdopen(1, "w", buffering=1, closefd=False)
    torch.set_num_threads(1)
    platform.enter_thread()
    fault(rank)
    raise SystemExit(train.main(["--config", str(config)]))


def launched_rank(launcher: psutil.Process, number: int) -> psutil.Process | None:
    """The process of a rank among those that a launcher has started; None when there is none (any more)."""
    for process in launcher.children(recursive=True):
        try:
            if process.environ().get("RANK") == str(number) and "megatron_bagel.train" in process.cmdline():
                return process
        except psutil.Error:
            continue
    return None


def launched_until_saved(command: list[str], folder: Path, seconds: float = 400) -> tuple[subprocess.Popen, psutil.Process]:
    """Start a launcher, its words in ``folder``/printed.txt, and wait for the run's first checkpoint there; returns it and rank 1.

    Raises AssertionError with what was printed when there is none in time.
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    with (folder / "printed.txt").open("w") as printed:
        process = subprocess.Popen([sys.executable, *command], cwd=ROOT, env=environment, stdout=printed, stderr=printed)
    launcher, deadline = psutil.Process(process.pid), time.monotonic() + seconds
    while latest_checkpoint(folder / "checkpoints") is None and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    victim = launched_rank(launcher, 1)
    assert victim is not None, (folder / "printed.txt").read_text()
    return process, victim


def run_numbers(config: Config) -> list[tuple]:
    """What the run logged so far and must not depend on faults."""
    path = Path(config.training.results_dir) / "metrics.jsonl"
    return numbers(read_history(path)) if path.is_file() else []


def wait_for_steps(config: Config, steps: int, ranks: Ranks, seconds: float = 200) -> None:
    """Until so many steps are in the log. Raises AssertionError with the printed text when the ranks ended before, or time is up."""
    deadline = time.monotonic() + seconds
    while len(run_numbers(config)) < steps:
        if time.monotonic() > deadline or not any(process.is_alive() for process in ranks.processes):
            raise AssertionError(f"step {steps} was not reached:\n{ranks.printed()}")
        time.sleep(0.1)


def after_gradients(change: Callable[[torch.nn.Module, int], None]) -> None:
    """In this process, call ``change(model, computation)`` whenever a step's own gradients were computed and not yet exchanged;
    ``computation`` counts from 0."""
    from megatron_bagel.training import step

    original, count = step.get_forward_backward_func, iter(range(10**9))

    def wrapped() -> Callable[..., Any]:
        schedule = original()

        def run(**arguments: Any) -> Any:
            outputs = schedule(**arguments)
            change(arguments["model"], next(count))
            return outputs

        return run

    step.get_forward_backward_func = wrapped
