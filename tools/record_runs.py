# SPDX-License-Identifier: Apache-2.0
"""Records what a checkout computes: 20 steps of eight small runs on the CPU, with their metrics, checkpoints and exported model folders.

    python tools/record_runs.py before --repo OLD_CHECKOUT
    python tools/record_runs.py after
    python tools/compare_runs.py before after --bitwise

    python tools/record_runs.py continued --continue-from before     # the same runs from step 10 on, from the files of "before"
    python tools/compare_runs.py before continued --bitwise

The checkout is used through its documented commands only, in processes of their own, so any two commits can be recorded by one
script. Seeds are fixed and every process has one thread: two recordings of one commit on one machine are equal to the last bit.

OUT holds ``recording.json`` (what was run), ``world/`` (data, index, latents, autoencoder) and a folder for each case with
``metrics.jsonl``, ``checkpoints/0000010``, ``checkpoints/0000020``, ``export/`` (model folder, fp32, averages and weights) and
``commands.log``. The same command with other ``--cases`` adds them to a recording of the same commit.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))  # started as a script, only this file's own folder is on the path

from tools.record_cases import CASES, KEPT_STEP, STEPS, Case, training_arguments  # noqa: E402
from tools.record_checkout import Checkout, CommandFailed, make_world  # noqa: E402

RECORDING = "recording.json"


def record_case(checkout: Checkout, case: Case, world: Path, folder: Path) -> None:
    """Train, and export the last checkpoint. Where ``folder`` holds a checkpoint already, the run continues from it.

    Raises:
        CommandFailed: A command failed, or a run began at step 0 in place of continuing. Its numbers would be the same.
    """
    folder.mkdir(parents=True, exist_ok=True)
    log, kept = folder / "commands.log", kept_checkpoint(folder)
    for stop in [stop for stop in case.stops if not (kept.is_dir() and stop == KEPT_STEP)]:
        written = kept.stat().st_ctime_ns if kept.is_dir() else None
        checkout.train(case.processes, training_arguments(case, world, folder, stop), log)
        if written is not None and kept.stat().st_ctime_ns != written:
            raise CommandFailed(f"the run in {folder} did not continue from {kept} but wrote it again; its output is in {log}")
    checkpoint, output = folder / "checkpoints" / f"{STEPS:07d}", folder / "export"
    weights = ["--dtype", "fp32", "--weights", "both"]
    checkout.run(["tools/checkpoint_convert/megatron_to_hf.py", "--checkpoint", checkpoint, "--output", output, *weights], log)


def kept_checkpoint(folder: Path) -> Path:
    """Return the checkpoint in a case's folder from which another commit can continue."""
    return folder / "checkpoints" / f"{KEPT_STEP:07d}"


def take_over(source: Path, folder: Path) -> None:
    """Copy what a run of another recording had left after ``KEPT_STEP`` steps: that checkpoint, and the metrics as they were written."""
    shutil.copytree(kept_checkpoint(source), kept_checkpoint(folder))
    # Steps after the checkpoint are removed from it by the run that resumes.
    shutil.copy(source / "metrics.jsonl", folder / "metrics.jsonl")


def parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    p = argparse.ArgumentParser(prog="record_runs.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("out", type=Path, metavar="OUT", help="folder to make, or a recording to add cases to")
    p.add_argument("--repo", type=Path, default=ROOT, help="checkout to record (default: this one)")
    p.add_argument("--python", default=sys.executable, help="interpreter with the project's dependencies (default: %(default)s)")
    p.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES), metavar="CASE", help=f"of {', '.join(CASES)}")
    p.add_argument(
        "--continue-from", type=Path, metavar="RECORDING",
        help=f"use the data, the index and the checkpoints of step {KEPT_STEP} of another recording, instead of making them",
    )  # fmt: skip
    return p


def check_arguments(arguments: argparse.Namespace) -> None:
    """Raises ValueError for folders that cannot be used."""
    repo, source = arguments.repo, arguments.continue_from
    if not (repo / "megatron_bagel/train.py").is_file():
        raise ValueError(f"--repo {repo} is not a checkout of this project: it has no megatron_bagel/train.py")
    if source is not None:
        read_record(source)
        for name in arguments.cases:
            if not kept_checkpoint(source / name).is_dir():
                raise ValueError(f"--continue-from {source} has no checkpoint {kept_checkpoint(source / name)}; record {name} there first")


def read_record(recording: Path) -> dict[str, Any]:
    """Return the record of a complete recording. Raises ValueError for another folder."""
    path = recording / RECORDING
    if not path.is_file():
        raise ValueError(f"{recording} is not a complete recording: it has no {RECORDING}; name another folder")
    return json.loads(path.read_text(encoding="utf-8"))


def begin_record(arguments: argparse.Namespace, checkout: Checkout) -> dict[str, Any]:
    """Return the record of the recording to add to, or a new one. Raises ValueError where OUT is neither such a recording nor empty."""
    out, source = arguments.out, arguments.continue_from
    commit, continued_from = checkout.commit(), str(source.resolve()) if source is not None else None
    if not out.exists() or not any(out.iterdir()):
        return {"commit": commit, "continued_from": continued_from, "world": None, "seconds": {}}
    record = read_record(out)
    if (record["commit"], record["continued_from"]) != (commit, continued_from):
        raise ValueError(f"{out} is a recording of {record['commit']} and cannot be added to by {commit}; name another folder")
    if recorded := [name for name in arguments.cases if (out / name).exists()]:
        raise ValueError(f"{out} holds {', '.join(recorded)} already; name other --cases or another folder")
    return record


def record_runs(arguments: argparse.Namespace) -> None:
    """Record all cases. ``recording.json`` is written last, so a new folder without it is not complete."""
    out, checkout = arguments.out.resolve(), Checkout(arguments.repo.resolve(), arguments.python)
    record = begin_record(arguments, checkout)
    package = checkout.package_folder()
    if package != checkout.path / "megatron_bagel":
        raise ValueError(f"--python {arguments.python} imports megatron_bagel from {package}, not from --repo {checkout.path}")
    source, seconds = arguments.continue_from, record["seconds"]
    if record["world"] is not None:
        world = out / record["world"]
    elif source is not None:
        # A recording that continued another one has no world of its own.
        world = (source / read_record(source)["world"]).resolve()
    else:
        world = out / "world"
        seconds["world"] = timed("world", lambda: make_world(checkout, world))
    for name in arguments.cases:
        if source is not None:
            take_over(source / name, out / name)
        seconds[name] = timed(name, partial(record_case, checkout, CASES[name], world, out / name))
    # Relative, so that recordings which refer to each other can be moved together.
    record["world"] = os.path.relpath(world, out)
    (out / RECORDING).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def timed(name: str, work: Callable[[], None]) -> float:
    """Do ``work``, and print and return the seconds it took."""
    began = time.monotonic()
    work()
    seconds = round(time.monotonic() - began, 1)
    print(f"{name}: {seconds} s", flush=True)
    return seconds


def main(argv: Sequence[str] | None = None) -> int:
    """Record. Exit status: 0 done, 1 a command of the checkout failed, 2 arguments that cannot be used."""
    arguments = parser().parse_args(argv)
    try:
        check_arguments(arguments)
        record_runs(arguments)
    except ValueError as error:
        print(f"record_runs: {error}", file=sys.stderr)
        return 2
    except CommandFailed as error:
        print(f"record_runs: {error}", file=sys.stderr)
        return 1
    print(f"{arguments.out}: complete")
    return 0


if __name__ == "__main__":
    sys.exit(main())
