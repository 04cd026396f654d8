# SPDX-License-Identifier: Apache-2.0
"""Merge the parts of an index that several jobs built (--num-jobs N). One job would build the same index, byte for byte.

%(prog)s --output index
%(prog)s --output index /disk1/index.job-00000-of-00002 /disk2/index.job-00001-of-00002
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from megatron_bagel.cli.usage import command_parser, report_error
from megatron_bagel.common.paths import path_flag
from megatron_bagel.common.writable import check_writable, writing_to
from megatron_bagel.data.index.publish import merge_jobs


def parse_arguments(argv: Sequence[str] | None, prog: str) -> argparse.Namespace:
    """Return the command line's values."""
    parser = command_parser(__doc__, prog)
    parser.add_argument("--output", required=True, type=path_flag, metavar="DIR", help="folder of the index, as given to the jobs")
    parser.add_argument("parts", nargs="*", type=path_flag, metavar="PART", help="folders of the jobs (default: OUTPUT.job-*-of-*)")
    parser.add_argument("--overwrite", action="store_true", help="replace another index at --output")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None, prog: str = "megatron-bagel data merge") -> int:
    """Merge the parts. Returns the exit status."""
    args = parse_arguments(argv, prog)
    parts = args.parts or sorted(path for path in args.output.parent.glob(f"{args.output.name}.job-*-of-*") if path.is_dir())
    try:
        check_writable(args.output.parent, "--output: the folder")
        with writing_to(args.output.parent, "--output: the folder"):
            manifest = merge_jobs(args.output, parts, args.overwrite)
    except (ValueError, OSError) as error:
        report_error(prog, error)
        return 2
    print(manifest.summary())
    print(f"index at {args.output}, of {len(parts)} job(s)")
    return 0
