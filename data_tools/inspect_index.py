"""Shows what is in an index: counts and reasons, or one sample with its texts and pictures.

    python data_tools/inspect_index.py INDEX
    python data_tools/inspect_index.py INDEX --dataset t2i_pretrain/t2i --sample 17 --tokenizer hf/BAGEL-7B-MoT --images out
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatron_bagel.data.index_reader import DatasetReader, IndexedSamples
from megatron_bagel.data.records import ANSWER_ITEM, IMAGE_ITEM
from megatron_bagel.data.tokenizer import Tokenizer, load_tokenizer
from megatron_bagel.data.transforms import decode_rgb


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("index", type=Path, help="folder made by build_index.py")
    parser.add_argument("--dataset", metavar="GROUP/NAME", help="one dataset instead of all")
    parser.add_argument("--sample", type=int, metavar="N", help="show sample N of --dataset")
    parser.add_argument("--tokenizer", type=Path, metavar="PATH", help="spell texts out (default: the tokenizer the index was built with)")
    parser.add_argument("--images", type=Path, metavar="DIR", help="write the sample's pictures there as PNG")
    return parser.parse_args(argv)


def describe_dataset(reader: DatasetReader) -> str:
    """Counts of a dataset, its text lengths and image sizes."""
    info = reader.info
    lines = [f"{reader.name}: {len(reader)} samples in {len(info.shards)} shard(s), {len(info.sources)} source file(s)"]
    for title, column in (("tokens per text", "text_tokens"), ("image width", "width"), ("image height", "height")):
        values = np.concatenate([getattr(shard, column).values for shard in reader.shards()])
        if len(values):
            low, middle, high = np.percentile(values, [5, 50, 95])
            lines.append(f"  {title}: {len(values)} values, 5 % {low:g}, median {middle:g}, 95 % {high:g}, largest {values.max()}")
    lines += [f"  skipped {count}: {reason}" for reason, count in info.skipped.items()]
    return "\n".join(lines)


def describe_sample(reader: DatasetReader, index: int, tokenizer: Tokenizer) -> str:
    """Source, texts and image sizes of one sample, in order."""
    record, (path, row) = reader.record(index), reader.source(index)
    lines = [f"{reader.name} sample {index}: {path}, row {row}"]
    lines += [f"  image {i}: {w} x {h}" for i, (w, h) in enumerate(zip(record.widths, record.heights, strict=True))]
    turns = [code for code in record.structure if code != IMAGE_ITEM] if record.group in ("vlm_sft", "text") else []
    for i, count in enumerate(record.text_tokens):
        learned = " (learned)" if turns and turns[i] == ANSWER_ITEM else ""
        lines.append(f"  text {i}{learned}, {count} tokens: {tokenizer.decode(reader.text_ids(index, i).tolist())!r}")
    return "\n".join(lines)


def write_images(reader: DatasetReader, index: int, folder: Path) -> list[Path]:
    """Decode the sample's images to ``folder``; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for image in range(len(reader.record(index).widths)):
        paths.append(folder / f"{reader.name.replace('/', '_')}_{index}_{image}.png")
        decode_rgb(reader.image_bytes(index, image)).save(paths[-1])
    return paths


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    try:
        index = IndexedSamples.open(args.index)
        if args.dataset is not None and args.dataset not in index.datasets:
            raise ValueError(f"--dataset {args.dataset} is not in the index; it has {', '.join(index.datasets)}")
        readers = list(index.datasets.values()) if args.dataset is None else [index.datasets[args.dataset]]
        if args.sample is None:
            print("\n".join(describe_dataset(reader) for reader in readers))
            return 0
        if len(readers) > 1:
            raise ValueError(f"--sample needs --dataset, one of {', '.join(index.datasets)}")
        if not 0 <= args.sample < len(readers[0]):
            raise ValueError(f"--sample {args.sample} does not exist; {readers[0].name} has samples 0 to {len(readers[0]) - 1}")
        tokenizer = load_tokenizer(args.tokenizer or index.manifest.tokenizer_path)
        print(describe_sample(readers[0], args.sample, tokenizer))
        if args.images is not None:
            print("\n".join(f"  {path}" for path in write_images(readers[0], args.sample, args.images)))
    except ValueError as error:
        print(f"inspect_index: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
