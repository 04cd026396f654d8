# SPDX-License-Identifier: Apache-2.0
"""When a run saves, which checkpoints it keeps, and the model folders that are exported from them while training continues.

An export reads a published checkpoint in a process of its own, tensor by tensor. The ranks wait only for the save itself.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch.distributed as dist

import megatron_bagel
from megatron_bagel.checkpoint.dist.saver import Saver, SaveSettings
from megatron_bagel.checkpoint.dist.step_folders import step_of

logger = logging.getLogger(__name__)


@dataclass
class HFExporter:
    """Exports finished checkpoints to ``<results_dir>/hf/<step>``, one after the other. Only rank 0 uses it.

    A failed export is logged as an error and does not end the run. Its checkpoint can be exported by hand.
    """

    results_dir: Path
    every: int
    _waiting: list[Path] = field(default_factory=list)
    _running: tuple[Path, subprocess.Popen[bytes]] | None = None

    def add(self, checkpoint: Path) -> None:
        """Queue ``checkpoint``, which has just been published, if an export of its step is due."""
        if self.every and step_of(checkpoint) % self.every == 0:
            self._waiting.append(checkpoint)
            self.poll()

    def in_use(self) -> list[Path]:
        """Return the checkpoints that an export reads now or will read."""
        return [*self._waiting, *([self._running[0]] if self._running else [])]

    def poll(self) -> None:
        """Report an export that has ended and start the next one."""
        if self._running is not None and self._running[1].poll() is not None:
            self._end(*self._running)
        if self._running is None and self._waiting:
            self._start(self._waiting.pop(0))

    def finish(self) -> None:
        """Wait until every queued checkpoint is exported."""
        while self._running is not None:
            self._running[1].wait()
            self.poll()

    def _start(self, checkpoint: Path) -> None:
        out = self.results_dir / "hf" / checkpoint.name
        if out.exists():
            logger.info("%s exists already and is not written again; remove it first to export this checkpoint", out)
            return
        log = out.with_name(f"{out.name}.log")
        log.parent.mkdir(parents=True, exist_ok=True)
        # With the launcher's variables the export would act as one more rank. It needs no device.
        environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
        package = str(Path(megatron_bagel.__file__).parent.parent)
        environment |= {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join([package, os.environ.get("PYTHONPATH", "")])}
        command = [sys.executable, "-m", "megatron_bagel.training.export_job", str(checkpoint), str(out)]
        with log.open("w") as text:
            self._running = checkpoint, subprocess.Popen(command, env=environment, stdout=text, stderr=subprocess.STDOUT)

    def _end(self, checkpoint: Path, process: subprocess.Popen[bytes]) -> None:
        self._running = None
        log = self.results_dir / "hf" / f"{checkpoint.name}.log"
        if process.returncode:
            tail = log.read_text(errors="replace")[-1000:].strip()
            logger.error(
                "%s could not be exported: %s (the end of %s). Export it with megatron-bagel convert megatron-to-hf", checkpoint, tail, log
            )
            return
        logger.info("exported %s to %s", checkpoint, self.results_dir / "hf" / checkpoint.name)
        log.unlink()


@dataclass(frozen=True)
class SavingSettings:
    """Settings of saves and exports.

    Attributes:
        checkpoint_dir: The folder of the run's checkpoints.
        results_dir: The folder that exported model folders are written into, under ``hf/``.
        every: The number of steps between checkpoints.
        export_every: The number of steps between exports; 0 for none.
        checkpoints: How checkpoints are written, and which are kept.
    """

    checkpoint_dir: Path
    results_dir: Path
    every: int
    export_every: int = 0
    checkpoints: SaveSettings = field(default_factory=SaveSettings)


class Saving:
    """Saves the checkpoints of a run and exports some of them."""

    def __init__(self, settings: SavingSettings, run_id: str = "", check_folder: Callable[[], None] = lambda: None) -> None:
        """Prepare the saves of the run ``run_id``; ``check_folder`` raises ValueError where the run has lost its folder."""
        self._every = settings.every, settings.export_every
        self._exporter = HFExporter(settings.results_dir, settings.export_every)
        self.saver = Saver(
            settings.checkpoint_dir,
            settings.checkpoints,
            published=self._exporter.add,
            protected=self._exporter.in_use,
            run_id=run_id,
            check_folder=check_folder,
        )

    def due(self, steps: int) -> bool:
        """Return whether the state after ``steps`` steps is saved, for a checkpoint or for an export."""
        return any(number and steps % number == 0 for number in self._every)

    def poll(self) -> None:
        """Publish a background save that has ended, and continue the exports. All ranks call it after every step."""
        self.saver.poll()
        if dist.get_rank() == 0:
            self._exporter.poll()

    def finish(self, exports: bool = True) -> None:
        """Wait for the save in progress and, on rank 0 and with ``exports``, for the exports. All ranks call it at the end of a run."""
        self.saver.finish()
        if dist.get_rank() == 0:
            if exports:
                self._exporter.finish()
            self.saver.clean()
