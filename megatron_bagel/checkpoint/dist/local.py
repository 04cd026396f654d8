"""Checkpoints between checkpoints: each rank's own share on a disk of its node, for a restart with the same layout after a failure.

Written by nvidia-resiliency-ext's LocalCheckpointManager from Megatron-Core's MCoreTensorAwareStateDict, which keeps what data-parallel
ranks hold alike on one of them. Nothing is gathered: the optimizer's state is stored as it lies in its buffers. So such a
checkpoint is only of use to the same ranks; `shape_of` is the test for that. Methods are collective.
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
from megatron_bagel.parallel.rank_zero import from_all_ranks, on_first_rank
from megatron_bagel.checkpoint.dist.local_files import RankFiles
from megatron_bagel.checkpoint.dist.optimizer_state import optimizers_with_state
from megatron_bagel.checkpoint.dist.state import Trained, data_parallel_group, fill, provenance, sharded_state
from megatron_bagel.platform.launch.nvidia_resiliency import local_checkpoint_manager

logger = logging.getLogger(__name__)
_ALGORITHM = "fully_parallel"


@dataclass(frozen=True)
class LocalStep:
    """A local checkpoint that every rank of this run has, whole. `state` is everything that is no tensor."""

    step: int
    state: dict[str, Any]


class LocalCheckpoints:
    """Those of one run, told from others' by its `checkpoint_dir`. The newest is kept, beside it the next while it is written.

    Raises ValueError where a rank cannot write into `directory`.
    """

    def __init__(self, directory: str, checkpoint_dir: str, every: int) -> None:
        self._root, self._global, self._every = directory, Path(checkpoint_dir), every
        self._session = hashlib.sha256(str(self._global.resolve()).encode()).hexdigest()[:12]
        self._rank = dist.get_rank()
        self._files = RankFiles(Path(directory) / self._session / str(self._rank), self._rank)
        # Shares of one step written by different starts of a run do not belong together.
        self._start = on_first_rank(lambda: uuid4().hex, "cannot begin")
        self._distribution: Any = None
        wrong = []
        try:
            self._files.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            wrong.append(f"rank {self._rank}: {error}")
        if wrong := from_all_ranks(wrong):
            raise ValueError(f"--local_checkpoint_dir {directory} cannot be used: {'; '.join(wrong[:5])}. It must be writable there")
        self._manager = local_checkpoint_manager(directory, self._session)

    @property
    def place(self) -> str:
        """For the log."""
        return f"in {self._root} on each node"

    def due(self, steps: int) -> bool:
        """Whether the state after `steps` steps is saved locally."""
        return steps % self._every == 0

    def save(self, step: int, trained: Trained, run_state: Mapping[str, Any]) -> None:
        """Save the state after `step` steps and remove older ones. A failure is a warning: the run has its checkpoints."""
        if from_all_ranks(["waits"] if _before_first_update(trained) else []):
            self._say(f"step {step} was not saved: no update of the weights was made yet")
            return
        newest = _pointed_to(self._global) if self._rank == 0 else None
        head = {
            **provenance(step, trained.arch, dist.get_world_size()), "start": self._start, "layout": layout(), "run": dict(run_state),
            "shape": shape_of(trained), "follows": newest,
        }  # fmt: skip
        # Who keeps what is dealt once: from the first update on, when the optimizer has its moments, nothing comes or goes.
        content, self._distribution = MCoreTensorAwareStateDict.from_state_dict(
            sharded_state(trained, is_loading=False, own_buffers=True), _ALGORITHM, data_parallel_group(), self._distribution
        )
        request = self._manager.save(content, step, is_async=True)
        wrong = []
        try:
            request.async_fn(*request.async_fn_args)
            self._files.write_note(step, head)
        except (OSError, RuntimeError) as error:  # torch's writer raises the latter on a full disk
            wrong.append(f"rank {self._rank}: {error}")
        if wrong := from_all_ranks(wrong):
            self._files.remove(lambda found: found == step)
            self._say(f"step {step} was not saved in {self._root}: {'; '.join(wrong[:5])}")
            return
        for finish in request.finalize_fns:
            finish()
        self._files.remove(lambda found: found < step)
        if self._rank == 0:
            logger.info("saved step %d locally in %s", step, self._root)

    def newest(self, after: int, trained: Trained) -> LocalStep | None:
        """The local checkpoint to continue from, if it is newer than the state after `after` steps; why not is in the log."""
        while True:
            step = self._manager.find_latest()
            self._say_incomplete(max(step, after))
            if step <= after:
                return None
            head, wrong = self._examine(step, trained)
            if not wrong:
                return LocalStep(step, head["run"])
            self._say(f"the one of step {step} in {self._root} is not used: {'; '.join(wrong[:5])}")
            # The one before it may still be there, when this one's save was cut short.
            self.forget_after(step - 1)

    def load(self, trained: Trained) -> None:
        """Fill weights, optimizer and EMA from what `newest` found, bit for bit."""
        content, _ = self._manager.load()
        wanted = sharded_state(trained, is_loading=True, own_buffers=True)
        fill(trained, content.to_state_dict(wanted, _ALGORITHM, parallelization_group=data_parallel_group()))

    def forget_after(self, step: int) -> None:
        """Remove what is newer than the state this run begins with: another past than the one it is about to make."""
        self._files.remove(lambda found: found > step)
        dist.barrier()
        self._manager = local_checkpoint_manager(self._root, self._session)

    def _examine(self, step: int, trained: Trained) -> tuple[dict[str, Any], list[str]]:
        """(what was said of a step when it was saved, why the ranks cannot use it)."""
        try:
            head = self._files.read_head(step)
            reason = _not_for_us(head, trained)
            if self._rank == 0:
                reason = reason or _set_back(self._global, head["follows"])
        except ValueError as error:
            head, reason = {}, str(error)
        wrong = from_all_ranks([f"rank {self._rank}: {reason}"] if reason else [])
        starts = set(from_all_ranks([head.get("start", "")]))
        if not wrong and len(starts) > 1:
            wrong = ["its shares were saved by different starts of the run"]
        return head, wrong

    def _say_incomplete(self, above: int) -> None:
        """Name the ranks that lack the newest step, where some have one above that."""
        held = [{step for step, *_ in ids} for ids in self._manager.globally_available_ids]
        newest = max((step for steps in held for step in steps), default=-1)
        if newest > above:
            lacking = [str(rank) for rank, steps in enumerate(held) if newest not in steps]
            self._say(f"the one of step {newest} in {self._root} is not used: it is not there for rank {', '.join(lacking[:8])}")

    def _say(self, text: str) -> None:
        if self._rank == 0:
            logger.warning("local checkpoint: %s", text)


def layout() -> dict[str, int]:
    """Sizes of the axes."""
    return {
        "ranks": dist.get_world_size(),
        "tensor": parallel_state.get_tensor_model_parallel_world_size(),
        "pipeline": parallel_state.get_pipeline_model_parallel_world_size(),
        "virtual pipeline": parallel_state.get_virtual_pipeline_model_parallel_world_size() or 1,
        "context": parallel_state.get_context_parallel_world_size(),
    }


def shape_of(trained: Trained) -> str:
    """A digest of what this rank holds and how it lies: parameters in their order, buckets of the optimizer, slices of the average."""
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


def _not_for_us(head: Mapping[str, Any], trained: Trained) -> str:
    """Why this rank cannot take over its share; empty when it can."""
    if head["layout"] != layout():
        return f"it was saved on another layout ({_sizes(head['layout'])}; now {_sizes(layout())})"
    versions = provenance(0, trained.arch, 0)["versions"]
    if head["versions"] != versions:
        return f"it was saved by other versions ({head['versions']}; now {versions})"
    return "" if head["shape"] == shape_of(trained) else "the model, its frozen parts or the optimizer's buffers are others now"


def _before_first_update(trained: Trained) -> bool:
    """Whether an optimizer of this rank has no moments yet: a share without them could not be loaded."""
    leaves = [leaf.optimizer for leaf in optimizers_with_state(trained.optimizer).values()]
    return any(any(group["params"] for group in leaf.param_groups) and not leaf.state for leaf in leaves)


def _set_back(directory: Path, follows: int | None) -> str:
    """Why a share that follows this global checkpoint is of no use; empty when it is. A run is set back by removing checkpoints."""
    if follows is None or step_folders.newest_step(directory) >= follows:
        return ""
    return f"it continues the checkpoint of step {follows}, which is not in {directory} any more"


def _pointed_to(directory: Path) -> int | None:
    """Step of the newest published checkpoint, by the pointer beside it: cheaper than looking at them all."""
    pointer = directory / step_folders.LATEST_FILE
    return int(pointer.read_text(encoding="utf-8")) if pointer.is_file() else None


def _sizes(layout: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {size}" for name, size in layout.items() if size > 1 or name == "ranks")
