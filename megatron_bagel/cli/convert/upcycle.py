# SPDX-License-Identifier: Apache-2.0
"""Turn a dense model folder into one with sparse experts, each a copy of the dense MLP. No GPU is needed."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from megatron_bagel.cli.convert import command_line as command
from megatron_bagel.cli.hub_models import needs, with_local_folders
from megatron_bagel.common.flag_names import CommandParser
from megatron_bagel.common.paths import path_flag
from megatron_bagel.common.writable import check_writable
from megatron_bagel.config.architecture.weight_files import WEIGHT_KINDS


def parser(prog: str) -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    arguments = CommandParser(prog=prog, description=__doc__)
    arguments.add_argument(
        "--model", required=True, type=path_flag, help="dense model folder in BAGEL's released format, or owner/name on a hub"
    )
    arguments.add_argument("--output", required=True, type=path_flag, help="folder to write; it must not exist or be empty")
    arguments.add_argument("--num-experts", required=True, type=int, help="experts of each sparse MLP")
    arguments.add_argument("--moe-router-topk", required=True, type=int, help="experts that serve a token")
    arguments.add_argument("--moe-kinds", nargs="+", choices=("und", "gen"), default=["und", "gen"], help="kinds with sparse MLPs")
    arguments.add_argument("--dense-layers", nargs="*", type=int, default=[], help="layers, counted from 0, whose MLPs stay dense")
    arguments.add_argument("--weights", choices=("ema", "model"), help="weights to take; default: ema, or all there is")
    arguments.add_argument("--seed", type=int, default=0, help="seed of the routers")
    return arguments


def main(argv: Sequence[str] | None = None, prog: str = "megatron-bagel convert upcycle") -> int:
    """Write the folder. Returns the exit status."""
    typed = parser(prog).parse_args(argv)

    def work() -> None:
        from megatron_bagel.checkpoint.hf.folder import HFFolder
        from megatron_bagel.checkpoint.hf.upcycle import upcycle
        from megatron_bagel.config.architecture import SparseArch
        from megatron_bagel.model.positions import sincos_2d

        check_writable(typed.output, "--output")
        kinds = (typed.weights,) if typed.weights else WEIGHT_KINDS
        args, _ = with_local_folders(typed, {"model": needs("--model", weights=kinds, first_only=True, autoencoder="wanted")})
        sparse = SparseArch(
            num_experts=args.num_experts,
            num_experts_per_tok=args.moe_router_topk,
            moe_intermediate_size=HFFolder(args.model).arch.llm.intermediate_size,
            mlp_only_layers=tuple(sorted(set(args.dense_layers))),
            norm_topk_prob=args.moe_router_topk > 1,
            sparse_kinds=tuple(kind for kind in ("und", "gen") if kind in args.moe_kinds),
        )
        print(upcycle(args.model, args.output, sparse, sincos_2d, args.weights, args.seed))

    return command.run(prog, work)
