# SPDX-License-Identifier: Apache-2.0
"""Building an index beside the least work that could be done: copying the same bytes file by file, and tokenising the same texts.

    python -m benchmarks.index_build --rows 2000 --side 512

Times are processor seconds of one process (user and system), which other load on the machine does not change much. The floor writes
every image to a file of its own and encodes every caption once. The index is built with each kind of ``--check-images``: ``structure``
is the default, the time of ``decode`` is that of the decoder.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs as a file too, without installing the benchmarks

from benchmarks.record import report  # noqa: E402
from megatron_bagel.data.index.build import BuildOptions, build_index  # noqa: E402
from megatron_bagel.data.index.plan import IMAGE_CHECKS, ImageChecks  # noqa: E402
from megatron_bagel.data.sources.dataset_config import GroupConfig, parse_groups  # noqa: E402
from megatron_bagel.data.tokenizer import load_tokenizer  # noqa: E402
from megatron_bagel.sample_world.tokenizer_training import train_tokenizer  # noqa: E402

WORDS = ("red", "green", "blue", "large", "small", "circle", "square", "left", "right", "of", "a", "on", "the", "background", "photo")


def write_sources(root: Path, rows: int, side: int, words: int) -> int:
    """T2I parquet files of 500 rows with noisy JPEGs of ``side`` pixels and captions of ``words`` words; bytes of the images."""
    generator, total = np.random.default_rng(0), 0
    (root / "t2i").mkdir(parents=True)
    for first in range(0, rows, 500):
        images, captions = [], []
        for row in range(first, min(first + 500, rows)):
            smooth = generator.integers(0, 256, (side // 8, side // 8, 3), dtype=np.uint8)
            buffer = io.BytesIO()
            Image.fromarray(smooth).resize((side, side), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
            images.append(buffer.getvalue())
            captions.append(json.dumps({"caption": " ".join(generator.choice(WORDS, words)) + f" {row}"}))
            total += len(images[-1])
        table = pa.table({"image": pa.array(images, pa.binary()), "captions": pa.array(captions, pa.string())})
        pq.write_table(table, root / f"t2i/{first:06d}.parquet", row_group_size=100)
    return total


def floor(root: Path, output: Path, tokenizer_path: Path) -> None:
    """Every image of the sources to a file of its own, every caption to token ids in one file."""
    tokenizer = load_tokenizer(tokenizer_path)
    output.mkdir()
    number = 0
    with open(output / "tokens", "wb") as tokens:
        for path in sorted((root / "t2i").glob("*.parquet")):
            for batch in pq.ParquetFile(path).iter_batches(batch_size=64):
                for image, captions in zip(batch.column(0), batch.column(1), strict=True):
                    with open(output / f"{number:08d}.jpg", "wb") as file:
                        file.write(image.as_py())
                    for caption in json.loads(captions.as_py()).values():
                        tokens.write(np.asarray(tokenizer.encode(caption), dtype="<i4").tobytes())
                    number += 1


def seconds(work: Callable[[], object]) -> float:
    """Processor seconds of ``work``, user and system."""
    before = time.process_time()
    work()
    return time.process_time() - before


def groups(root: Path) -> list[GroupConfig]:
    """The sources as a dataset config."""
    transform = {"image_stride": 16, "max_image_size": 512, "min_image_size": 256}
    group = {"dataset_names": ["t2i"], "weight": 1, "image_transform_args": transform}
    return parse_groups({"t2i_pretrain": group}, "benchmark", root, root)


def measure(rows: int, side: int, words: int, repeats: int) -> dict[str, object]:
    """Rows per processor second of the floor and of the builds, the best of ``repeats``."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        size = write_sources(root / "sources", rows, side, words)
        tokenizer = root / "tokenizer"
        train_tokenizer([" ".join(WORDS)] * 50, tokenizer, 400)
        best: dict[str, float] = {}
        for repeat in range(repeats):
            times = {"floor": seconds(lambda to=root / f"floor{repeat}": floor(root / "sources", to, tokenizer))}
            for depth in IMAGE_CHECKS:
                options = BuildOptions(checks=ImageChecks(depth), progress=False)
                output = root / f"{depth}{repeat}"
                times[depth] = seconds(lambda to=output, how=options: build_index(groups(root / "sources"), tokenizer, to, how))
            best = {name: min(value, best.get(name, value)) for name, value in times.items()}
    return {
        "rows": rows,
        "image_megabytes": size / 1e6,
        "rows_per_cpu_second": {name: rows / value for name, value in best.items()},
        "of_floor": {name: best["floor"] / best[name] for name in IMAGE_CHECKS},
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--side", type=int, default=512, help="pixels per side of the images")
    parser.add_argument("--words", type=int, default=40, help="words per caption")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, help="write a record of this run (benchmarks/record.py) here")
    arguments = parser.parse_args(argv)
    report(measure(arguments.rows, arguments.side, arguments.words, arguments.repeats), arguments.output)


if __name__ == "__main__":
    main()
