# SPDX-License-Identifier: Apache-2.0
"""Judges faults: each function does one kind to a world and returns what was wrong with the answer, an empty list if nothing."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from megatron_bagel.checkpoint.dist.step_folders import is_complete
from megatron_bagel.platform.launch.process_group import reserved_port
from tests.faults.commands import Ended, start
from tests.faults.draws import ALL_FILES, Fault
from tests.faults.fake_clock import ATTEMPTS, faketime_library, locked_up, variables
from tests.faults.phases import LIMIT, STEPS, World
from tests.faults.small_disk import SmallDisk, size_of

#: Exit statuses of a command that cannot go on because of something to change: files, flags, a full disk.
REFUSALS = {"verify": {1, 2}}
WATCHDOG = 18


class NotHere(Exception):
    """This machine cannot do the fault; the text says why."""


def judge(fault: Fault, world: World, scratch: Path) -> list[str]:
    """Do a fault in the folder ``scratch`` and return what was wrong. Raises NotHere where it cannot be done."""
    return _JUDGES[fault.kind](fault, world, scratch)


def clean(ended: Ended) -> list[str]:
    """What is wrong with any command, whatever happened to it."""
    faults = [] if ended.status is not None else ["did not end within its limit"]
    return faults + (["traceback on stderr: " + _last_line(ended)] if "Traceback (most recent call last)" in ended.errors else [])


def refusal(ended: Ended, phase: str, names: list[str]) -> list[str]:
    """What is wrong with a command that had to refuse: its status, and whether it names what is to be changed."""
    faults = clean(ended)
    expected = REFUSALS.get(phase, {2})
    if ended.status not in expected:
        faults.append(f"exit status {ended.status}, not {' or '.join(map(str, sorted(expected)))}: {_last_line(ended)}")
    if not any(name in ended.text for name in names):
        faults.append(f"names none of {', '.join(names)}: {_last_line(ended)}")
    return faults


def continues(phase: str, world: World, output: Path, log: Path) -> list[str]:
    """What is wrong when the same command runs again, undisturbed: it must end well and give the undisturbed output."""
    ended = world.run(phase, output, log)
    faults = clean(ended)
    if ended.status != 0:
        return [*faults, f"again: exit status {ended.status}: {_last_line(ended)}"]
    return faults + [f"again: {difference}" for difference in world.differences(phase, output)]


def kill(fault: Fault, world: World, scratch: Path) -> list[str]:
    """SIGKILL at a moment of a phase, or of a save; then the same command again."""
    phase = "train" if fault.where == "save" else fault.where
    output = scratch / "output"
    command = start(world.words(phase, output), scratch / "killed", LIMIT)
    if fault.where == "save":
        checkpoints = output / "checkpoints"
        while command.alive() and not (checkpoints.exists() and any(checkpoints.iterdir())):
            time.sleep(0.001)
        time.sleep(0.5 * fault.position)
    else:
        end = time.monotonic() + fault.position * world.seconds[phase]
        while command.alive() and time.monotonic() < end:
            time.sleep(0.005)
    command.kill()
    if fault.where == "export" and output.exists():  # it was published before the kill, and an export replaces nothing
        again = refusal(world.run(phase, output, scratch / "again"), phase, [str(output)])
        return again + world.differences(phase, output)
    complete = _steps(output)
    faults = continues(phase, world, output, scratch / "again")
    return faults + [f"checkpoint {step} was complete before and is gone" for step in complete - _steps(output)]


def damage(fault: Fault, world: World, scratch: Path) -> list[str]:
    """Damage a file, then run what reads it: it refuses and names the file, or does what it would have done."""
    kind = ALL_FILES[fault.where]
    source: Path = getattr(world, kind.artefact)
    if kind.artefact == "checkpoints":  # the run goes on in its own folder
        shutil.copytree(source.parent, scratch / "run")
        copy, output = scratch / "run/checkpoints", scratch / ("run" if kind.reader == "train" else "output")
    else:
        copy, output = scratch / kind.artefact, scratch / "output"
        shutil.copytree(source, copy)
    files = sorted(path for path in copy.glob(kind.pattern) if path.is_file() and path.stat().st_size)
    if not files:
        raise NotHere(f"this version of Megatron-Core writes no {kind.pattern}")
    path = files[fault.choice % len(files)]
    damage_file(path, fault.how, fault.position)
    ended = replace(world, **{kind.artefact: copy}).run(kind.reader, output, scratch / "reader")
    if ended.status != 0:
        return [f"{path.relative_to(scratch)}: {text}" for text in refusal(ended, kind.reader, [path.name, str(copy)])]
    faults = clean(ended)
    if kind.reader == "verify":
        faults += ["the damage was not noticed"] if not kind.silent else []
    elif not kind.silent:
        faults += world.differences(kind.reader, output)
    return [f"{path.relative_to(scratch)}: {text}" for text in faults]


def damage_file(path: Path, how: str, position: float) -> None:
    """Flip a byte at a place, cut the file there, or leave nothing of it."""
    data = bytearray(path.read_bytes())
    place = int(position * len(data))
    if how == "flip":
        data[place] ^= 0xFF
    path.write_bytes(data if how == "flip" else data[: place if how == "truncate" else 0])


def full(fault: Fault, world: World, scratch: Path) -> list[str]:
    """The disk becomes full at some point of a phase; then there is room again."""
    needed = size_of(world.undisturbed / fault.where)
    with SmallDisk(scratch / "disk", int(needed * (0.05 + 0.8 * fault.position))) as disk:
        output = disk.folder / "output"
        ended = start(world.words(fault.where, output), scratch / "full", LIMIT, largest_file=disk.largest_file).wait()
        if ended.status == 0:  # what is counted here is more than what is written at a time
            return clean(ended) + world.differences(fault.where, output)
        faults = refusal(ended, fault.where, [str(disk.folder)])
        disk.enlarge()
        return faults + continues(fault.where, world, output, scratch / "again")


def read_only(fault: Fault, world: World, scratch: Path) -> list[str]:
    """The output's file system cannot be written; then it can."""
    with SmallDisk(scratch / "disk", 64 << 20) as disk:
        if not disk.mounted:
            raise NotHere("no file system can be mounted, and nothing else stops root from writing")
        disk.protect()
        output = disk.folder / "output"
        faults = refusal(world.run(fault.where, output, scratch / "protected"), fault.where, [str(disk.folder)])
        disk.enlarge()
        return faults + continues(fault.where, world, output, scratch / "again")


def stopped(fault: Fault, world: World, scratch: Path) -> list[str]:
    """SIGSTOP of one of two ranks: the watchdog names it and ends the run, and the same command continues it."""
    reference = two_ranks(world, scratch / "straight", scratch, None)
    results = two_ranks(world, scratch / "output", scratch, fault)
    faults = [text for ended in results[:1] for text in clean(ended)]
    if results[0].status != WATCHDOG:
        faults.append(f"exit status {results[0].status}, not {WATCHDOG}: {_last_line(results[0])}")
    if "megatron-bagel train: hang: " not in results[0].errors:
        faults.append(f"the report does not begin with the command's name: {_last_line(results[0])}")
    if "rank 1" not in results[0].text:
        faults.append(f"the rank that stopped is not named: {_last_line(results[0])}")
    again = two_ranks(world, scratch / "output", scratch, None)
    statuses = [ended.status for ended in (*reference, *again)]
    compared = replace(world, undisturbed=scratch / "references")
    (scratch / "references").mkdir()
    (scratch / "straight").rename(scratch / "references/train")
    return faults + ([f"undisturbed ranks ended with {statuses}"] if any(statuses) else compared.differences("train", scratch / "output"))


def two_ranks(world: World, output: Path, scratch: Path, fault: Fault | None) -> list[Ended]:
    """A run of two ranks; with a fault, rank 1 is stopped after the first step, at its moment of the second."""
    with reserved_port() as port:
        return _two_ranks(world, output, scratch, fault, str(port))


def _two_ranks(world: World, output: Path, scratch: Path, fault: Fault | None, port: str) -> list[Ended]:
    # Only the run that will hang has little patience: on a busy machine a step may take seconds.
    patience = [] if fault is None else ["--hang_timeout_minutes", "0.15", "--first_step_timeout_minutes", "1"]
    words = [*world.words("train", output), *patience]
    commands = []
    for rank in range(2):
        variables = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        commands.append(start(words, scratch / f"rank-{rank}", LIMIT, variables))
    if fault is not None:
        metrics = output / "metrics.jsonl"
        while commands[0].alive() and not (metrics.exists() and metrics.stat().st_size):
            time.sleep(0.005)
        time.sleep(0.3 * fault.position)
        commands[1].stop()
        first = commands[0].wait()
        commands[1].kill()
        return [first]
    return [command.wait() for command in commands]


def twins(fault: Fault, world: World, scratch: Path) -> list[str]:
    """Two runs start in one folder: one is refused by a sentence that names the folder, and the other is as if alone.

    On a busy machine the second may begin so late that the first has ended. Then it finds the last step done.
    """
    output = scratch / "output"
    commands = []
    for number in range(2):
        commands.append(start(world.words("train", output), scratch / f"twin-{number}", LIMIT))
        time.sleep(fault.position * world.seconds["train"] / 2 if number == 0 else 0)
    results = sorted((command.wait() for command in commands), key=lambda ended: ended.status or 0)
    is_late = results[1].status == 0 and any(f"continuing from {output}/checkpoints/{STEPS:07d}" in ended.text for ended in results)
    faults = clean(results[0]) + (clean(results[1]) if is_late else refusal(results[1], "train", [str(output)]))
    if results[0].status != 0:
        return [*faults, f"neither run ended well: {_last_line(results[0])}"]
    return faults + world.differences("train", output)


def small_shm(fault: Fault, world: World, scratch: Path) -> list[str]:
    """A small ``/dev/shm``, as containers have it, and processes that read: the run is as if it were large.

    Where not even the semaphores of a queue find room in it, the run is refused and names it.
    """
    size = 4096 << int(10 * fault.position)
    probe = start(["--version"], scratch / "probe", LIMIT, shared_memory=size).wait()
    if probe.status != 0:
        raise NotHere(f"no file system can be mounted on /dev/shm: {_last_line(probe)}")
    output = scratch / "output"
    words = [*world.words("train", output), "--num_workers", "2"]
    ended = start(words, scratch / "small", LIMIT, shared_memory=size).wait()
    if ended.status != 0:
        return refusal(ended, "train", ["/dev/shm"])
    return clean(ended) + world.differences("train", output)


def clock(fault: Fault, world: World, scratch: Path) -> list[str]:
    """The clock of the machine jumps by an hour, forwards or backwards, while a run trains: it goes on as if it had not.

    A run that libfaketime itself locks up is started again, since it says nothing about the clock (``fake_clock.py``).
    """
    library = faketime_library()
    if library is None:
        raise NotHere("libfaketime is not installed; FAKETIME_LIBRARY names it elsewhere than in the system's folders")
    for attempt in range(ATTEMPTS):
        output = scratch / f"output-{attempt}"
        ended = _run_with_jump(fault, world, output, library)
        if ended is not None:
            faults = clean(ended)
            if ended.status != 0:
                return [*faults, f"exit status {ended.status}: {_last_line(ended)}"]
            return faults + world.differences("train", output)
    raise NotHere(f"libfaketime locked up a fork of the run {ATTEMPTS} times")


def _run_with_jump(fault: Fault, world: World, output: Path, library: str) -> Ended | None:
    """How a run ended whose clock jumped after its first step; None if a fork of it was locked up inside libfaketime."""
    wall_clock, stepped = output.with_suffix(".clock"), output.with_suffix(".stepped")
    wall_clock.write_text("+0\n")
    stepped.write_text("+3600\n" if fault.choice % 2 else "-3600\n")
    command = start(world.words("train", output), output.with_suffix(".run"), LIMIT, variables(library, wall_clock), new_interpreter=True)
    metrics = output / "metrics.jsonl"
    while command.alive() and not (metrics.exists() and metrics.stat().st_size):
        time.sleep(0.005)
    time.sleep(0.5 * fault.position)
    stepped.replace(wall_clock)  # whole: the library reads it at any moment
    return None if locked_up(command, library) else command.wait()


def _steps(output: Path) -> set[int]:
    folder = output / "checkpoints"
    names = os.listdir(folder) if folder.is_dir() else []
    return {int(name) for name in names if name.isdigit() and int(name) <= STEPS and is_complete(folder / name)}


def _last_line(ended: Ended) -> str:
    lines = ended.errors.strip().splitlines() or ended.output.strip().splitlines() or ["(nothing was printed)"]
    return lines[-1][-300:]


_JUDGES: dict[str, Callable[[Fault, World, Path], list[str]]] = {
    "kill": kill, "damage": damage, "full": full, "read-only": read_only, "stopped": stopped, "twins": twins, "small-shm": small_shm,
    "clock": clock,
}  # fmt: skip
