# SPDX-License-Identifier: Apache-2.0
"""When heartbeats go to ft_launcher, and what is refused; that its monitor gets them is tests/faults/test_ft_launcher.py."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from megatron_bagel.config.flag_rules import check_resilience
from megatron_bagel.config.parser import Config
from megatron_bagel.platform.launch.inprocess_restart import restart_in_process
from megatron_bagel.platform.launch.nvidia_resiliency import MONITOR_SOCKET, LauncherHeartbeats


def beat_once(wanted: bool | None) -> None:
    heartbeats = LauncherHeartbeats(wanted)
    heartbeats.start()
    heartbeats.beat()
    heartbeats.close()


@pytest.mark.parametrize("wanted", [None, True])
def test_under_ft_launcher_the_monitor_is_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wanted: bool | None) -> None:
    pytest.importorskip("nvidia_resiliency_ext", reason='nvidia-resiliency-ext is not installed: pip install -e ".[resiliency]"')
    monkeypatch.setenv(MONITOR_SOCKET, str(tmp_path / "nobody listens"))
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.setenv(name, "0")
    with pytest.raises(FileNotFoundError):
        beat_once(wanted)


def test_nobody_is_called_without_ft_launcher_or_against_ones_will(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(MONITOR_SOCKET, raising=False)
    beat_once(None)
    with pytest.raises(ValueError, match="ft_launcher did not start this process"):
        LauncherHeartbeats(True)
    monkeypatch.setenv(MONITOR_SOCKET, str(tmp_path / "nobody listens"))
    beat_once(False)


def test_a_launcher_of_a_package_that_is_not_installed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("nvidia_resiliency_ext", "nvidia_resiliency_ext.fault_tolerance"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setenv(MONITOR_SOCKET, "/tmp/socket")
    with pytest.raises(ValueError, match="nvidia-resiliency-ext cannot be imported"):
        LauncherHeartbeats(None)


def test_restarts_in_process_need_a_resume_and_a_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("nvidia_resiliency_ext", reason='nvidia-resiliency-ext is not installed: pip install -e ".[resiliency]"')
    with pytest.raises(ValueError, match="--inprocess_restarts needs --auto_resume True"):
        check_resilience(Config.from_values({"inprocess_restarts": 1}))
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ValueError, match="--inprocess_restarts needs ranks that a launcher started"):
        restart_in_process(lambda store: None, 1, 1.0, "megatron_bagel.train")
