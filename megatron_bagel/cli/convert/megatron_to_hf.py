# SPDX-License-Identifier: Apache-2.0
"""Convert a training checkpoint, saved with any parallel sizes, to a model folder in BAGEL's released format. No GPU is needed."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from megatron_bagel.cli.convert import command_line as command
from megatron_bagel.cli.hub_models import needs, needs_autoencoder, with_local_folders
from megatron_bagel.common.flag_names import CommandParser
from megatron_bagel.common.paths import path_flag
from megatron_bagel.common.writable import check_writable
from megatron_bagel.config.architecture.weight_files import WEIGHT_KINDS


def parser(prog: str) -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    arguments = CommandParser(prog=prog, description=__doc__)
    arguments.add_argument(
        "--checkpoint", required=True, type=path_flag, help="step folder, or the folder above it, which means its newest complete step"
    )
    arguments.add_argument("--output", required=True, type=path_flag, help="folder to write; it must not exist or be empty")
    arguments.add_argument(
        "--weights", choices=command.WEIGHTS, default="ema", help="weights to write; the released model is an average (ema)"
    )
    arguments.add_argument(
        "--dtype", choices=("bf16", "fp32", "keep"), default="bf16",
        help="bf16: the released type; fp32: the main weights' bits; keep: the stored type of each tensor",
    )  # fmt: skip
    arguments.add_argument(
        "--shard-size", type=command.size, help="split weight files into parts of at most this size (5GB, 200MB), with an index"
    )
    arguments.add_argument(
        "--untrained-from", type=path_flag, metavar="FOLDER",
        help="model folder with the parts that the run was trained without: vision tower, image generation, autoencoder",
    )  # fmt: skip
    arguments.add_argument("--tokenizer", type=path_flag, help="tokenizer folder or SentencePiece .model file; default: the run's")
    arguments.add_argument("--autoencoder", type=path_flag, help="ae.safetensors to copy; default: the run's")
    return arguments


def main(argv: Sequence[str] | None = None, prog: str = "megatron-bagel convert megatron-to-hf") -> int:
    """Convert the checkpoint. Returns the exit status."""
    typed = parser(prog).parse_args(argv)

    def work() -> None:
        from megatron_bagel.checkpoint.convert import Companions, companions_of, export_checkpoint
        from megatron_bagel.checkpoint.dist.step_folders import read_state
        from megatron_bagel.checkpoint.hf.folder import HFFolder
        from megatron_bagel.model.positions import sincos_2d

        check_writable(typed.output, "--output")
        untrained = needs("--untrained-from", weights=WEIGHT_KINDS, first_only=True, autoencoder="wanted")
        autoencoder = needs_autoencoder("--autoencoder")
        requests = {"untrained_from": untrained, "tokenizer": needs("--tokenizer"), "autoencoder": autoencoder}
        args, _ = with_local_folders(typed, requests)
        folder = command.step_folder(args.checkpoint)
        run_companions = companions_of(read_state(folder)["run"].get("config", {}))
        companions = Companions(args.tokenizer or run_companions.tokenizer, args.autoencoder or run_companions.autoencoder)
        untrained_folder = HFFolder(args.untrained_from) if args.untrained_from is not None else None
        export_checkpoint(
            folder, args.output, sincos_2d, command.WEIGHTS[args.weights], args.dtype, companions, untrained_folder, args.shard_size
        )

    return command.run(prog, work)
