# SPDX-License-Identifier: Apache-2.0
"""Turn BAGEL's data folders into the memory-mapped index that training reads.

    %(prog)s --dataset_config_file data.yaml --data-root bagel_example --tokenizer hf/BAGEL-7B-MoT --output index

Rows that cannot be used are left out, counted on the console, and listed with file, row and reason in OUTPUT/skipped.jsonl.
The same command continues an interrupted build. Sources may be URLs (s3://, gs://, hdfs://, or any scheme of fsspec).

Many machines build one index with --num-jobs N --job-index 0 ... N-1, with equal other flags and a shared file system. Then
megatron-bagel data merge (or data_tools/merge_index.py) merges the parts. examples/build_index.sbatch does both under Slurm, with
--engine slurm-array. Or --engine ray spreads the shards over a Ray cluster with a shared file system (--ray_address).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import Any

from megatron_bagel.cli.data.engine import add_engine_flags, chosen_engine
from megatron_bagel.cli.hub_models import needs, with_local_folders
from megatron_bagel.cli.usage import command_parser, report_error
from megatron_bagel.common.json_text import MAX_JSON_DEPTH
from megatron_bagel.common.paths import location_flag, path_flag
from megatron_bagel.common.text_limits import MAX_TEXT_BYTES
from megatron_bagel.common.writable import check_writable, writing_to
from megatron_bagel.data.index.format import SKIPPED
from megatron_bagel.data.index.plan import IMAGE_CHECKS, ROWS_PER_SHARD, ImageChecks
from megatron_bagel.data.index.publish import build_folder
from megatron_bagel.data.sources.dataset_config import load_groups
from megatron_bagel.data.sources.row_rules import RowRules
from megatron_bagel.data.transforms import EXIF_MODES, PIXEL_LIMIT


def parse_arguments(argv: Sequence[str] | None, prog: str) -> argparse.Namespace:
    """Return the command line's values. Every flag is accepted with dashes and with underscores."""
    parser = command_parser(__doc__, prog)

    def flag(name: str, **settings: Any) -> None:
        parser.add_argument(f"--{name}", f"--{name.replace('_', '-')}", **settings)

    flag("dataset_config_file", required=True, type=path_flag, metavar="YAML", help="the dataset YAML that training reads too")
    flag("data_root", type=location_flag, metavar="DIR", help="folder or URL with the guide's folders (t2i/, editing/, vlm/, text/); "
         "not needed if the YAML's dataset_info says where each dataset is")  # fmt: skip
    parser.add_argument("--tokenizer", "--tokenizer_path", "--tokenizer-path", required=True, type=path_flag, metavar="PATH",
                        help="Hugging Face folder or SentencePiece .model file; training must use the same one")  # fmt: skip
    parser.add_argument(
        "--output", required=True, type=path_flag, metavar="DIR", help="folder of the index, which appears when it is complete"
    )
    parser.add_argument("--workers", type=int, default=0, help="number of processes; 0 builds in this one (default)")
    flag("rows_per_shard", type=int, default=ROWS_PER_SHARD, help="approximate number of samples per set of files (default %(default)s)")
    flag("check_images", choices=IMAGE_CHECKS, default="structure", help="leave out truncated images and wrong checksums (structure, "
         "default), all that do not decode (decode, three times slower), or only files that are no images (header)")  # fmt: skip
    flag("max_image_pixels", type=int, default=PIXEL_LIMIT, help=f"leave out larger images as decompression bombs (default {PIXEL_LIMIT})")
    flag("exif", choices=EXIF_MODES, default=EXIF_MODES[0], help="turn (default): turn pictures as their EXIF orientation says, as viewers "
         "do; ignore: leave them as they are stored, as the original does. The index records it for training")  # fmt: skip
    flag("max_text_bytes", type=int, default=MAX_TEXT_BYTES, help="leave out lines of JSON, and texts of parquet rows, with more bytes "
         f"(default {MAX_TEXT_BYTES})")  # fmt: skip
    flag("max_json_depth", type=int, default=MAX_JSON_DEPTH, help=f"leave out JSON that is nested deeper (default {MAX_JSON_DEPTH})")
    flag("allow_outside_root", action="store_true", help="read images and videos whose names leave the folder of the dataset's images: "
         "names with .., absolute paths, URLs. Give it only for data that you trust")  # fmt: skip
    flag("store_videos", action="store_true", help="put videos into the index as they are: training then chooses other frames in every "
         "epoch, as the original does, and decodes them (needs PyAV). Without it, frames become images once")  # fmt: skip
    add_engine_flags(parser)
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
        engine = chosen_engine(args)
        options = BuildOptions(
            args.workers, args.rows_per_shard, ImageChecks(args.check_images, args.max_image_pixels, args.exif),
            RowRules(args.max_text_bytes, args.max_json_depth, args.allow_outside_root, args.store_videos), args.overwrite,
            num_jobs=engine.num_jobs, job_index=engine.job_index, cluster=engine.cluster,
        )  # fmt: skip
        args, _ = with_local_folders(args, {"tokenizer": needs("--tokenizer")})
        with writing_to(args.output.parent, "--output: the folder"):
            manifest = build_index(groups, args.tokenizer, args.output, options)
    except ValueError as error:
        report_error(prog, error)
        return 2
    if manifest is None:
        part = build_folder(args.output, engine.job_index, engine.num_jobs)
        print(f"job {engine.job_index} of {engine.num_jobs} is done: {part} ({time.monotonic() - start:.1f} s)")
        print(f"when all are: {merge_command(prog)} --output {args.output}")
        return 0
    print(manifest.summary())
    if any(dataset.skipped for dataset in manifest.datasets):
        print(f"every skipped row, with its reason: {args.output / SKIPPED}")
    if manifest.exif != args.exif:
        print(f"{args.output} was built by an earlier version, with --exif {manifest.exif}; --overwrite builds it with --exif {args.exif}")
    print(f"index at {args.output} ({time.monotonic() - start:.1f} s)")
    return 0


def merge_command(prog: str) -> str:
    """Return the command that merges the parts, in the form that this command was started in."""
    return "python data_tools/merge_index.py" if prog.endswith(".py") else f"{prog.removesuffix('build')}merge"
