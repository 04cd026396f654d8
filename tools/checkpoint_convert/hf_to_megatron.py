"""Model folder in the released BAGEL layout -> training checkpoint of step 0, to train from with --resume_model_only True."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_bagel import platform
from megatron_bagel.checkpoint.convert import import_folder
from megatron_bagel.config.architecture import AutoencoderArch

CHOICES = {"ema": ("ema",), "model": ("model",), "both": ("ema", "model")}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(prog="hf_to_megatron.py", description=__doc__)
    p.add_argument(
        "--model", required=True, type=Path, help="folder with llm_config.json, vit_config.json, ema.safetensors, ae.safetensors"
    )
    p.add_argument("--output", required=True, type=Path, help="checkpoint folder; the step folder 0000000 is made inside it")
    p.add_argument(
        "--weights", choices=CHOICES, default="ema", help="ema: average serves as model and EMA; model: no EMA; both: each as it is"
    )
    p.add_argument("--max-latent-size", type=int, help="side of the latent grid (config.json's, else 32); 64 for the released weights")
    p.add_argument("--autoencoder-config", type=Path, help="JSON shape of an autoencoder that is not FLUX's and has no ae_config.json")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Convert; returns the process's exit status."""
    args = parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    platform.install()
    try:
        shape = args.autoencoder_config
        if shape is not None and not shape.is_file():
            raise ValueError(f"--autoencoder-config: there is no file {shape}")
        autoencoder = AutoencoderArch.from_dict(json.loads(shape.read_text())) if shape else None
        made = import_folder(args.model, args.output, CHOICES[args.weights], autoencoder=autoencoder, max_latent_size=args.max_latent_size)
    except ValueError as error:
        print(f"hf_to_megatron: {error}", file=sys.stderr)
        return 1
    print(made)
    return 0


if __name__ == "__main__":
    sys.exit(main())
