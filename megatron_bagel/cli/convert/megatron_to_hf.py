"""Training checkpoint -> model folder in the released BAGEL layout. No GPU, no model in memory, any layout of the run that saved it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from megatron_bagel.cli.convert import command_line as command
from megatron_bagel.common.writable import check_writable


def parser(prog: str) -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    p = argparse.ArgumentParser(prog=prog, description=__doc__)
    p.add_argument("--checkpoint", required=True, type=Path, help="a step folder, or the folder above it: then its newest complete step")
    p.add_argument("--output", required=True, type=Path, help="folder to write; it must not exist or be empty")
    p.add_argument("--weights", choices=command.WEIGHTS, default="ema", help="which weights; the released model is an average (ema)")
    p.add_argument(
        "--dtype", choices=("bf16", "fp32", "keep"), default="bf16",
        help="bf16 is the released type; fp32 keeps the main weights' bits; keep: each tensor in the type it is stored in",
    )  # fmt: skip
    p.add_argument("--shard-size", type=command.size, help="cut weight files into parts of at most this size (5GB, 200MB), with an index")
    p.add_argument(
        "--untrained-from", type=Path, metavar="FOLDER",
        help="model folder that gives the parts the run was trained without: vision tower, image generation, autoencoder",
    )  # fmt: skip
    p.add_argument("--tokenizer", type=Path, help="tokenizer folder or SentencePiece .model file; default: the one the run used")
    p.add_argument("--autoencoder", type=Path, help="ae.safetensors to copy; default: the one the run used")
    return p


def main(argv: Sequence[str] | None = None, prog: str = "megatron-bagel convert megatron-to-hf") -> int:
    """Convert; returns the process's exit status."""
    args = parser(prog).parse_args(argv)

    def work() -> None:
        from megatron_bagel.checkpoint.convert import Companions, companions_of, export_checkpoint
        from megatron_bagel.checkpoint.dist.step_folders import read_state
        from megatron_bagel.checkpoint.hf.folder import HFFolder
        from megatron_bagel.model.positions import sincos_2d

        check_writable(args.output, "--output")
        folder = command.step_folder(args.checkpoint)
        used = companions_of(read_state(folder)["run"].get("config", {}))
        companions = Companions(args.tokenizer or used.tokenizer, args.autoencoder or used.autoencoder)
        rest = HFFolder(args.untrained_from) if args.untrained_from is not None else None
        export_checkpoint(folder, args.output, sincos_2d, command.WEIGHTS[args.weights], args.dtype, companions, rest, args.shard_size)

    return command.run(prog, work)
