# SPDX-License-Identifier: Apache-2.0
"""Access to NVIDIA's nvidia-resiliency-ext if it is installed: only this file and inprocess_restart.py import it.

Its ft_launcher replaces torchrun and starts a monitor process per rank, which ends a rank that sends no heartbeat. The monitor has a
longer time-out for the first heartbeat, which covers set-up and the first step.
"""

from __future__ import annotations

import os
from typing import Any

#: Socket of a rank's monitor; ft_launcher sets this variable for the ranks it starts.
MONITOR_SOCKET = "FT_RANK_MONITOR_IPC_SOCKET"


class LauncherHeartbeats:
    """Sends a heartbeat after every step to the monitor that ft_launcher started for this rank, and nothing under another launcher.

    ``enabled`` None sends heartbeats whenever ft_launcher started this process; True raises ValueError if it did not.
    """

    def __init__(self, enabled: bool | None) -> None:
        started = MONITOR_SOCKET in os.environ
        if enabled and not started:
            raise ValueError("--ft_heartbeats True: ft_launcher did not start this process; use it instead of torchrun, or drop the flag")
        self._client = _client() if started and enabled is not False else None

    def start(self) -> None:
        """Connect to the monitor, whose time-out for the first heartbeat begins now."""
        if self._client is not None:
            self._client.init_workload_monitoring()

    def beat(self) -> None:
        """Report that this rank has finished a step."""
        if self._client is not None:
            self._client.send_heartbeat()

    def close(self) -> None:
        """Disconnect from the monitor before work that sends no heartbeats."""
        if self._client is not None:
            self._client.shutdown_workload_monitoring()


def _client() -> Any:
    try:
        from nvidia_resiliency_ext.fault_tolerance import RankMonitorClient
    except ImportError as error:
        raise ValueError(
            "ft_launcher started this process, but the package nvidia-resiliency-ext cannot be imported in it: install it in this "
            "environment, start with torchrun, or give --ft_heartbeats False"
        ) from error
    return RankMonitorClient()


def local_checkpoint_manager(directory: str, session: str) -> Any:
    """Return the manager of checkpoints on a node's disks: one file per rank and step, ``<directory>/<session>/<rank>/iter_*_local.pt``."""
    from nvidia_resiliency_ext.checkpointing.local.ckpt_managers.local_manager import LocalCheckpointManager

    return LocalCheckpointManager(directory, session)
