# SPDX-License-Identifier: Apache-2.0
"""Check every byte of an index: checksums, columns, token ids, and that each image decodes to its planned size.

    %(prog)s INDEX --workers 8
    %(prog)s LATENTS
    %(prog)s INDEX --fix CLEAN_INDEX
    %(prog)s rows.jsonl --images images --form thinkmorph

Of a file of interleaved rows (.jsonl, .parquet, .tar) it checks every row against the schema of items. Of a latent cache it checks sizes,
checksums, and that every stored number is finite. Every problem is a line with shard, source file and row, or image. The exit status is 1
if there is one, and 0 where --fix has written a copy without them.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from megatron_bagel.cli.usage import command_parser, report_error
from megatron_bagel.common.json_text import MAX_JSON_DEPTH
from megatron_bagel.common.paths import location_flag, path_flag
from megatron_bagel.common.text_limits import MAX_TEXT_BYTES
from megatron_bagel.common.writable import check_writable, writing_to
from megatron_bagel.data.index.clean_copy import write_clean_copy
from megatron_bagel.data.index.format import Manifest, read_manifest
from megatron_bagel.data.index.latent_cache import CACHE_MANIFEST, read_cache_manifest
from megatron_bagel.data.index.verify import shard_problems
from megatron_bagel.data.index.verify_latents import cached_shard_problems
from megatron_bagel.data.sources.check_rows import ENDINGS, row_problems
from megatron_bagel.data.sources.forms import FORMS
from megatron_bagel.data.sources.row_rules import RowRules
from megatron_bagel.platform.launch.child_processes import end_with_parent, starting

T = TypeVar("T")
Work = tuple[Path, int, int, bool]  # index, number of the dataset, number of the shard, whether to decode images


def parse_arguments(argv: Sequence[str] | None, prog: str) -> argparse.Namespace:
    """Return the command line's values."""
    parser = command_parser(__doc__, prog)
    parser.add_argument("index", type=path_flag, help="folder of an index or of a latent cache, or a file of interleaved rows")
    parser.add_argument("--workers", type=int, default=0, help="number of processes; 0 checks in this one (default)")
    parser.add_argument("--no-decode", action="store_true", help="do not decode images (several times faster)")
    parser.add_argument("--fix", type=path_flag, metavar="DIR", help="write a copy of the index without the samples that have a problem")
    parser.add_argument(
        "--images", type=location_flag, metavar="DIR", help="folder of the pictures that rows name (default: that of the file)"
    )
    limits: dict[str, Any] = {"type": int, "metavar": "N", "help": "limit of rows, as of data build (default %(default)s)"}
    parser.add_argument("--max_text_bytes", "--max-text-bytes", default=MAX_TEXT_BYTES, **limits)
    parser.add_argument("--max_json_depth", "--max-json-depth", default=MAX_JSON_DEPTH, **limits)
    parser.add_argument(
        "--allow_outside_root",
        "--allow-outside-root",
        action="store_true",
        help="rows may name pictures outside --images",
    )
    parser.add_argument("--form", choices=FORMS, default="items", help="form of the rows, the format of the dataset YAML (default items)")
    return parser.parse_args(argv)


def check(work: Work) -> list[str]:
    """Return the problems of one shard."""
    index, dataset, shard, decode = work
    info = _manifest(index).datasets[dataset]
    return list(shard_problems(index, _manifest(index), info, info.shards[shard], decode))


@lru_cache(maxsize=1)
def _manifest(index: Path) -> Manifest:
    return read_manifest(index)


def results(check_one: Callable[[T], list[str]], work: Sequence[T], workers: int) -> Iterator[list[str]]:
    """Yield the problems of every shard, in order. Raises ValueError if its processes cannot be started, or one of them is killed."""
    if workers < 2:
        yield from map(check_one, work)
        return
    with starting(f"{workers} processes that verify", "--workers 0 verifies in this one"):
        workers_pool = ProcessPoolExecutor(workers, get_context("fork"), end_with_parent, (os.getpid(),))
    try:
        with workers_pool as pool:
            yield from pool.map(check_one, work)
    except BrokenProcessPool as error:
        raise ValueError("a process that verifies was killed, perhaps because memory ran out; use fewer --workers") from error


def check_latents(work: tuple[Path, str]) -> list[str]:
    """Return the problems of one shard of a latent cache."""
    folder, label = work
    return list(cached_shard_problems(folder, _cache_manifest(folder), label))


@lru_cache(maxsize=1)
def _cache_manifest(folder: Path) -> dict[str, Any]:
    return read_cache_manifest(folder)


def verify_latents(folder: Path, workers: int) -> int:
    """Print the problems of a latent cache. Returns the exit status; raises ValueError if its manifest is damaged."""
    labels = list(read_cache_manifest(folder)["files"])
    count = 0
    problems_by_shard = results(check_latents, [(folder, label) for label in labels], workers)
    for problems in tqdm(problems_by_shard, total=len(labels), unit="shard", disable=None):
        count += len(problems)
        for problem in problems:
            print(problem)
    print(f"{folder}: latents of {len(labels)} shard(s), " + (f"{count} problem(s)" if count else "all as they should be"))
    return 1 if count else 0


def verify_rows(args: argparse.Namespace) -> int:
    """Print the problems of a file of interleaved rows. Returns the exit status; raises ValueError if the file cannot be read."""
    path, rules = args.index, RowRules(args.max_text_bytes, args.max_json_depth, args.allow_outside_root)
    problems = list(row_problems(str(path), args.form, args.images or str(path.parent), not args.no_decode, rules))
    told = [problem for problem in problems if problem is not None]
    for problem in told:
        print(problem)
    print(f"{path}: {len(problems)} row(s), " + (f"{len(told)} problem(s)" if told else "all as they should be"))
    return 1 if told else 0


def write_fixed(index: Path, manifest: Manifest, output: Path, decode: bool) -> int:
    """Write a copy of an index without its broken samples. Returns the exit status; raises ValueError if that cannot be done."""
    check_writable(output.parent, "--fix: the folder")
    samples = sum(dataset.samples for dataset in manifest.datasets)
    progress = tqdm(total=samples, unit="sample", disable=not sys.stderr.isatty())
    with writing_to(output.parent, "--fix: the folder"), progress as progress_bar:
        left_out = write_clean_copy(index, manifest, output, decode, progress_bar.update)
    print(f"{output}: a copy of {index} without {left_out} sample(s)")
    return 0


def verify_index(args: argparse.Namespace, manifest: Manifest) -> int:
    """Print the problems of an index. Returns the exit status; raises ValueError if its processes cannot work."""
    shards = [(i, j, shard) for i, dataset in enumerate(manifest.datasets) for j, shard in enumerate(dataset.shards)]
    problems_by_shard = results(check, [(args.index, i, j, not args.no_decode) for i, j, _ in shards], args.workers)
    count = 0
    with tqdm(total=sum(dataset.samples for dataset in manifest.datasets), unit="sample", disable=not sys.stderr.isatty()) as progress_bar:
        for (_, _, shard), problems in zip(shards, problems_by_shard, strict=True):
            count += len(problems)
            progress_bar.update(shard.samples)
            for problem in problems:
                print(problem)
    result = f"{count} problem(s)" if count else "all as they should be"
    print(f"{args.index}: {sum(dataset.samples for dataset in manifest.datasets)} samples in {len(shards)} shard(s), {result}")
    return 1 if count else 0


def main(argv: Sequence[str] | None = None, prog: str = "megatron-bagel data verify") -> int:
    """Print the problems of an index or a latent cache. Returns the exit status."""
    args = parse_arguments(argv, prog)
    try:
        if args.index.suffix in ENDINGS:
            return verify_rows(args)
        if (args.index / CACHE_MANIFEST).is_file():
            return verify_latents(args.index, args.workers)
        manifest = read_manifest(args.index)
        if args.fix is not None:
            return write_fixed(args.index, manifest, args.fix, not args.no_decode)
        return verify_index(args, manifest)
    except (ValueError, OSError) as error:
        report_error(prog, error)
        return 2
