# SPDX-License-Identifier: Apache-2.0
"""Make a training checkpoint of step 0 from a Qwen folder, a SigLIP folder and ae.safetensors: a new BAGEL before its first step.

A run with these flags starts from the same weights. QK-norm starts at 1 if the LLM has none (Qwen2.5) and is copied if it has (Qwen3).
The patch convolution becomes a linear layer, and ViT layers after the selected one are dropped. The vocabulary grows to the tokenizer's
and is never cut. The command needs no network and no GPU, and holds a few tensors at a time.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial

from megatron_bagel.cli.convert import command_line as command
from megatron_bagel.cli.hub_models import needs, needs_autoencoder, with_local_folders
from megatron_bagel.cli.usage import command_parser
from megatron_bagel.common.paths import path_flag
from megatron_bagel.common.writable import check_writable


def parser(prog: str) -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    arguments = command_parser(__doc__, prog)
    arguments.add_argument("--llm", required=True, type=path_flag, help="Qwen2.5 or Qwen3 folder: config.json, weights, tokenizer")
    arguments.add_argument("--vit", type=path_flag, help="SigLIP folder; without it the model cannot understand images")
    arguments.add_argument("--vae", type=path_flag, help="ae.safetensors; without it the model cannot generate images")
    arguments.add_argument("--output", required=True, type=path_flag, help="checkpoint folder; the step folder 0000000 is made inside it")
    arguments.add_argument("--tokenizer", type=path_flag, help="tokenizer folder or SentencePiece .model file; default: the LLM's")
    arguments.add_argument(
        "--layer-module", default="Qwen2MoTDecoderLayer", help="Qwen2MoTDecoderLayer, Qwen2MoEDecoderLayer or Qwen2DecoderLayer"
    )
    arguments.add_argument("--no-qk-norm", action="store_true", help="do not normalise queries and keys per head")
    arguments.add_argument("--tie-word-embeddings", action="store_true", help="share the token embedding with the output layer")
    arguments.add_argument(
        "--no-copy-init-moe", action="store_true", help="start the generation expert from seeded values, not from the LLM's"
    )
    arguments.add_argument("--max-latent-size", type=int, default=32, help="side of the latent grid")
    arguments.add_argument("--vit-max-num-patch-per-side", type=int, help="side of the ViT's position grid; default: the ViT's own")
    arguments.add_argument("--vit-select-layer", type=int, default=-2, help="ViT layer that feeds the connector; -2 drops the last")
    arguments.add_argument("--seed", type=int, default=4396, help="seed of values that no folder has (global_seed of a run)")
    arguments.add_argument(
        "--allow-missing", nargs="*", default=[], metavar="PATTERN", help="weights that the folders may lack, such as '*.q_norm.*'"
    )
    return arguments


def main(argv: Sequence[str] | None = None, prog: str = "megatron-bagel convert init") -> int:
    """Make the checkpoint. Returns the exit status."""
    typed = parser(prog).parse_args(argv)

    def work() -> None:
        from megatron_bagel.checkpoint.convert import Companions, write_initial_weights
        from megatron_bagel.checkpoint.hf.initial_weights import InitialWeights
        from megatron_bagel.checkpoint.hf.pretrained import grown_vocabulary
        from megatron_bagel.common.json_files import read_json_as
        from megatron_bagel.config.architecture import AutoencoderArch, BagelArch, LLMArch, ViTArch
        from megatron_bagel.data.tokenizer import load_tokenizer

        check_writable(typed.output, "--output")
        requests = {
            "llm": needs("--llm", weights=("model",)),
            "vit": needs("--vit", weights=("model",)),
            "vae": needs_autoencoder("--vae"),
            "tokenizer": needs("--tokenizer"),
        }
        args, _ = with_local_folders(typed, requests)
        if args.vae is not None and not args.vae.is_file():
            raise ValueError(f"--vae: there is no file {args.vae}")
        vit = read_json_as(ViTArch.from_hf, args.vit / "config.json", "--vit") if args.vit is not None else None
        side = args.vit_max_num_patch_per_side or (vit.image_size // vit.patch_size if vit is not None else 70)
        layer_settings = {
            "layer_module": args.layer_module,
            "qk_norm": not args.no_qk_norm,
            "tie_word_embeddings": args.tie_word_embeddings,
        }
        arch = BagelArch(
            llm=read_json_as(partial(LLMArch.from_hf, **layer_settings), args.llm / "config.json", "--llm"),
            vit=vit,
            autoencoder=AutoencoderArch.beside(args.vae) if args.vae is not None else None,
            max_latent_size=args.max_latent_size,
            vit_max_num_patch_per_side=side,
            vit_select_layer=args.vit_select_layer,
        )
        tokenizer = args.tokenizer or args.llm
        arch = grown_vocabulary(arch, len(load_tokenizer(str(tokenizer))))
        initial_weights = InitialWeights.of(arch, args.seed, args.llm, args.vit, args.allow_missing, not args.no_copy_init_moe)
        print(write_initial_weights(initial_weights, args.output, Companions(tokenizer, args.vae)))

    return command.run(prog, work)
