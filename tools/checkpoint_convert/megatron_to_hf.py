"""Training checkpoint -> model folder in the released BAGEL layout. No GPU, no model in memory, any layout of the run that saved it."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_bagel import platform
from megatron_bagel.checkpoint import publish
from megatron_bagel.checkpoint.convert import Companions, companions_of, export_checkpoint
from megatron_bagel.model.positions import sincos_2d

CHOICES = {"ema": ("ema",), "model": ("model",), "both": ("ema", "model")}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(prog="megatron_to_hf.py", description=__doc__)
    p.add_argument("--checkpoint", required=True, type=Path, help="a step folder, or the folder above it: then its newest complete step")
    p.add_argument("--output", required=True, type=Path, help="folder to write; it must not exist or be empty")
    p.add_argument("--weights", choices=CHOICES, default="ema", help="which weights to write; the released model is an average (ema)")
    p.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16", help="bf16 is the released type; fp32 keeps the main weights' bits")
    p.add_argument("--tokenizer", type=Path, help="tokenizer folder or SentencePiece .model file; default: the one the run used")
    p.add_argument("--autoencoder", type=Path, help="ae.safetensors to copy; default: the one the run used")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Convert; returns the process's exit status."""
    args = parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    platform.install()
    try:
        folder = args.checkpoint if publish.is_complete(args.checkpoint) else publish.latest_checkpoint(args.checkpoint) or args.checkpoint
        used = companions_of(publish.read_state(folder)["run"].get("config", {}))
        companions = Companions(args.tokenizer or used.tokenizer, args.autoencoder or used.autoencoder)
        export_checkpoint(folder, args.output, sincos_2d, CHOICES[args.weights], args.dtype, companions)
    except ValueError as error:
        print(f"megatron_to_hf: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
