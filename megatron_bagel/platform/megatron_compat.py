# SPDX-License-Identifier: Apache-2.0
"""Differences between Megatron-Core 0.16.1 and 0.19, each handled in one function here."""

from __future__ import annotations

import pickle
import queue
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import megatron.core
from megatron.core.transformer.spec_utils import ModuleSpec
from packaging.version import Version

OLDEST, TOO_NEW = Version("0.16.1"), Version("0.20")
MEGATRON_VERSION = Version(megatron.core.__version__)


def check_versions() -> None:
    """Raise ValueError for a Megatron-Core outside the range this code is tested with."""
    if not OLDEST <= Version(MEGATRON_VERSION.base_version) < TOO_NEW:
        raise ValueError(f"megatron-core {MEGATRON_VERSION} is installed; this code works with >={OLDEST},<{TOO_NEW}")


def torch_dist_save_strategy() -> Any:
    """Return the strategy that writes a torch_dist checkpoint; 0.17 dropped its version argument."""
    from megatron.core.dist_checkpointing.serialization import get_default_save_sharded_strategy

    return get_default_save_sharded_strategy("torch_dist")


def async_save_arguments() -> dict[str, str]:
    """Return the arguments that make ``dist_checkpointing.save`` write in the background with Megatron-Core's writer.

    0.19 defaults to ``nvrx``, a package that is not a dependency. 0.16 has only its writer and no such argument.
    """
    return {"async_strategy": "mcore"} if Version("0.19") <= Version(MEGATRON_VERSION.base_version) else {}


class CallableSpec(ModuleSpec):
    """A spec of a part of an MoE layer. 0.16 passes it to ``build_module``, and 0.19 calls it."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Build the module."""
        module: Any = self.module
        return module(*args, submodules=self.submodules, **kwargs)


def define_router_gemm() -> None:
    """Define the name by which 0.16's router looks for Transformer Engine's product, also where that package is absent."""
    from megatron.core.transformer.moe import moe_utils

    if not hasattr(moe_utils, "te_general_gemm"):
        utils: Any = moe_utils
        utils.te_general_gemm = None


def destroy_model_parallel() -> None:
    """Destroy Megatron-Core's groups, including two that 0.16's ``parallel_state.destroy_model_parallel`` keeps.

    The threads of these two groups live on, and a process forked later crashes when it replaces them.
    """
    import torch.distributed as dist
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    for name, value in list(vars(parallel_state).items()):
        if isinstance(value, dist.ProcessGroup):
            setattr(parallel_state, name, None)


def collect_save_results_in_process() -> None:
    """Let a synchronous save pass its results inside this process.

    Otherwise Megatron-Core starts a helper process per rank at the first save. The helper takes seconds to import everything
    again, and outlives a killed rank.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    filesystem_async._results_queue = queue.SimpleQueue()


class _FileOfResults:
    """A queue of one entry from a forked process to its parent. A pipe would block the child if the entry is large."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - get_nowait closes it

    def put(self, result: Any) -> None:
        self._file.write(pickle.dumps(result))
        self._file.flush()

    def get_nowait(self) -> Any:
        """Return the entry. Raises queue.Empty if the writer died before it had a result."""
        self._file.seek(0)
        content = self._file.read()
        self._file.close()
        if not content:
            raise queue.Empty
        return pickle.loads(content)


def collect_save_results_by_file() -> None:
    """Let the next background save pass its results in an unnamed file instead of through a helper process."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    filesystem_async._results_queue = _FileOfResults()


@contextmanager
def padded_buckets(optimizer: Any) -> Iterator[None]:
    """Make a fully reshardable state of the distributed optimizer cut parameters at the right offsets within the block.

    Every supported Megatron-Core joins the buckets of a gradient buffer without the padding between them, but cuts parameters at
    offsets that include it. With a second bucket, weights and moments would be saved shifted. Counting the padding as content
    makes both agree.
    """
    leaves = getattr(optimizer, "chained_optimizers", [optimizer])
    buffers = [buffer for leaf in leaves for buffer in getattr(leaf, "buffers", [])]
    saved_counts = [(part, part.numel_unpadded) for buffer in buffers for part in (buffer, *buffer.buckets)]
    for buffer in buffers:
        buffer.numel_unpadded = buffer.numel
        for bucket in buffer.buckets:
            bucket.numel_unpadded = bucket.grad_data.numel()
    try:
        yield
    finally:
        for part, numel in saved_counts:
            part.numel_unpadded = numel
