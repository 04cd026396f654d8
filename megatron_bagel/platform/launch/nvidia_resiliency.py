"""NVIDIA's nvidia-resiliency-ext, where it is installed: only this file and inprocess_restart.py import it.

Its ft_launcher takes torchrun's place, and a monitor process of its own ends a rank that sends no heartbeat. Heartbeats begin with the
monitor's longer time-out for the first one, so that set-up and the first step have it too.
"""

from __future__ import annotations

import os
from typing import Any

#: Set by ft_launcher for the ranks it starts: where a rank's monitor listens.
MONITOR_SOCKET = "FT_RANK_MONITOR_IPC_SOCKET"


class LauncherHeartbeats:
    """A heartbeat after every step to the monitor that ft_launcher started for this rank; nothing under another launcher.

    ``wanted`` None: whenever ft_launcher started this process. True outside of it is a ValueError.
    """

    def __init__(self, wanted: bool | None) -> None:
        started = MONITOR_SOCKET in os.environ
        if wanted and not started:
            raise ValueError(
                "--ft_heartbeats True: this process was not started by ft_launcher; use it in place of torchrun, or drop the flag"
            )
        self._client = _client() if started and wanted is not False else None

    def start(self) -> None:
        """Connect. The monitor's time-out for the first heartbeat begins."""
        if self._client is not None:
            self._client.init_workload_monitoring()

    def beat(self) -> None:
        """This rank has done a step."""
        if self._client is not None:
            self._client.send_heartbeat()

    def close(self) -> None:
        """Leave the monitor in peace: what follows has no heartbeats."""
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
    """Its manager of checkpoints on disks of the node: one file per rank and step, `<directory>/<session>/<rank>/iter_*_local.pt`."""
    from nvidia_resiliency_ext.checkpointing.local.ckpt_managers.local_manager import LocalCheckpointManager

    return LocalCheckpointManager(directory, session)
