"""Saves of a run, while it waits or in the background: at most one is under way, and each is published whole or not at all.

In the background every rank copies what it must (GPU tensors to the host, gathered slices), forks, and trains on; the forked process sees
the tensors as they were. Memory is therefore bounded by one copy of a rank's share, however slow the disk is: a save that comes before
the last one has ended waits for it.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue, AsyncRequest
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from torch.distributed.checkpoint.api import CheckpointException

from megatron_bagel.checkpoint.dist import checksums, step_folders
from megatron_bagel.parallel.rank_zero import on_first_rank
from megatron_bagel.checkpoint.dist.state import Trained, data_parallel_group, provenance, sharded_state
from megatron_bagel.platform import megatron_compat

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SaveSettings:
    """`background`: train on while writing. `keep_last`, `keep_every`: which checkpoints stay (`step_folders.retain`)."""

    background: bool = False
    keep_last: int = 0
    keep_every: int = 0


@dataclass
class Saver:
    """Writes the checkpoints of one run into `directory`. All methods but `clean` are collective.

    `published` is called on rank 0 with every finished folder; `protected` says there which folders must not be removed.
    """

    directory: Path
    settings: SaveSettings = field(default_factory=SaveSettings)
    published: Callable[[Path], None] = lambda folder: None
    protected: Callable[[], list[Path]] = list

    def __post_init__(self) -> None:
        self._queue = AsyncCallsQueue()
        self._began = 0.0
        #: On rank 0, the seconds from the call of the newest save until its checkpoint was whole; None before the first.
        self.last_seconds: float | None = None

    def save(self, step: int, trained: Trained, run_state: Mapping[str, Any]) -> None:
        """Save the state after `step` optimizer steps; in the background the folder appears at a later `poll` or `finish`.

        `run_state` is everything that is not a tensor (schedule, planner, counters, config): JSON values only, equal on all ranks.
        Raises ValueError on all ranks when the files cannot be written, naming the last checkpoint that could.
        """
        text = step_folders.state_text({**provenance(step, trained.arch, dist.get_world_size()), "run": dict(run_state)})
        self.finish()
        self._began = time.perf_counter()
        saving = on_first_rank(lambda: step_folders.begin(self.directory, step), f"cannot write a checkpoint into {self.directory}")
        with self._explained():
            request = self._request(saving, text, trained)
            if self.settings.background:
                self._queue.schedule_async_request(request)
                return
            request.execute_sync()

    def poll(self) -> None:
        """Publish a save that has ended meanwhile. Call it after every step: no cost while none is under way."""
        self._finalize(blocking=False)

    def finish(self) -> None:
        """Wait for the save that is under way, if any, and publish it."""
        self._finalize(blocking=True)

    def clean(self) -> None:
        """Remove the checkpoints that need not stay. After every save; on one rank, and not collective."""
        step_folders.retain(self.directory, self.settings.keep_last, self.settings.keep_every, self.protected())

    def _finalize(self, blocking: bool) -> None:
        if self._queue.get_num_unfinalized_calls():
            with self._explained():
                self._queue.maybe_finalize_async_calls(blocking=blocking)

    def _request(self, saving: Path, text: str, trained: Trained) -> AsyncRequest:
        if self.settings.background:
            megatron_compat.collect_save_results_by_file()
        else:
            megatron_compat.collect_save_results_in_process()
        strategy = FullyParallelSaveStrategyWrapper(megatron_compat.torch_dist_save_strategy(), data_parallel_group())
        request = dist_checkpointing.save(
            sharded_state(trained, is_loading=False),
            str(saving),
            sharded_strategy=strategy,
            async_sharded_save=True,
            **megatron_compat.async_save_arguments(),
        )
        finalize = [*request.finalize_fns, functools.partial(self._publish, saving, text)]
        write = functools.partial(_write_and_sum, request.async_fn, saving) if request.async_fn is not None else None
        return request._replace(async_fn=write, finalize_fns=finalize)

    def _publish(self, saving: Path, text: str) -> None:
        def on_disk() -> Path:
            (saving / step_folders.STATE_FILE).write_text(text, encoding="utf-8")
            final = step_folders.publish(saving)
            self.published(final)
            self.clean()
            return final

        final = on_first_rank(on_disk, f"cannot finish the checkpoint in {saving}")
        if dist.get_rank() == 0:
            self.last_seconds = time.perf_counter() - self._began
            logger.info("saved %s", final)

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Turns Megatron's errors of a failed write into one sentence, on all ranks."""
        try:
            yield
        except (CheckpointException, CheckpointingException, OSError) as error:
            failures = getattr(error, "failures", None) or {}
            reasons = [str(failure[0] if isinstance(failure, tuple) else failure) for failure in failures.values()]
            newest = step_folders.latest_checkpoint(self.directory)
            # torch does not always pass the system's reason on: a full disk may be only "unexpected pos" there.
            free = shutil.disk_usage(self.directory).free
            raise ValueError(
                f"a checkpoint could not be written into {self.directory} ({'; '.join(reasons) or error}; "
                f"{free / 1e6:.1f} MB are free there); free some space or choose another --checkpoint_dir and start again: the run "
                f"continues from {newest or 'its beginning'}"
            ) from error


def save_checkpoint(directory: str | Path, step: int, trained: Trained, run_state: Mapping[str, Any]) -> Path:
    """Save once and wait; returns the checkpoint's folder. Parameters and errors are those of `Saver.save`."""
    Saver(Path(directory)).save(step, trained, run_state)
    return step_folders.step_folder(directory, step)


def _write_and_sum(write: Callable[..., None], saving: Path, rank: int, buckets: Any, results: Any) -> None:
    """Megatron's writer, then the checksums of what it wrote; in the background both happen in the forked process."""
    write(rank, buckets, results)
    # Where this fails for want of space, so has the writing, which says so; a missing part is summed by the first rank.
    with contextlib.suppress(OSError):
        checksums.write_part(saving, rank)
