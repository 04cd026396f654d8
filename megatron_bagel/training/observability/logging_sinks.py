# SPDX-License-Identifier: Apache-2.0
"""Writes a run's numbers and pictures on rank 0: console and ``log.txt``, ``metrics.jsonl``, TensorBoard and, on request, W&B and others.

Other ranks have a ``RunLog`` too and call the same methods, which do nothing there, so the loop need not test the rank.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from megatron_bagel.training.observability.contact_sheet import SheetRow, contact_sheet
from megatron_bagel.training.observability.expert_plot import plot_expert_load
from megatron_bagel.training.observability.metrics import StepMetrics, jsonable, log_line
from megatron_bagel.training.observability.metrics_file import MetricsFile, read_history
from megatron_bagel.training.observability.plots import plot_losses
from megatron_bagel.training.observability.prometheus import PrometheusSink
from megatron_bagel.training.observability.trackers import Tracker, TrackerSettings, open_trackers

_LINE = logging.Formatter("[%(asctime)s] %(message)s", datefmt="%Y-%m-%d %H:%M:%S")
_MEBIBYTE = 1024 * 1024
#: The original's name in W&B -> the name in ``metrics.jsonl``.
_ORIGINAL_NAMES = {
    "mse": "mse",
    "ce": "ce",
    "loss": "loss",
    "lr": "lr",
    "total_norm": "grad_norm",
    "total_ce_tokens": "ce_tokens",
    "total_mse_tokens": "mse_tokens",
    "total_samples": "step_samples",
    "tokens_per_sec": "tokens_per_s",
    "tokens_per_step": "step_tokens",
    "actual_tflops": "tflops",
    "mfu": "mfu",
    "consumed_samples": "consumed_samples",
    "consumed_tokens": "consumed_tokens",
}


@dataclass(frozen=True)
class WandbSettings:
    """Settings of W&B. ``run_id`` and ``resume`` let a restarted run continue its curves."""

    project: str = "bagel"
    name: str = "run"
    run_id: str = "0"
    resume: str = "allow"
    offline: bool = False


class WandbSink:
    """Sends each record to W&B under the original's names. Raises ValueError if wandb is not installed."""

    def __init__(self, settings: WandbSettings, results_dir: Path, run_config: Mapping[str, Any]) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ValueError(
                "W&B logging is on, but the package wandb is not installed: pip install 'megatron-bagel[logging]', or turn W&B off "
                "(metrics.jsonl and TensorBoard are written anyway)"
            ) from error
        # The id has name and run id, as in the original, so that two runs with one name do not overwrite each other.
        self._run = wandb.init(
            project=settings.project,
            id=f"{settings.name}-run{settings.run_id}",
            name=settings.name,
            resume=settings.resume,
            dir=str(results_dir),
            config=dict(run_config),
            mode="offline" if settings.offline else "online",
        )

    def write(self, metrics: StepMetrics) -> None:
        """Send one record, with memory in MB as in the original and everything else as in ``metrics.jsonl``."""
        values = metrics.values()
        record = {original_name: values[name] for original_name, name in _ORIGINAL_NAMES.items()}
        record["mem_allocated"] = metrics.peak_mem_bytes / _MEBIBYTE
        record |= {**metrics.by_dataset, **metrics.observed}
        self._run.log(record, step=metrics.step)

    def write_validation(self, step: int, numbers: Mapping[str, float]) -> None:
        """Send held-out losses, each under ``validation/``."""
        self._run.log({f"validation/{name}": value for name, value in numbers.items()}, step=step)

    def write_sheet(self, step: int, name: str, sheet: Image.Image) -> None:
        """Send one sheet of pictures."""
        import wandb

        self._run.log({f"samples/{name}": wandb.Image(sheet)}, step=step)

    def close(self) -> None:
        """Finish the W&B run."""
        self._run.finish()


class TensorBoardSink:
    """Writes event files to ``results_dir/tensorboard``. An earlier run's steps from ``next_step`` on are hidden."""

    def __init__(self, results_dir: Path, next_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(results_dir / "tensorboard"), purge_step=next_step)

    def write(self, metrics: StepMetrics) -> None:
        """Write one scalar per number of the step."""
        for name, value in metrics.as_json().items():
            if name != "step" and value is not None:
                self._writer.add_scalar(f"train/{name}", value, metrics.step)

    def write_validation(self, step: int, numbers: Mapping[str, float]) -> None:
        """Write one scalar per held-out loss."""
        for name, value in numbers.items():
            self._writer.add_scalar(f"validation/{name}", value, step)

    def write_sheet(self, step: int, name: str, sheet: Image.Image) -> None:
        """Write one sheet of pictures."""
        self._writer.add_image(f"samples/{name}", np.asarray(sheet), step, dataformats="HWC")

    def close(self) -> None:
        """Write what is buffered and close the files."""
        self._writer.close()


class RunLog:
    """Writes all logs of one run. ``next_step`` is the first step that this process will log; after a resume it is the checkpoint's."""

    def __init__(
        self,
        results_dir: str | Path,
        rank: int,
        next_step: int,
        run_config: Mapping[str, Any] | None = None,
        tensorboard: bool = True,
        wandb: WandbSettings | None = None,
        prometheus: str | None = None,
        trackers: TrackerSettings | None = None,
        run_id: str = "",
    ) -> None:
        self.results_dir = Path(results_dir)
        self._active = rank == 0
        self._sinks: list[Tracker] = []
        if not self._active:
            return
        self.results_dir.mkdir(parents=True, exist_ok=True)
        self._logger, self._handlers = _console_and_file(self.results_dir / "log.txt")
        self._metrics = MetricsFile(self.results_dir / "metrics.jsonl", next_step, run_id)
        self._experts: MetricsFile | None = None
        self._expert_file = partial(MetricsFile, self.results_dir / "expert_load.jsonl", next_step, run_id)
        # An evaluation is logged after its step, so its number n means that n steps were done.
        self._validation = MetricsFile(self.results_dir / "validation.jsonl", next_step + 1, run_id)
        if tensorboard:
            self._sinks.append(TensorBoardSink(self.results_dir, next_step))
        if wandb is not None:
            self._sinks.append(WandbSink(wandb, self.results_dir, run_config or {}))
        if prometheus is not None:
            self._sinks.append(PrometheusSink(prometheus, self.results_dir))
        if trackers is not None:
            self._sinks += open_trackers(trackers, self.results_dir, run_id, run_config or {})

    def info(self, text: str) -> None:
        """Write one line with the time to the console and ``log.txt``."""
        if self._active:
            self._logger.info(text)

    def log(self, metrics: StepMetrics) -> None:
        """Write the numbers of one step to every log."""
        if self._active:
            self._logger.info(log_line(metrics))
            self._metrics.write(metrics.as_json())
            if metrics.done.result.experts is not None:
                self._expert_load().write({"step": metrics.step, **metrics.done.result.experts.record()})
            for sink in self._sinks:
                sink.write(metrics)

    def _expert_load(self) -> MetricsFile:
        """Return the file of the sparse experts' loads, which a dense model does not have."""
        if self._experts is None:
            self._experts = self._expert_file()
        return self._experts

    def log_validation(self, step: int, numbers: Mapping[str, float]) -> None:
        """Write held-out losses after ``step`` steps: ``validation.jsonl``, the loggers, and one line on the console."""
        if not self._active:
            return
        shown = [f"{name} {numbers[name]:.4f}" for name in ("model/ce", "model/mse", "ema/ce", "ema/mse") if name in numbers]
        seconds = sum(value for name, value in numbers.items() if name.startswith("seconds_"))
        self._logger.info(f"(step={step:07d}) Validation {', '.join(shown)}, {seconds:.1f} s")
        self._validation.write({"step": step, **jsonable(numbers)})
        for sink in self._sinks:
            sink.write_validation(step, numbers)

    def log_samples(self, step: int, rows: Mapping[str, Sequence[SheetRow]], texts: Sequence[Mapping[str, Any]]) -> None:
        """Write pictures, one sheet per name, and texts to ``samples/``, and the sheets to the loggers."""
        if not self._active:
            return
        folder = self.results_dir / "samples"
        folder.mkdir(exist_ok=True)
        for name, sheet_rows in rows.items():
            sheet = contact_sheet(sheet_rows)
            sheet.save(folder / f"{step:07d}_{name}.png")
            for sink in self._sinks:
                sink.write_sheet(step, name, sheet)
        if texts:
            lines = [json.dumps(dict(text), ensure_ascii=False) + "\n" for text in texts]
            (folder / f"{step:07d}.jsonl").write_text("".join(lines), encoding="utf-8")

    def close(self, plot: bool = True) -> None:
        """Draw ``loss.png`` if any step was logged, and close every file. It may be called after an error of the loop."""
        if not self._active:
            return
        try:
            self._close_outputs(plot)
        except OSError as error:  # a disk that is full, or gone: an error of the loop must not be hidden by this one
            self._logger.warning("the outputs of the run could not be completed: %s", error)
        for handler in self._handlers:
            self._logger.removeHandler(handler)
            handler.close()

    def _close_outputs(self, plot: bool) -> None:
        self._metrics.close()
        self._validation.close()
        history = read_history(self._metrics.path)
        if plot and history:
            plot_losses(history, self.results_dir / "loss.png")
        if self._experts is not None:
            self._experts.close()
            if plot:
                plot_expert_load(read_history(self._experts.path), self.results_dir / "expert_load.png")
        for sink in self._sinks:
            sink.close()


class LogFile(logging.FileHandler):
    """``log.txt``. A line that cannot be written is reported once, in one line; Python's own handler prints a traceback for each."""

    _reported = False

    def handleError(self, record: logging.LogRecord) -> None:
        """Report the first failure on stderr."""
        if not self._reported:
            self._reported = True
            print(f"megatron_bagel: {self.baseFilename} cannot be written: {sys.exc_info()[1]}", file=sys.stderr)

    def close(self) -> None:
        """Close the file, also where what it still holds cannot be written."""
        try:
            super().close()
        except OSError:
            self.handleError(logging.makeLogRecord({}))


@contextmanager
def package_log(results_dir: str | Path, rank: int) -> Iterator[None]:
    """Send the package's log messages (weights, checkpoints, saves) to the console and ``log.txt`` within the block, on rank 0.

    Python handles the warnings of other ranks.
    """
    if rank:
        yield
        return
    Path(results_dir).mkdir(parents=True, exist_ok=True)
    logger, handlers = _console_and_file(Path(results_dir) / "log.txt", "megatron_bagel")
    try:
        yield
    finally:
        for handler in handlers:
            logger.removeHandler(handler)
            handler.close()


def _console_and_file(path: Path, name: str = "megatron_bagel.run") -> tuple[logging.Logger, list[logging.Handler]]:
    """Return a logger with two handlers. It is not connected to the root logger, which libraries configure."""
    logger = logging.getLogger(name)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stdout), LogFile(path, encoding="utf-8")]
    for handler in handlers:
        handler.setFormatter(_LINE)
        logger.addHandler(handler)
    return logger, handlers
