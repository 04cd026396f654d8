# SPDX-License-Identifier: Apache-2.0
"""Local checkpoints between global ones: each rank's share on a disk of its node, for a restart with the same parallel sizes.

nvidia-resiliency-ext's LocalCheckpointManager writes Megatron-Core's MCoreTensorAwareStateDict, which stores what data-parallel ranks
hold alike on one of them. Nothing is gathered: the optimizer's state is stored as it is in its buffers. Only the same ranks can
therefore load such a checkpoint, which ``shape_of`` tests. Methods are collective.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.tensor_aware_state_dict import MCoreTensorAwareStateDict

from megatron_bagel.checkpoint.dist import step_folders
from megatron_bagel.checkpoint.dist.load import fill
from megatron_bagel.checkpoint.dist.local_files import RankFiles
from megatron_bagel.checkpoint.dist.optimizer_state import optimizers_with_state
from megatron_bagel.checkpoint.dist.state import Trained, data_parallel_group, provenance, sharded_state
from megatron_bagel.parallel.rank_zero import from_all_ranks, on_first_rank
from megatron_bagel.platform.launch.nvidia_resiliency import local_checkpoint_manager

logger = logging.getLogger(__name__)
_ALGORITHM = "fully_parallel"


@dataclass(frozen=True)
class LocalStep:
    """A local checkpoint that every rank of this run has completely. ``state`` is everything that is not a tensor."""

    step: int
    state: dict[str, Any]


class LocalCheckpoints:
    """The local checkpoints of one run, identified by its ``checkpoint_dir``. The newest stays, also while the next is written.

    Raises ValueError if a rank cannot write into ``directory``.
    """

    def __init__(self, directory: str, checkpoint_dir: str, every: int) -> None:
        self._root, self._global, self._every = directory, Path(checkpoint_dir), every
        self._session = hashlib.sha256(str(self._global.resolve()).encode()).hexdigest()[:12]
        self._rank = dist.get_rank()
        self._files = RankFiles(Path(directory) / self._session / str(self._rank), self._rank)
        # Shares of one step from different starts of a run do not belong together.
        self._start = on_first_rank(lambda: uuid4().hex, "cannot begin")
        self._distribution: Any = None
        problems = []
        try:
            self._files.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            problems.append(f"rank {self._rank}: {error}")
        if problems := from_all_ranks(problems):
            raise ValueError(f"--local_checkpoint_dir {directory} cannot be used; it must be writable: {'; '.join(problems[:5])}")
        self._manager = local_checkpoint_manager(directory, self._session)

    @property
    def description(self) -> str:
        """Return where the checkpoints are, for the log."""
        return f"in {self._root} on each node"

    def due(self, steps: int) -> bool:
        """Return whether the state after ``steps`` steps is saved locally."""
        return steps % self._every == 0

    def save(self, step: int, trained: Trained, run_state: Mapping[str, Any]) -> None:
        """Save the state after ``step`` steps and remove older ones. A failure is a warning, because global checkpoints exist."""
        if from_all_ranks(["waits"] if _lacks_moments(trained) else []):
            self._warn(f"step {step} was not saved: no update of the weights was made yet")
            return
        newest_global_step = _newest_global_step(self._global) if self._rank == 0 else None
        head = {
            **provenance(step, trained.arch, dist.get_world_size()), "start": self._start, "layout": parallel_sizes(),
            "run": dict(run_state), "shape": shape_of(trained), "follows": newest_global_step,
        }  # fmt: skip
        # Ranks share the work once: after the first update the optimizer has its moments, and the set of tensors stays the same.
        content, self._distribution = MCoreTensorAwareStateDict.from_state_dict(
            sharded_state(trained, is_loading=False, own_buffers=True), _ALGORITHM, data_parallel_group(), self._distribution
        )
        request = self._manager.save(content, step, is_async=True)
        problems = []
        try:
            request.async_fn(*request.async_fn_args)
            self._files.write_note(step, head)
        except (OSError, RuntimeError) as error:  # torch's writer raises RuntimeError on a full disk
            problems.append(f"rank {self._rank}: {error}")
        if problems := from_all_ranks(problems):
            self._files.remove(lambda saved_step: saved_step == step)
            self._warn(f"step {step} was not saved in {self._root}: {'; '.join(problems[:5])}")
            return
        for finish in request.finalize_fns:
            finish()
        self._files.remove(lambda saved_step: saved_step < step)
        if self._rank == 0:
            logger.info("saved step %d locally in %s", step, self._root)

    def newest(self, done_steps: int, trained: Trained) -> LocalStep | None:
        """Return the local checkpoint to continue from if it is newer than ``done_steps`` steps, else None. The log says why."""
        while True:
            step = self._manager.find_latest()
            self._warn_incomplete(max(step, done_steps))
            if step <= done_steps:
                return None
            head, problems = self._examine(step, trained)
            if not problems:
                return LocalStep(step, head["run"])
            self._warn(f"the one of step {step} in {self._root} is not used: {'; '.join(problems[:5])}")
            # An earlier one may still exist if this one's save was cut short.
            self.forget_after(step - 1)

    def load(self, trained: Trained) -> None:
        """Fill weights, optimizer and EMA, bit for bit, from the checkpoint that ``newest`` returned."""
        content, _ = self._manager.load()
        template = sharded_state(trained, is_loading=True, own_buffers=True)
        fill(trained, content.to_state_dict(template, _ALGORITHM, parallelization_group=data_parallel_group()))

    def forget_after(self, step: int) -> None:
        """Remove checkpoints newer than the state this run starts from, because they belong to another course of training."""
        self._files.remove(lambda saved_step: saved_step > step)
        dist.barrier()
        self._manager = local_checkpoint_manager(self._root, self._session)

    def _examine(self, step: int, trained: Trained) -> tuple[dict[str, Any], list[str]]:
        """Return the head that was saved with a step, and the reasons why the ranks cannot use it."""
        try:
            head = self._files.read_head(step)
            reason = _mismatch(head, trained)
            if self._rank == 0:
                reason = reason or _lost_predecessor(self._global, head["follows"])
        except ValueError as error:
            head, reason = {}, str(error)
        problems = from_all_ranks([f"rank {self._rank}: {reason}"] if reason else [])
        starts = set(from_all_ranks([head.get("start", "")]))
        if not problems and len(starts) > 1:
            problems = ["its shares were saved by different starts of the run"]
        return head, problems

    def _warn_incomplete(self, min_step: int) -> None:
        """Name the ranks that lack the newest step, if some rank has one above ``min_step``."""
        steps_by_rank = [{step for step, *_ in ids} for ids in self._manager.globally_available_ids]
        newest_step = max((step for steps in steps_by_rank for step in steps), default=-1)
        if newest_step > min_step:
            ranks_without_it = [str(rank) for rank, steps in enumerate(steps_by_rank) if newest_step not in steps]
            self._warn(
                f"the one of step {newest_step} in {self._root} is not used: it is not there for rank {', '.join(ranks_without_it[:8])}"
            )

    def _warn(self, text: str) -> None:
        if self._rank == 0:
            logger.warning("local checkpoint: %s", text)


def parallel_sizes() -> dict[str, int]:
    """Return the sizes of the parallel axes."""
    return {
        "ranks": dist.get_world_size(),
        "tensor": parallel_state.get_tensor_model_parallel_world_size(),
        "pipeline": parallel_state.get_pipeline_model_parallel_world_size(),
        "virtual pipeline": parallel_state.get_virtual_pipeline_model_parallel_world_size() or 1,
        "context": parallel_state.get_context_parallel_world_size(),
    }


def shape_of(trained: Trained) -> str:
    """Return a digest of this rank's tensors and their order: parameters, buckets of the optimizer, slices of the average."""
    parameters = [
        (name, key, list(value.shape), str(value.dtype), value.requires_grad)
        for name, module in trained.modules.items()
        for key, value in module.named_parameters()
    ]
    buckets = [
        (entry, type(leaf).__name__, getattr(leaf, "per_bucket_numel", None), len(leaf.param_groups))
        for entry, leaf in optimizers_with_state(trained.optimizer).items()
    ]
    average = trained.ema.local_bytes() if trained.ema is not None else None
    return hashlib.sha256(repr([parameters, buckets, average]).encode()).hexdigest()


def _mismatch(head: Mapping[str, Any], trained: Trained) -> str:
    """Return why this rank cannot load its share, or an empty string if it can."""
    if head["layout"] != parallel_sizes():
        return f"it was saved with other parallel sizes ({_sizes(head['layout'])}; now {_sizes(parallel_sizes())})"
    versions = provenance(0, trained.arch, 0)["versions"]
    if head["versions"] != versions:
        return f"it was saved by other versions ({head['versions']}; now {versions})"
    return "" if head["shape"] == shape_of(trained) else "the model, its frozen parts or the optimizer's buffers have changed"


def _lacks_moments(trained: Trained) -> bool:
    """Return whether an optimizer of this rank has no moments yet. A share without them could not be loaded."""
    leaves = [leaf.optimizer for leaf in optimizers_with_state(trained.optimizer).values()]
    return any(any(group["params"] for group in leaf.param_groups) and not leaf.state for leaf in leaves)


def _lost_predecessor(directory: Path, follows: int | None) -> str:
    """Return why a share that follows this global checkpoint is useless, or an empty string. Removing checkpoints sets a run back."""
    if follows is None or step_folders.newest_step(directory) >= follows:
        return ""
    return f"it continues the checkpoint of step {follows}, which is not in {directory} any more"


def _newest_global_step(directory: Path) -> int | None:
    """Return the step of the newest published checkpoint from the pointer file, which is cheaper than scanning all folders."""
    pointer = directory / step_folders.LATEST_FILE
    return int(pointer.read_text(encoding="utf-8")) if pointer.is_file() else None


def _sizes(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {size}" for name, size in sizes.items() if size > 1 or name == "ranks")
