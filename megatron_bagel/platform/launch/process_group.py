# SPDX-License-Identifier: Apache-2.0
"""Starts and ends the process group: from the launcher's environment, from a file for tests, or as a world of one rank."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from megatron_bagel.platform.cuda_on_cpu.patches import enter_thread
from megatron_bagel.platform.device import backend, check_processes, device, has_gpu
from megatron_bagel.platform.launch.rendezvous import generation_store

_LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def init_distributed(
    timeout_minutes: float = 10.0,
    init_method: str | None = None,
    rank: int = -1,
    world_size: int = -1,
    store: dist.Store | None = None,
) -> tuple[int, int]:
    """Join the process group.

    Without arguments the launcher's environment variables apply. A process without a launcher becomes a world of one rank.

    Args:
        timeout_minutes: The longest time that a collective may wait.
        init_method: A torch.distributed URL such as ``file:///tmp/store``; needs ``rank`` and ``world_size``.
        rank: This process's rank.
        world_size: The number of ranks.
        store: Replaces the launcher's rendezvous.

    Returns:
        The rank and the world size.

    Raises:
        ValueError: If only some of the launcher's variables are set, or if processes would have to share a GPU.
    """
    enter_thread()
    check_processes()
    if has_gpu():
        torch.cuda.set_device(device())
    timeout = timedelta(minutes=timeout_minutes)
    if store is not None:
        rank, world_size = launched_rank(), launched_world_size()
    elif init_method is None and not _has_launcher():
        # Port 0: the store itself takes a free port and keeps it.
        store, rank, world_size = dist.TCPStore("127.0.0.1", 0, 1, is_master=True, timeout=timeout), 0, 1
    elif init_method is None and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        store, rank, world_size = generation_store(timeout)
    dist.init_process_group(backend(), init_method=init_method, store=store, rank=rank, world_size=world_size, timeout=timeout)
    return dist.get_rank(), dist.get_world_size()


def _has_launcher() -> bool:
    """Return whether the launcher's variables are set. Raises ValueError if only some are."""
    present = [name for name in _LAUNCHER_VARIABLES if name in os.environ]
    if present and len(present) < len(_LAUNCHER_VARIABLES):
        absent = [name for name in _LAUNCHER_VARIABLES if name not in present]
        raise ValueError(f"environment has {', '.join(present)} but not {', '.join(absent)}; start with torchrun, or unset them")
    return bool(present)


def side_store(name: str) -> dist.Store:
    """Return the store of the rendezvous under the prefix ``name``, over a separate connection if this torch supports it.

    A thread that uses a separate connection does not wait for one that waits on the first.
    """
    store = dist.distributed_c10d._get_default_store()
    return dist.PrefixStore(f"megatron_bagel/{name}", store.clone() if hasattr(store, "clone") else store)


def set_collective_timeout(minutes: float) -> None:
    """Set the time-out of the collectives of the world and of Megatron-Core's process groups. Call it between collectives."""
    from megatron.core import parallel_state

    groups = [dist.group.WORLD, *(parallel_state._global_process_group_list or ())]
    for group in dict.fromkeys(group for group in groups if isinstance(group, dist.ProcessGroup)):
        dist.distributed_c10d._set_pg_timeout(timedelta(minutes=minutes), group)


def launched_restarts() -> int:
    """Return how often torchrun has restarted these processes, 0 without it."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def launched_world_size() -> int:
    """Return the launcher's world size, which is known before the process group exists; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def launched_rank() -> int:
    """Return the launcher's rank; 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))


def shutdown_distributed() -> None:
    """Leave the process group and Megatron-Core's groups, if any exist."""
    from megatron.core import parallel_state

    from megatron_bagel.platform import megatron_compat

    if parallel_state.model_parallel_is_initialized():
        megatron_compat.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def reserved_port() -> Iterator[int]:
    """Give a TCP port of this host that nobody else is given while the block runs.

    The port is bound, and nothing listens on it. A server that sets SO_REUSEADDR, as torch's store does, may listen on it.
    """
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("", 0))
        yield holder.getsockname()[1]
