"""What is in a training checkpoint: step, model, layout, config, data position, tensors. Also compares two, and checks one's checksums.

    inspect_checkpoint.py show CHECKPOINT            one page about it; --tensors lists every tensor
    inspect_checkpoint.py compare CHECKPOINT OTHER   tensor by tensor; status 1 when they differ
    inspect_checkpoint.py verify CHECKPOINT          reads every file; status 1 when one is damaged

CHECKPOINT is a step folder, or the folder above it: then its newest complete step. No GPU, one tensor in memory.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_bagel.checkpoint import command_line as command


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(prog="inspect_checkpoint.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    modes = p.add_subparsers(dest="mode", required=True)
    show = modes.add_parser("show", help="what is in it")
    show.add_argument("--tensors", action="store_true", help="list every tensor with shape and type")
    show.add_argument("--json", action="store_true", help="as JSON")
    compare = modes.add_parser("compare", help="two checkpoints, tensor by tensor")
    compare.add_argument("--only", default="", metavar="PREFIX", help="only tensors whose key begins so, such as 'ema.' or 'decoder.'")
    verify = modes.add_parser("verify", help="compare all files with their checksums")
    for mode in (show, compare, verify):
        mode.add_argument("checkpoint", type=Path, help="a step folder, or the folder above it")
    compare.add_argument("other", type=Path, help="another one")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Inspect; returns the process's exit status."""
    args = parser().parse_args(argv)

    def work() -> None:
        from megatron_bagel.checkpoint.dist import inspect

        if args.mode == "show":
            summary = inspect.summary(command.step_folder(args.checkpoint), tensors=args.tensors or args.json)
            print(json.dumps(summary, indent=1) if args.json else inspect.page(summary))
            return
        if args.mode == "verify":
            inspect.verify(command.step_folder(args.checkpoint))
            return
        differences = inspect.compare(command.step_folder(args.checkpoint), command.step_folder(args.other), args.only)
        for difference in differences:
            print(difference)
        if differences:
            raise ValueError(f"{len(differences)} tensors differ")
        print("all tensors are equal")

    return command.run("inspect_checkpoint", work)


if __name__ == "__main__":
    sys.exit(main())
