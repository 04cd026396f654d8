# SPDX-License-Identifier: Apache-2.0
"""Hosts of a cluster as network namespaces on one machine: an address each, and a cable that can be pulled."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

_CLONE_NEWNET = 0x40000000
PORT = 29500


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


class Hosts:
    """``count`` hosts on one switch. The switch has a namespace of its own, so nothing of the machine's network is touched."""

    def __init__(self, count: int) -> None:
        self.names = [f"bagel{os.getpid()}-{number}" for number in range(count)]
        self.switch = f"bagel{os.getpid()}-switch"

    def create(self) -> None:
        """Raises CalledProcessError where namespaces are not permitted."""
        _ip("netns", "add", self.switch)
        _ip("-n", self.switch, "link", "add", "switch", "type", "bridge")
        _ip("-n", self.switch, "link", "set", "switch", "up")
        for number, name in enumerate(self.names):
            _ip("netns", "add", name)
            _ip("-n", name, "link", "add", "eth0", "type", "veth", "peer", "name", f"port{number}", "netns", self.switch)
            _ip("-n", name, "addr", "add", f"{self.address(number)}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                _ip("-n", name, "link", "set", device, "up")
            _ip("-n", self.switch, "link", "set", f"port{number}", "master", "switch")
            self.plug(number)

    def address(self, number: int) -> str:
        """Of one host, seen by the others."""
        return f"10.99.0.{number + 1}"

    def environment(self) -> dict[str, str]:
        """What a launcher would tell the ranks, one a host: meet at the first host, talk over the cable."""
        return {"MASTER_ADDR": self.address(0), "MASTER_PORT": str(PORT), "GLOO_SOCKET_IFNAME": "eth0"}

    def enter(self, number: int) -> None:
        """Put this thread, and the threads and processes it starts, into a host."""
        with open(f"/var/run/netns/{self.names[number]}") as namespace:
            if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), _CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), f"cannot enter the namespace {self.names[number]}")

    def pull(self, number: int) -> None:
        """Cut a host off: what it sends and what is sent to it is lost, and nobody is told."""
        _ip("-n", self.switch, "link", "set", f"port{number}", "down")

    def plug(self, number: int) -> None:
        """Connect it."""
        _ip("-n", self.switch, "link", "set", f"port{number}", "up")

    def remove(self) -> None:
        """Everything that exists of it."""
        for name in (*self.names, self.switch):
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


@contextmanager
def hosts(count: int) -> Iterator[Hosts]:
    """Hosts for a test, which is skipped where they cannot be made."""
    if shutil.which("ip") is None:
        pytest.skip("there is no `ip` (package iproute2), so hosts cannot be rehearsed as network namespaces")
    made = Hosts(count)
    try:
        made.create()
    except subprocess.CalledProcessError as error:
        made.remove()
        pytest.skip(f"network namespaces are not permitted here: {error.stderr.strip()}")
    try:
        yield made
    finally:
        made.remove()
