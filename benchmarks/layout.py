# SPDX-License-Identifier: Apache-2.0
"""What the layout of packs costs and how evenly it deals, as JSON: context-parallel shares, FlexAttention's block masks, and
MagiAttention's rectangles.

    python -m benchmarks.layout                              # synthetic packs of 32k tokens
    python -m benchmarks.layout --config run.yaml --packs 4  # packs of a training configuration's own data

Times are processor seconds of one core, the quickest of several tries.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_bagel import platform

platform.install()

from benchmarks.long_packs import KINDS, LONG, quickest  # noqa: E402
from benchmarks.record import report  # noqa: E402
from megatron_bagel.cli.data_settings import data_settings  # noqa: E402
from megatron_bagel.config.parser import parse_config  # noqa: E402
from megatron_bagel.config.resolve import architecture, tokenizer_path  # noqa: E402
from megatron_bagel.data.loading.build import open_loader  # noqa: E402
from megatron_bagel.data.tokenizer import load_tokenizer  # noqa: E402
from megatron_bagel.layout.blocks import block_occupancy  # noqa: E402
from megatron_bagel.layout.cp_partition import concatenated, context_orders  # noqa: E402
from megatron_bagel.layout.items import Sample  # noqa: E402
from megatron_bagel.layout.mask import PackMask  # noqa: E402
from megatron_bagel.layout.order import TokenOrder, expert_order  # noqa: E402
from megatron_bagel.layout.pack import Pack, build_pack  # noqa: E402
from megatron_bagel.layout.rectangles import Shape, mask_rectangles  # noqa: E402
from megatron_bagel.model.attention.flex import BLOCK, block_mask  # noqa: E402

SIZES = (2, 4, 8, 16)


def measure_dealing(pack: Pack, ranks: int) -> dict[str, Any]:
    """How a pack falls on ``ranks`` context-parallel ranks: tokens, and the largest share of the mask area over the mean.

    ``block_mask_seconds`` is for the block mask of the first rank's queries against the keys of all.
    """
    areas, orders = PackMask.of(pack).row_areas(), context_orders(pack, ranks)
    keys = concatenated(orders)
    counts = [len(order.positions) for order in orders]
    loads = np.array([areas[order.positions].sum() for order in orders])
    return {
        "tokens": [min(counts), max(counts)],
        "area_imbalance": float(loads.max() / loads.mean()),
        "seconds": quickest(lambda: context_orders(pack, ranks)),
        "block_mask_seconds": quickest(lambda: block_occupancy(PackMask.of(pack), orders[0], keys, block=BLOCK)),
    }


def measure_layout(samples: list[Sample]) -> float:
    """Seconds from the samples of a pack to the orders of all ranks, for the most ranks: what a pack costs beside its pixels."""
    return quickest(lambda: context_orders(build_pack(samples, LONG), SIZES[-1]))


def measure_block_mask(pack: Pack) -> dict[str, Any]:
    """Building the block mask of a whole pack on one rank, and how much of the attention matrix its blocks skip."""
    mask, order = PackMask.of(pack), expert_order(pack)
    blocks = block_occupancy(mask, order, block=BLOCK)
    return {
        "seconds": quickest(lambda: block_mask(mask, order, "cpu")),
        "blocks": int(blocks.occupied.size),
        "blocks_computed": int(blocks.occupied.sum()),
        "blocks_without_mask": int(blocks.full_blocks.sum()),
    }


def measure_rectangles(pack: Pack) -> dict[str, Any]:
    """The rectangles of a pack in expert-sorted order and in that of the sequence, and their tiles of 128 x 128 from their corners on."""
    positions = np.arange(pack.sequence_length)
    sequence = TokenOrder(positions, positions, len(positions), *(positions,) * 3)
    orders, mask, result = {"expert_sorted": expert_order(pack), "sequence": sequence}, PackMask.of(pack), {}
    for name, order in orders.items():
        rectangles = mask_rectangles(mask, order)
        rows, columns = (-(-np.diff(sides.astype(np.int64))[:, 0] // BLOCK) for sides in (rectangles.queries, rectangles.keys))
        tiles = np.where(rectangles.shapes == Shape.FULL, rows * columns, rows * (rows + 1) // 2)
        seconds = quickest(partial(mask_rectangles, mask, order))
        result[name] = {"rectangles": len(tiles), "tiles": int(tiles.sum()), "seconds": seconds}
    return {**result, "tiles_of_the_area": mask.area() / BLOCK**2}


def measure_pack(pack: Pack) -> dict[str, Any]:
    """Every number of one pack."""
    return {
        "tokens": int(pack.sequence_length),
        "generation_tokens": len(pack.vae_positions),
        "context_parallel": {str(ranks): measure_dealing(pack, ranks) for ranks in SIZES},
        "block_mask": measure_block_mask(pack),
        "rectangles": measure_rectangles(pack),
    }


def packs_of(config_file: Path, count: int) -> dict[str, Pack]:
    """The first packs that a training configuration would train on."""
    config = parse_config(["--config", str(config_file)])
    tokenizer = load_tokenizer(tokenizer_path(config))
    loader = open_loader(data_settings(config), architecture(config), tokenizer, count)
    packs = {f"pack {loaded.plan.number}": loaded.pack for loaded in next(loader).packs}
    loader.close()
    return packs


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print one JSON object, and return it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, help="YAML of a training run whose data is measured, in place of synthetic packs")
    parser.add_argument("--packs", type=int, default=4, help="with --config: how many packs (default 4)")
    parser.add_argument("--output", type=Path, help="write a record of this run (benchmarks/record.py) here")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    if arguments.config:
        result = {name: measure_pack(pack) for name, pack in packs_of(arguments.config, arguments.packs).items()}
    else:
        plans = {kind.__name__: kind() for kind in KINDS}
        result = {name: {"layout_seconds": measure_layout(plan), **measure_pack(build_pack(plan, LONG))} for name, plan in plans.items()}
    report(result, arguments.output)
    return result


if __name__ == "__main__":
    main()
