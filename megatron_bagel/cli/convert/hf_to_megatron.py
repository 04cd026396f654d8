# SPDX-License-Identifier: Apache-2.0
"""Convert a model folder in BAGEL's released format to a training checkpoint of step 0, for --resume_model_only True."""

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
        "--model",
        required=True,
        type=path_flag,
        help="folder with llm_config.json, vit_config.json, ema.safetensors, ae.safetensors, or a model on a hub: owner/name[@revision]",
    )
    arguments.add_argument("--output", required=True, type=path_flag, help="checkpoint folder; the step folder 0000000 is made inside it")
    arguments.add_argument(
        "--weights",
        choices=command.WEIGHTS,
        help="ema: the average serves as model and EMA; model: no EMA; both: model and EMA as they are; default: ema, or model if there is "
        "no ema",
    )
    arguments.add_argument(
        "--weights-name", "--weights_name", metavar="NAME", help="weight file with another name, such as ema_bf16.safetensors"
    )
    arguments.add_argument(
        "--llm-path", "--llm_path", type=path_flag, metavar="DIR",
        help="config.json and tokenizer of the pretrained decoder, for a folder without llm_config.json, as the original trainer saves",
    )  # fmt: skip
    arguments.add_argument(
        "--vit-path",
        "--vit_path",
        type=path_flag,
        metavar="DIR",
        help="config.json of the SigLIP tower, for a folder without vit_config.json",
    )
    arguments.add_argument("--max-latent-size", type=int, help="side of the latent grid; default: that of the stored position table")
    arguments.add_argument(
        "--allow-missing", "--allow_missing", nargs="+", default=[], metavar="PATTERN",
        help="weights that the folder may lack, as shell patterns of their names; they get seeded values and are listed",
    )  # fmt: skip
    arguments.add_argument(
        "--autoencoder-config",
        type=path_flag,
        help="JSON file with the shape of an autoencoder that is not FLUX's and has no ae_config.json",
    )
    return arguments


def main(argv: Sequence[str] | None = None, prog: str = "megatron-bagel convert hf-to-megatron") -> int:
    """Convert the folder. Returns the exit status."""
    typed = parser(prog).parse_args(argv)

    def work() -> None:
        from megatron_bagel.checkpoint.convert import import_folder
        from megatron_bagel.checkpoint.hf.folder import HFFolder
        from megatron_bagel.config.architecture import ConfigSources

        check_writable(typed.output, "--output")
        kinds = command.WEIGHTS[typed.weights] if typed.weights else WEIGHT_KINDS
        model = needs("--model", weights=kinds, first_only=not typed.weights, weights_name=typed.weights_name, autoencoder="wanted")
        args, names = with_local_folders(typed, {"model": model, "llm_path": needs("--llm-path"), "vit_path": needs("--vit-path")})
        sources = ConfigSources(args.llm_path, args.vit_path, args.weights_name)
        weights = command.WEIGHTS[args.weights] if args.weights else HFFolder(args.model, sources=sources).default_weights()
        settings = {
            "autoencoder": command.autoencoder_config(args.autoencoder_config), "max_latent_size": args.max_latent_size, "sources": sources,
            "hub_name": names.get("model"),
        }  # fmt: skip
        print(import_folder(args.model, args.output, weights, args.allow_missing, **settings))

    return command.run(prog, work)
