"""Turn BAGEL's data folders into the memory-mapped index that training reads.

    %(prog)s --dataset_config_file data.yaml --data-root bagel_example --tokenizer hf/BAGEL-7B-MoT --output index

Rows that cannot be used are kept out, counted on the console, and listed with file, row and reason in OUTPUT/skipped.jsonl.
The same command continues a build that broke off. Sources may be URLs (s3://, gs://, hdfs://, or any scheme of fsspec).

Many machines build one index with --num-jobs N --job-index 0 ... N-1 (the same other flags, a shared file system) and then merge
what they made (megatron-bagel data merge, or data_tools/merge_index.py); examples/build_index.sbatch does it under Slurm.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_bagel.cli.usage import command_parser, report_error
from megatron_bagel.common.writable import check_writable
from megatron_bagel.data.index.format import SKIPPED
from megatron_bagel.data.index.plan import IMAGE_CHECKS, ROWS_PER_SHARD, ImageChecks
from megatron_bagel.data.index.publish import build_folder
from megatron_bagel.data.sources.dataset_config import load_groups
from megatron_bagel.data.transforms import PIXEL_LIMIT


def parse_arguments(argv: Sequence[str] | None, prog: str) -> argparse.Namespace:
    """Read the command line; every flag is accepted with dashes and with underscores."""
    parser = command_parser(__doc__, prog)

    def flag(name: str, **settings: Any) -> None:
        parser.add_argument(f"--{name}", f"--{name.replace('_', '-')}", **settings)

    flag("dataset_config_file", required=True, type=Path, metavar="YAML", help="the dataset YAML that training reads too")
    flag("data_root", metavar="DIR", help="folder or URL in the guide's layout (t2i/, editing/, vlm/, text/); not needed where the "
         "YAML's dataset_info says where each dataset lies")  # fmt: skip
    parser.add_argument("--tokenizer", "--tokenizer_path", "--tokenizer-path", required=True, type=Path, metavar="PATH",
                        help="Hugging Face folder or SentencePiece .model; training must use the same")  # fmt: skip
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="where the index appears, once it is complete")
    parser.add_argument("--workers", type=int, default=0, help="processes; 0 builds in this one (default)")
    flag("rows_per_shard", type=int, default=ROWS_PER_SHARD, help=f"samples per set of files, about (default {ROWS_PER_SHARD})")
    flag("check_images", choices=IMAGE_CHECKS, default="structure", help="keep out images that are cut off or whose checksums are wrong "
         "(structure, default), all that do not decode (decode, three times slower), or only what is no image (header)")  # fmt: skip
    flag("max_image_pixels", type=int, default=PIXEL_LIMIT, help=f"larger images are kept out as bombs (default {PIXEL_LIMIT})")
    flag("num_jobs", type=int, default=1, help="jobs that build this index together, each its share of the shards (default 1)")
    flag("job_index", type=int, default=0, help="which of them this is, from 0")
    parser.add_argument("--overwrite", action="store_true", help="replace an index of other sources at --output")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None, prog: str = "megatron-bagel data build") -> int:
    """Build the index, or one job's part of it. Returns the exit status."""
    args = parse_arguments(argv, prog)
    start = time.monotonic()
    # Imported late: its packages take seconds, and --help needs none of them.
    from megatron_bagel.data.index.build import BuildOptions, build_index

    try:
        check_writable(args.output.parent, "--output: the folder")
        groups = load_groups(args.dataset_config_file, args.data_root)
        checks = ImageChecks(args.check_images, args.max_image_pixels)
        options = BuildOptions(args.workers, args.rows_per_shard, checks, args.overwrite, num_jobs=args.num_jobs, job_index=args.job_index)
        manifest = build_index(groups, args.tokenizer, args.output, options)
    except ValueError as error:
        report_error(prog, error)
        return 2
    if manifest is None:
        part = build_folder(args.output, args.job_index, args.num_jobs)
        print(f"job {args.job_index} of {args.num_jobs} is done: {part} ({time.monotonic() - start:.1f} s)")
        print(f"when all are: {merge_command(prog)} --output {args.output}")
        return 0
    print(manifest.summary())
    if any(dataset.skipped for dataset in manifest.datasets):
        print(f"every skipped row, with its reason: {args.output / SKIPPED}")
    print(f"index at {args.output} ({time.monotonic() - start:.1f} s)")
    return 0


def merge_command(prog: str) -> str:
    """Return the command that merges the parts, written as this one was."""
    return "python data_tools/merge_index.py" if prog.endswith(".py") else f"{prog.removesuffix('build')}merge"
