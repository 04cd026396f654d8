"""Checks every byte of an index: checksums, columns, token ids, and that each image decodes to its planned size.

    python data_tools/verify_index.py INDEX --workers 8

Every problem is a line with shard, source file and row; the exit status is 1 when there is one.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path

from tqdm import tqdm

from megatron_bagel.data.index.format import Manifest, read_manifest
from megatron_bagel.data.index.verify import shard_problems

Work = tuple[Path, int, int, bool]  # index, number of the dataset, number of the shard, whether to decode images


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("index", type=Path, help="folder made by build_index.py")
    parser.add_argument("--workers", type=int, default=0, help="processes; 0 checks in this one (default)")
    parser.add_argument("--no-decode", action="store_true", help="leave the images' pixels out (several times faster)")
    return parser.parse_args(argv)


def check(work: Work) -> list[str]:
    """The problems of one shard."""
    index, dataset, shard, decode = work
    info = _manifest(index).datasets[dataset]
    return list(shard_problems(index, _manifest(index), info, info.shards[shard], decode))


@lru_cache(maxsize=1)
def _manifest(index: Path) -> Manifest:
    return read_manifest(index)


def results(work: Sequence[Work], workers: int) -> Iterator[list[str]]:
    """Problems of every shard, in order."""
    if workers < 2:
        yield from map(check, work)
        return
    with ProcessPoolExecutor(workers, get_context("fork")) as pool:
        yield from pool.map(check, work)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    try:
        manifest = read_manifest(args.index)
    except ValueError as error:
        print(f"verify_index: {error}", file=sys.stderr)
        return 2
    shards = [(i, j, shard) for i, dataset in enumerate(manifest.datasets) for j, shard in enumerate(dataset.shards)]
    found_in = results([(args.index, i, j, not args.no_decode) for i, j, _ in shards], args.workers)
    problems = 0
    with tqdm(total=sum(dataset.samples for dataset in manifest.datasets), unit="sample", disable=not sys.stderr.isatty()) as bar:
        for (_, _, shard), found in zip(shards, found_in, strict=True):
            problems += len(found)
            bar.update(shard.samples)
            for line in found:
                print(line)
    result = f"{problems} problem(s)" if problems else "all as they should be"
    print(f"{args.index}: {sum(dataset.samples for dataset in manifest.datasets)} samples in {len(shards)} shard(s), {result}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
