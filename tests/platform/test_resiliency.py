"""Heartbeats to ft_launcher, with a stand-in for its package: the real one needs its launcher, and has not been met yet."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from megatron_bagel.config.parser import Config
from megatron_bagel.config.validate import check_resilience
from megatron_bagel.platform.resiliency import MONITOR_SOCKET, LauncherHeartbeats

STAND_IN = """
class RankMonitorClient:
    calls = []

    def __getattr__(self, name):
        return lambda: self.calls.append(name)
"""


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the stand-in was asked for."""
    package = tmp_path / "nvidia_resiliency_ext"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "fault_tolerance.py").write_text(STAND_IN)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in [name for name in sys.modules if name.startswith("nvidia_resiliency_ext")]:
        monkeypatch.delitem(sys.modules, name)
    from nvidia_resiliency_ext.fault_tolerance import RankMonitorClient

    yield RankMonitorClient.calls
    for name in [name for name in sys.modules if name.startswith("nvidia_resiliency_ext")]:
        del sys.modules[name]


def beat_once(wanted: bool | None) -> None:
    heartbeats = LauncherHeartbeats(wanted)
    heartbeats.start()
    heartbeats.beat()
    heartbeats.close()


@pytest.mark.parametrize(("wanted", "sent"), [(None, True), (True, True), (False, False)])
def test_under_ft_launcher_heartbeats_are_sent(
    stand_in: list[str], monkeypatch: pytest.MonkeyPatch, wanted: bool | None, sent: bool
) -> None:
    monkeypatch.setenv(MONITOR_SOCKET, "/tmp/socket")
    beat_once(wanted)
    expected = ["init_workload_monitoring", "send_heartbeat", "shutdown_workload_monitoring"]
    assert stand_in == (expected if sent else [])


def test_under_other_launchers_none_are(stand_in: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(MONITOR_SOCKET, raising=False)
    beat_once(None)
    assert stand_in == []
    with pytest.raises(ValueError, match="not started by ft_launcher"):
        LauncherHeartbeats(True)


def test_asking_for_what_is_not_installed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nvidia_resiliency_ext", None)
    monkeypatch.setattr("megatron_bagel.config.validate.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="--ft_heartbeats True needs the package nvidia-resiliency-ext, which is not installed"):
        check_resilience(Config.from_values({"ft_heartbeats": True}))
    monkeypatch.setenv(MONITOR_SOCKET, "/tmp/socket")
    with pytest.raises(ValueError, match="nvidia-resiliency-ext cannot be imported"):
        LauncherHeartbeats(None)
