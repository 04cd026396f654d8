"""When a run saves, what becomes of its checkpoints, and the model folders that are exported from them while it goes on.

An export reads a published checkpoint in a process of its own, tensor by tensor: the ranks wait for nothing but the save.
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
    """Writes `<results_dir>/hf/<step>` from finished checkpoints, one after the other. Lives on rank 0.

    A failed export is an error in the log and no more: its checkpoint is there to be exported by hand.
    """

    results_dir: Path
    every: int
    _waiting: list[Path] = field(default_factory=list)
    _running: tuple[Path, subprocess.Popen[bytes]] | None = None

    def add(self, checkpoint: Path) -> None:
        """Export `checkpoint` if it is its turn. Called when it has been published."""
        if self.every and step_of(checkpoint) % self.every == 0:
            self._waiting.append(checkpoint)
            self.poll()

    def in_use(self) -> list[Path]:
        """Checkpoints that are still read, or will be."""
        return [*self._waiting, *([self._running[0]] if self._running else [])]

    def poll(self) -> None:
        """Note the end of an export and start the next."""
        if self._running is not None and self._running[1].poll() is not None:
            self._end(*self._running)
        if self._running is None and self._waiting:
            self._start(self._waiting.pop(0))

    def finish(self) -> None:
        """Wait until everything is exported."""
        while self._running is not None:
            self._running[1].wait()
            self.poll()

    def _start(self, checkpoint: Path) -> None:
        out = self.results_dir / "hf" / checkpoint.name
        if out.exists():
            logger.info("%s exists already: not exported again", out)
            return
        log = out.with_name(f"{out.name}.log")
        log.parent.mkdir(parents=True, exist_ok=True)
        # The launcher's variables would make it one more rank; it needs no device.
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
            logger.error("%s could not be exported; %s says: %s", checkpoint, log, log.read_text(errors="replace")[-1000:].strip())
            return
        logger.info("exported %s to %s", checkpoint, self.results_dir / "hf" / checkpoint.name)
        log.unlink()


@dataclass(frozen=True)
class SavingSettings:
    """When a run saves and what it keeps.

    Attributes:
        checkpoint_dir: folder of its checkpoints.
        results_dir: folder of the exported model folders.
        every: steps between checkpoints.
        export_every: steps between exports, 0 for none.
        checkpoints: how checkpoints are written, and which are kept.
    """

    checkpoint_dir: Path
    results_dir: Path
    every: int
    export_every: int = 0
    checkpoints: SaveSettings = field(default_factory=SaveSettings)


class Saving:
    """The saves of a run."""

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
        """Whether the state after `steps` steps is saved: every so many steps, and where an export reads it."""
        return any(number and steps % number == 0 for number in self._every)

    def poll(self) -> None:
        """After every step, on all ranks: publish what was written meanwhile."""
        self.saver.poll()
        if dist.get_rank() == 0:
            self._exporter.poll()

    def finish(self, exports: bool = True) -> None:
        """At the end, on all ranks: wait for the save under way, and on rank 0 for the ``exports`` if there is time for them."""
        self.saver.finish()
        if dist.get_rank() == 0:
            if exports:
                self._exporter.finish()
            self.saver.clean()
