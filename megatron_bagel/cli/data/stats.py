# SPDX-License-Identifier: Apache-2.0
"""Show what an index holds and what a run will train on: samples, pictures and tokens of every dataset, and their shares of both losses.

    %(prog)s INDEX --config results/config.yaml
    %(prog)s INDEX --config results/config.yaml --step 10000 --packs 256

The shares are counted in the packs that the run plans from a step on, by its weights, epochs and mandatory groups. Nothing is trained.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from megatron_bagel.cli.data_settings import data_settings
from megatron_bagel.cli.usage import command_parser, report_error
from megatron_bagel.common.paths import path_flag
from megatron_bagel.config.parser import Config, parse_config
from megatron_bagel.config.resolve import architecture
from megatron_bagel.data.index.format import Manifest
from megatron_bagel.data.index.reader import IndexedSamples
from megatron_bagel.data.loading.build import open_loader
from megatron_bagel.data.loading.mix_report import count_packs, share_lines
from megatron_bagel.data.tokenizer import load_tokenizer


def parse_arguments(argv: Sequence[str] | None, prog: str) -> argparse.Namespace:
    """Return the command line's values."""
    parser = command_parser(__doc__, prog)
    parser.add_argument("index", type=path_flag, help="folder of an index")
    parser.add_argument("--config", type=path_flag, metavar="YAML", help="config.yaml of a run (in its results_dir) for the shares")
    parser.add_argument("--step", type=int, default=0, metavar="N", help="first step that is counted (default 0)")
    parser.add_argument("--packs", type=int, default=64, metavar="N", help="packs that are counted (default 64)")
    return parser.parse_args(argv)


def totals(manifest: Manifest) -> list[str]:
    """Return a line for every dataset: what the index holds of it."""
    lines = []
    for dataset in manifest.datasets:
        images, tokens = (sum(getattr(shard, name) for shard in dataset.shards) for name in ("images", "tokens"))
        lines.append(f"{dataset.key}: {dataset.samples} samples, {images} pictures, {tokens} text tokens")
    return lines


def predicted_shares(args: argparse.Namespace, index: IndexedSamples) -> list[str]:
    """Return the table of shares in the packs of a run."""
    if args.step < 0 or args.packs < 1:
        raise ValueError(f"--step must be 0 or more and --packs 1 or more, got {args.step} and {args.packs}")
    config: Config = parse_config(["--config", str(args.config), "--index_dir", str(args.index)])
    batch = config.megatron.global_batch_size or config.training.gradient_accumulation_steps
    loader = open_loader(data_settings(config), architecture(config), load_tokenizer(index.manifest.tokenizer_path), batch)
    plans = loader.planner.packs(args.step * batch, args.packs)
    counts = count_packs(plans, loader.reader.sources, loader.reader.spec)
    return [f"shares of {args.packs} packs from step {args.step} on:", *share_lines(counts)]


def main(argv: Sequence[str] | None = None, prog: str = "megatron-bagel data stats") -> int:
    """Print the counts and the shares. Returns the exit status."""
    args = parse_arguments(argv, prog)
    try:
        index = IndexedSamples.open(args.index)
        lines = totals(index.manifest)
        if args.config is not None:
            lines += predicted_shares(args, index)
        print("\n".join(lines))
    except (ValueError, OSError) as error:
        report_error(prog, error)
        return 2
    return 0
