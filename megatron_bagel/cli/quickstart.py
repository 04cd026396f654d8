# SPDX-License-Identifier: Apache-2.0
"""From nothing to a small trained BAGEL on this machine: sample data, two lessons, pictures, answers, marks, and one page that shows them.

    %(prog)s [OUT] [flags of megatron-bagel train, such as --total_steps 5000]

A second run reuses every stage that is complete, and training goes on from its last checkpoint; remove a folder inside OUT to do its
stage again. Flags of training are for the second lesson, pictures and edits.
"""

from __future__ import annotations

import argparse
import os
import platform as machine
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from megatron_bagel.cli.usage import command_parser, report_error
from megatron_bagel.common.paths import path_flag
from megatron_bagel.common.writable import check_writable, writing_to
from megatron_bagel.sample_world.quickstart.commands import CommandFailedError
from megatron_bagel.sample_world.quickstart.folders import QuickstartFolders
from megatron_bagel.sample_world.quickstart.report import mark_lines, read_marks, world_line, write_report
from megatron_bagel.sample_world.quickstart.stages import DRAWING, Quickstart, QuickstartSettings
from megatron_bagel.sample_world.world import read_world


def build_parser(prog: str) -> argparse.ArgumentParser:
    """Return the parser of the command's own flags; others are flags of training."""
    parser = command_parser(__doc__, prog)
    parser.add_argument(
        "out", nargs="?", type=path_flag, default=Path("quickstart_output"), metavar="OUT", help="folder (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of data and weights (default: %(default)s)")
    parser.add_argument("--processes", type=int, metavar="N", help="that train (default: one for each GPU, at most 2; 2 without a GPU)")
    parser.add_argument("--question_steps", type=int, metavar="N", help="of the first lesson (default: its settings')")
    return parser


def main(arguments: Sequence[str] | None = None, prog: str = "megatron-bagel quickstart") -> int:
    """Run the stages. Returns the exit status: 0, 1 if a stage failed, 2 for bad input, 130 if it was interrupted."""
    # The output folder comes first: after a flag of training, a word would be that flag's value.
    chosen, flags = build_parser(prog).parse_known_args(sys.argv[1:] if arguments is None else arguments)
    folders = QuickstartFolders(chosen.out.absolute())
    settings = QuickstartSettings(chosen.seed, chosen.processes or default_processes(), chosen.question_steps, tuple(flags))
    run = Quickstart(folders, settings, say=_say)
    began = time.monotonic()
    try:
        check_writable(chosen.out, "OUT")
        with writing_to(chosen.out, "OUT"):
            run.run()
        rows = read_marks(folders)
    except (CommandFailedError, ValueError, OSError) as error:
        report_error(prog, error)
        return 1 if isinstance(error, CommandFailedError) else 2
    except KeyboardInterrupt:
        print(f"interrupted; the same command goes on where it was: {prog} {chosen.out}", file=sys.stderr)
        return 130
    minutes = (time.monotonic() - began) / 60
    cores = f"{os.cpu_count()} processor cores ({machine.machine()})"
    facts = [
        world_line(read_world(folders.data / "world.json")),
        f"{minutes:.1f} minutes on {cores}, {run.settings.processes} process(es), seed {chosen.seed}.",
        "Stages: " + "; ".join(f"{title} {seconds:.0f} s" for title, seconds in run.seconds.items()) + "." if run.seconds else "",
    ]
    write_report(folders, facts, rows, next_steps(folders))
    print("\n".join(["", facts[0], "", *mark_lines(rows), "", f"done in {minutes:.1f} minutes"]))
    print(f"report                 {folders.report}: open it in a browser")
    print(f"pictures and answers   {folders.generated}, all pictures at once: {folders.generated / 'grid.png'}")
    print(f"loss curves            {folders.results / 'loss.png'}, numbers in {folders.results / 'metrics.jsonl'}")
    print(f"model                  {folders.model} (released layout), {folders.checkpoints} (to go on)")
    return 0


def default_processes() -> int:
    """Return one process for each GPU, at most two; two where there is none."""
    import torch

    return min(2, torch.cuda.device_count() or 2)


def next_steps(folders: QuickstartFolders) -> list[tuple[str, str]]:
    """Return what to try next: a sentence and a command each."""
    draw = " ".join(DRAWING)
    prompt = '--prompt "a red circle in the top left on a white background" --out my_pictures'
    return [
        ("Ask for a picture of your own.", f"megatron-bagel generate --model {folders.model} {draw} {prompt}"),
        ("Train longer: the run continues.", f"megatron-bagel quickstart {folders.out} --total_steps 6000"),
        ("Talk to it in a browser (extra `serve`).", f"megatron-bagel generate --model {folders.model} {draw} --serve"),
        ("Look at a sample that it learnt from.", f"megatron-bagel data inspect {folders.index} --dataset t2i_pretrain/t2i --sample 17"),
    ]


def _say(line: str) -> None:
    print(line, flush=True)
