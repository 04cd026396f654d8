# SPDX-License-Identifier: Apache-2.0
"""Show an index: schema, counts and histograms, one sample with texts and pictures, or one pack of a run with its mask.

    %(prog)s INDEX
    %(prog)s INDEX --dataset t2i_pretrain/t2i --sample 17 --images out
    %(prog)s INDEX --config results/config.yaml --pack 3 --png pack.png
    %(prog)s INDEX --dataset t2i_pretrain/t2i --sample 17 --config results/config.yaml --pack 3 --html look.html

The console shows text. --png draws the last thing shown, and --html writes text and figures of everything to one file.
"""

from __future__ import annotations

import argparse
import base64
import html
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from matplotlib.figure import Figure

from megatron_bagel.cli.data_settings import data_settings
from megatron_bagel.cli.usage import command_parser, report_error
from megatron_bagel.common.paths import path_flag
from megatron_bagel.common.writable import check_writable, check_writable_file
from megatron_bagel.config.parser import Config, parse_config
from megatron_bagel.config.resolve import architecture
from megatron_bagel.data.index.reader import DatasetReader, IndexedSamples
from megatron_bagel.data.inspect.describe import describe_dataset, describe_pack, describe_sample, describe_schema
from megatron_bagel.data.inspect.figures import as_png, overview_figure, pack_figure, sample_figure
from megatron_bagel.data.loading.build import open_loader
from megatron_bagel.data.tokenizer import load_tokenizer
from megatron_bagel.layout.pack import build_pack

Section = tuple[str, Callable[[], Figure]]  # text, and the function that draws the same thing


def parse_arguments(argv: Sequence[str] | None, prog: str) -> argparse.Namespace:
    """Return the command line's values."""
    parser = command_parser(__doc__, prog)
    parser.add_argument("index", type=path_flag, help="folder of an index")
    parser.add_argument("--dataset", metavar="GROUP/NAME", help="one dataset instead of all")
    parser.add_argument("--sample", type=int, metavar="N", help="show sample N of --dataset")
    parser.add_argument("--config", type=path_flag, metavar="YAML", help="config.yaml of a run (in its results_dir), which --pack needs")
    parser.add_argument("--pack", type=int, metavar="N", help="show pack N of the run's order")
    parser.add_argument(
        "--tokenizer", type=path_flag, metavar="PATH", help="tokenizer that decodes texts (default: the one that built the index)"
    )
    parser.add_argument("--images", type=path_flag, metavar="DIR", help="write the sample's pictures to this folder as PNG")
    parser.add_argument("--png", type=path_flag, metavar="FILE", help="draw the last thing shown: pack, sample or histograms")
    parser.add_argument("--html", type=path_flag, metavar="FILE", help="write text and figures of everything shown to one file")
    return parser.parse_args(argv)


def write_images(reader: DatasetReader, index: int, folder: Path) -> list[Path]:
    """Decode the sample's images to ``folder``. Returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    paths: list[Path] = []
    for image in range(len(reader.record(index).widths)):
        paths.append(folder / f"{reader.name.replace('/', '_')}_{index}_{image}.png")
        reader.picture(index, image).save(paths[-1])
    return paths


def overview(index: IndexedSamples, readers: Sequence[DatasetReader]) -> Section:
    """Return the section of schema, counts and histograms."""
    paragraphs = [describe_schema(index.manifest), *(describe_dataset(reader) for reader in readers)]
    return "\n".join(paragraphs), partial(overview_figure, list(readers))


def one_sample(args: argparse.Namespace, index: IndexedSamples, readers: Sequence[DatasetReader]) -> Section:
    """Return the section of one sample, with its texts and pictures."""
    if len(readers) > 1:
        raise ValueError(f"--sample needs --dataset, one of {', '.join(index.datasets)}")
    reader, number = readers[0], args.sample
    if not 0 <= number < len(reader):
        raise ValueError(f"--sample {number} does not exist; {reader.name} has samples 0 to {len(reader) - 1}")
    tokenizer = load_tokenizer(args.tokenizer or index.manifest.tokenizer_path)
    text = describe_sample(reader, number, tokenizer)
    if args.images is not None:
        text += "".join(f"\n  {path}" for path in write_images(reader, number, args.images))
    return text, partial(sample_figure, reader, number, tokenizer)


def one_pack(args: argparse.Namespace, index: IndexedSamples) -> Section:
    """Return the section of one pack, as the run makes it on any ranks."""
    if args.config is None:
        raise ValueError("--pack needs --config: the order and size of packs are a run's")
    if args.pack < 0:
        raise ValueError(f"--pack {args.pack}: packs count from 0")
    config: Config = parse_config(["--config", str(args.config), "--index_dir", str(args.index)])
    tokenizer = load_tokenizer(args.tokenizer or index.manifest.tokenizer_path)
    batch = config.megatron.global_batch_size or config.training.gradient_accumulation_steps
    loader = open_loader(data_settings(config), architecture(config), tokenizer, batch)
    plan = loader.planner.packs(args.pack, 1)[0]
    pack = build_pack([loader.reader.sources[source].sample(row, epoch) for source, row, epoch in plan.samples], loader.reader.spec)
    return describe_pack(plan, pack, config.data.max_num_tokens), partial(pack_figure, plan, pack)


def write_html(path: Path, title: str, sections: Sequence[Section]) -> None:
    """Write one self-contained file with every section's text and figure."""
    parts = [f"<!doctype html><meta charset='utf-8'><title>{html.escape(title)}</title><h1>{html.escape(title)}</h1>"]
    for text, draw in sections:
        png = base64.b64encode(as_png(draw())).decode()
        parts.append(f"<pre>{html.escape(text)}</pre><img src='data:image/png;base64,{png}'>")
    path.write_text("\n".join(parts) + "\n", encoding="utf-8")


def check_targets(args: argparse.Namespace) -> None:
    """Raise ValueError for a file or a folder that cannot be written, before anything is read and drawn for it."""
    if args.images is not None:
        check_writable(args.images, "--images")
    for path, flag in ((args.png, "--png"), (args.html, "--html")):
        if path is not None:
            check_writable_file(path, flag)


def main(argv: Sequence[str] | None = None, prog: str = "megatron-bagel data inspect") -> int:
    """Print and draw the requested sections. Returns the exit status."""
    args = parse_arguments(argv, prog)
    try:
        check_targets(args)
        index = IndexedSamples.open(args.index)
        if args.dataset is not None and args.dataset not in index.datasets:
            raise ValueError(f"--dataset {args.dataset} is not in the index; it has {', '.join(index.datasets)}")
        readers = list(index.datasets.values()) if args.dataset is None else [index.datasets[args.dataset]]
        sections: list[Section] = []
        if args.sample is None and args.pack is None:
            sections.append(overview(index, readers))
        if args.sample is not None:
            sections.append(one_sample(args, index, readers))
        if args.pack is not None:
            sections.append(one_pack(args, index))
        print("\n".join(text for text, _ in sections))
        if args.png is not None:
            args.png.write_bytes(as_png(sections[-1][1]()))
        if args.html is not None:
            write_html(args.html, str(args.index), sections)
    except (ValueError, OSError) as error:
        report_error(prog, error)
        return 2
    return 0
