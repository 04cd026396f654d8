# SPDX-License-Identifier: Apache-2.0
"""Saves the state of a run, synchronously or in the background. At most one save is in progress, and it is published complete or never.

In the background every rank copies what it must (GPU tensors to the host, gathered slices), forks, and trains on. The forked process sees
the tensors as they were. One copy of a rank's share therefore bounds the memory for any disk: a save waits until the previous one has
ended.
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
from megatron_bagel.checkpoint.dist.state import Trained, data_parallel_group, provenance, sharded_state
from megatron_bagel.checkpoint.dist.stored_run import belongs_to
from megatron_bagel.checkpoint.dist.write_errors import is_space_short, space_advice, write_reasons
from megatron_bagel.parallel.rank_zero import on_first_rank
from megatron_bagel.platform import megatron_compat

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SaveSettings:
    """``background`` trains on while writing. ``keep_last`` and ``keep_every`` choose which checkpoints stay (``step_folders.retain``)."""

    background: bool = False
    keep_last: int = 0
    keep_every: int = 0


@dataclass
class Saver:
    """Writes the checkpoints of one run into ``directory``. All methods except ``clean`` are collective.

    Rank 0 calls ``published`` with every finished folder, ``protected`` for the folders that must not be removed, and ``check_folder``
    before every save: it raises ValueError where the run has lost its folder. ``run_id`` is the identity of the run, if it has one.
    """

    directory: Path
    settings: SaveSettings = field(default_factory=SaveSettings)
    published: Callable[[Path], None] = lambda folder: None
    protected: Callable[[], list[Path]] = list
    run_id: str = ""
    check_folder: Callable[[], None] = lambda: None

    def __post_init__(self) -> None:
        self._queue = AsyncCallsQueue()
        self._start_time = 0.0
        #: On rank 0, the seconds from the latest call of ``save`` until its checkpoint was complete; None before the first save.
        self.last_seconds: float | None = None

    def save(self, step: int, trained: Trained, run_state: Mapping[str, Any]) -> None:
        """Save the state after ``step`` optimizer steps. A background save appears at a later ``poll`` or ``finish``.

        Args:
            step: The number of optimizer steps.
            trained: What the run trains.
            run_state: Everything that is not a tensor (schedule, planner, counters, config): JSON values, equal on all ranks.

        Raises:
            ValueError: On all ranks, naming the last complete checkpoint, if the files cannot be written.
        """
        text = step_folders.state_text({**provenance(step, trained.arch, dist.get_world_size(), trained.adapter), "run": dict(run_state)})
        self.finish()
        self._start_time = time.perf_counter()
        temporary_folder = on_first_rank(lambda: self._begin(step), f"cannot write a checkpoint into {self.directory}")
        with self._readable_errors():
            request = self._request(temporary_folder, text, trained)
            if self.settings.background:
                self._queue.schedule_async_request(request)
                return
            request.execute_sync()

    def poll(self) -> None:
        """Publish a save that has ended. Call it after every step; it costs nothing while no save is in progress."""
        self._finalize(blocking=False)

    def finish(self) -> None:
        """Wait for the save in progress, if any, and publish it."""
        self._finalize(blocking=True)

    def clean(self) -> None:
        """Remove the checkpoints that need not stay. One rank calls it after every save; it is not collective."""
        keep_last, keep_every = self.settings.keep_last, self.settings.keep_every
        step_folders.retain(self.directory, keep_last, keep_every, self.protected(), lambda folder: belongs_to(folder, self.run_id))

    def _begin(self, step: int) -> Path:
        self.check_folder()
        return step_folders.begin(self.directory, step, self.run_id)

    def _finalize(self, blocking: bool) -> None:
        if self._queue.get_num_unfinalized_calls():
            with self._readable_errors():
                self._queue.maybe_finalize_async_calls(blocking=blocking)

    def _request(self, temporary_folder: Path, text: str, trained: Trained) -> AsyncRequest:
        if self.settings.background:
            megatron_compat.collect_save_results_by_file()
        else:
            megatron_compat.collect_save_results_in_process()
        strategy = FullyParallelSaveStrategyWrapper(megatron_compat.torch_dist_save_strategy(), data_parallel_group())
        request = dist_checkpointing.save(
            sharded_state(trained, is_loading=False),
            str(temporary_folder),
            sharded_strategy=strategy,
            async_sharded_save=True,
            **megatron_compat.async_save_arguments(),
        )
        finalize = [*request.finalize_fns, functools.partial(self._publish, temporary_folder, text)]
        write = functools.partial(_write_and_sum, request.async_fn, temporary_folder) if request.async_fn is not None else None
        return request._replace(async_fn=write, finalize_fns=finalize)

    def _publish(self, temporary_folder: Path, text: str) -> None:
        def write_state_and_publish() -> Path:
            (temporary_folder / step_folders.STATE_FILE).write_text(text, encoding="utf-8")
            final_folder = step_folders.publish(temporary_folder)
            self.published(final_folder)
            self.clean()
            return final_folder

        final_folder = on_first_rank(write_state_and_publish, f"cannot finish the checkpoint in {temporary_folder}")
        if dist.get_rank() == 0:
            self.last_seconds = time.perf_counter() - self._start_time
            logger.info("saved %s", final_folder)

    @contextlib.contextmanager
    def _readable_errors(self) -> Iterator[None]:
        """Turn Megatron's errors of a failed write into one sentence on all ranks."""
        try:
            yield
        except (CheckpointException, CheckpointingException, OSError) as error:
            newest_folder = step_folders.latest_checkpoint(self.directory)
            what = f"a checkpoint could not be written into {self.directory} ({write_reasons(error)}"
            free_bytes = shutil.disk_usage(self.directory).free
            if is_space_short(free_bytes, newest_folder, self.directory, error):
                what += f"; {space_advice(free_bytes)}"
            else:
                what += "); find out what changed the folder, or choose another --checkpoint_dir, and start again"
            raise ValueError(f"{what}: the run continues from {newest_folder or 'its beginning'}") from error


def _write_and_sum(write: Callable[..., None], temporary_folder: Path, rank: int, buckets: Any, results: Any) -> None:
    """Run Megatron's writer and compute the checksums of its files; a background save does both in the forked process."""
    write(rank, buckets, results)
    # If the disk is full here, the writer has already failed with that message. Rank 0 computes the sums of an absent part.
    with contextlib.suppress(OSError):
        checksums.write_part(temporary_folder, rank)
