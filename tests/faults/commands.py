# SPDX-License-Identifier: Apache-2.0
"""Commands of the product in forked processes: what a shell would see of them, without the seconds of their imports."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil


@dataclass(frozen=True)
class Ended:
    """How a command ended. ``status`` is that of a shell, negative for a signal, None where it had to be killed at its limit."""

    status: int | None
    output: str
    errors: str

    @property
    def text(self) -> str:
        """Everything it printed."""
        return self.output + self.errors


@dataclass
class Command:
    """A running command, in a session of its own."""

    process_id: int
    log: Path
    limit: float
    started: float = field(default_factory=time.monotonic)
    _status: int | None = None

    def alive(self) -> bool:
        """Whether it still runs."""
        if self._status is None:
            process_id, status = os.waitpid(self.process_id, os.WNOHANG)
            self._status = os.waitstatus_to_exitcode(status) if process_id else None
        return self._status is None

    def wait(self) -> Ended:
        """Wait for its end; SIGKILL at the limit, which does not count the time that other programs of the machine took from it."""
        while self.alive() and not self.is_late():
            time.sleep(0.02)
        status = self._status
        self.kill()
        return Ended(status, *(self.log.with_suffix(f".{name}").read_text(errors="replace") for name in ("out", "err")))

    def is_late(self) -> bool:
        """Whether its limit is over, without the time that other programs of the machine took from it."""
        over = time.monotonic() - self.started - self.limit
        return over > 0 and over > self._seconds_in_queue()

    def _seconds_in_queue(self) -> float:
        """Seconds that its threads were ready to run and got no processor. 0 on a quiet machine, or if the kernel does not count them."""
        waited = 0
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(self.process_id)
            for member in (process, *process.children(recursive=True)):
                for counts in Path(f"/proc/{member.pid}/task").glob("*/schedstat"):
                    with contextlib.suppress(OSError):  # the thread has ended
                        waited += int(counts.read_text().split()[1])
        return waited / 1e9

    def kill(self) -> None:
        """SIGKILL to it and to all that it started."""
        if self.alive():
            for process in psutil.Process(self.process_id).children(recursive=True):
                process.kill()
            os.kill(self.process_id, signal.SIGKILL)
            while self.alive():
                time.sleep(0.005)

    def stop(self) -> None:
        """SIGSTOP: it stays, and does nothing any more."""
        os.kill(self.process_id, signal.SIGSTOP)


def start(
    words: Sequence[str], log: Path, limit: float, environment: Mapping[str, str] | None = None, largest_file: int | None = None,
    shared_memory: int | None = None, new_interpreter: bool = False,
) -> Command:  # fmt: skip
    """Start ``megatron-bagel WORDS``. Its output goes to ``log`` with the endings .out and .err.

    Args:
        words: Words of the command line.
        log: Where output goes, without an ending.
        limit: Seconds until ``wait`` kills it.
        environment: Variables besides this process's.
        largest_file: Bytes that it may write to any one file; a write beyond fails as on a full disk.
        shared_memory: Bytes of a ``/dev/shm`` of its own, which needs root.
        new_interpreter: Whether the interpreter starts anew, as a shell starts it, so that variables for the loader count.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    process_id = os.fork()
    if process_id:
        return Command(process_id, log, limit)
    status = 1
    try:
        os.setsid()
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(log.with_suffix(f".{name}"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), number)
        # Under pytest these are not files on descriptors 1 and 2.
        sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))  # noqa: SIM115
        os.environ.update(environment or {})
        if largest_file is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
        if shared_memory is not None:
            mount_shared_memory(shared_memory)
        if new_interpreter:
            os.environ["PYTHONPATH"] = str(Path(__file__).resolve().parents[2])
            os.execv(sys.executable, [sys.executable, "-W", "ignore", "-m", "megatron_bagel", *words])
        gc.freeze()
        status = _run(words)
    except OSError as error:
        print(error, file=sys.stderr)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def mount_shared_memory(size: int) -> None:
    """Give this process a ``/dev/shm`` of ``size`` bytes. Raises OSError where that is not permitted."""
    libc = ctypes.CDLL(None, use_errno=True)
    new_mounts, private = 0x00020000, 1 << 18 | 1 << 14
    if (
        libc.unshare(new_mounts)
        or libc.mount(b"none", b"/", None, private, None)
        or libc.mount(b"tmpfs", b"/dev/shm", b"tmpfs", 0, f"size={size}".encode())
    ):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), "/dev/shm")


def _run(words: Sequence[str]) -> int:
    """The exit status that an interpreter would end with."""
    from megatron_bagel.cli.main import main

    sys.argv = ["megatron-bagel", *words]
    try:
        return main(words)
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1


def preload() -> None:
    """Import what the commands import, so that each of them starts in a fraction of a second."""
    from megatron_bagel import platform
    from megatron_bagel.cli.console import quiet

    quiet()
    platform.install()
    import megatron_bagel.checkpoint.convert
    import megatron_bagel.cli.data.build
    import megatron_bagel.cli.data.latents
    import megatron_bagel.cli.data.verify
    import megatron_bagel.cli.generate
    import megatron_bagel.cli.resolve_run
    import megatron_bagel.training.setup.set_up  # noqa: F401
