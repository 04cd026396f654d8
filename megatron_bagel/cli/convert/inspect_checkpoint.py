# SPDX-License-Identifier: Apache-2.0
"""Show step, model, parallel sizes, config, data position and tensors of a training checkpoint; compare two; verify checksums.

    %(prog)s show CHECKPOINT            one page about it; --tensors lists every tensor
    %(prog)s compare CHECKPOINT OTHER   tensor by tensor; status 1 when they differ
    %(prog)s verify CHECKPOINT          reads every file; status 1 when one is damaged

CHECKPOINT is a step folder, or the folder above it, which means its newest complete step. The command needs no GPU and holds one tensor
at a time.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

from megatron_bagel.cli.convert import command_line as command
from megatron_bagel.cli.usage import command_parser, report_error
from megatron_bagel.common.paths import path_flag


def parser(prog: str) -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    arguments = command_parser(__doc__, prog)
    modes = arguments.add_subparsers(dest="mode", required=True)
    show = modes.add_parser("show", help="show what it holds")
    show.add_argument("--tensors", action="store_true", help="list every tensor with shape and type")
    show.add_argument("--json", action="store_true", help="print JSON")
    compare = modes.add_parser("compare", help="compare two checkpoints, tensor by tensor")
    compare.add_argument(
        "--only", default="", metavar="PREFIX", help="only tensors whose key begins with PREFIX, such as 'ema.' or 'decoder.'"
    )
    verify = modes.add_parser("verify", help="compare all files with their checksums")
    for mode in (show, compare, verify):
        mode.add_argument("checkpoint", type=path_flag, help="a step folder, or the folder above it")
    compare.add_argument("other", type=path_flag, help="another checkpoint")
    return arguments


def main(argv: Sequence[str] | None = None, prog: str = "megatron-bagel convert inspect") -> int:
    """Show, compare or verify. Returns the exit status."""
    args = parser(prog).parse_args(argv)

    def work() -> int:
        from megatron_bagel.checkpoint.dist import inspect
        from megatron_bagel.checkpoint.dist.checksums import CHECKSUM_FILE

        # A step without one of its files is not found as a step, and is what verify is asked about.
        is_step = args.mode == "verify" and (args.checkpoint / CHECKSUM_FILE).is_file()
        folder = args.checkpoint if is_step else command.step_folder(args.checkpoint)
        if args.mode == "show":
            summary = inspect.summary(folder, tensors=args.tensors or args.json)
            print(json.dumps(summary, indent=1) if args.json else inspect.page(summary))
            return 0
        if args.mode == "verify":
            if problems := inspect.damage(folder):
                report_error(prog, ValueError(f"{folder} is damaged: {'; '.join(problems)}"))
            return 1 if problems else 0
        differences = inspect.compare(folder, command.step_folder(args.other), args.only)
        for difference in differences:
            print(difference)
        if differences:
            report_error(prog, ValueError(f"{len(differences)} tensors differ"))
            return 1
        print("all tensors are equal")
        return 0

    return command.run(prog, work)
