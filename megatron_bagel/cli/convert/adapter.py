# SPDX-License-Identifier: Apache-2.0
"""Export an adapter to PEFT's format, import one, or merge one into a whole model folder. No GPU is needed.

%(prog)s export --checkpoint RUN/checkpoints --output FOLDER
%(prog)s import --adapter FOLDER --base MODEL --output CHECKPOINTS
%(prog)s merge --adapter FOLDER --base MODEL --output FOLDER
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from megatron_bagel.cli.convert import command_line as command
from megatron_bagel.cli.hub_models import needs, needs_adapter, with_local_folders
from megatron_bagel.cli.usage import command_parser
from megatron_bagel.common.paths import path_flag
from megatron_bagel.common.writable import check_writable
from megatron_bagel.config.architecture.weight_files import WEIGHT_KINDS


def parser(prog: str) -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    arguments = command_parser(__doc__, prog)
    modes = arguments.add_subparsers(dest="mode", required=True)
    export = modes.add_parser("export", help="write a checkpoint's adapter as a PEFT folder")
    export.add_argument(
        "--checkpoint", required=True, type=path_flag, help="step folder of adapters, or the folder above it: its newest step"
    )
    export.add_argument("--weights", choices=("ema", "model"), help="default: ema, or model if there is no average")
    export.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="type of the stored factors (default: %(default)s)")
    imported = modes.add_parser("import", help="write a PEFT folder as a checkpoint of 0 steps, for --resume_model_only True")
    imported.add_argument("--adapter", required=True, type=path_flag, help="PEFT folder with released names, or owner/name on a hub")
    imported.add_argument(
        "--base", required=True, type=path_flag, help="model folder, owner/name on a hub, or checkpoint that it belongs to"
    )
    imported.add_argument("--weights", choices=("ema", "model"), help="weights of the base; default: ema if there are any")
    merge = modes.add_parser("merge", help="write a whole model folder with the adapter merged into its base")
    merge.add_argument("--adapter", required=True, type=path_flag, help="PEFT folder, owner/name on a hub, or checkpoint of adapters")
    merge.add_argument(
        "--base", type=path_flag, help="model folder, owner/name on a hub, or checkpoint that it belongs to; default: the one that it names"
    )
    merge.add_argument("--weights", choices=("ema", "model"), help="weights of the adapter's checkpoint; default: ema if there are any")
    merge.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16", help="type of the merged weights (default: %(default)s)")
    for mode in (export, imported, merge):
        mode.add_argument("--output", required=True, type=path_flag, help="folder to write")
    return arguments


def main(argv: Sequence[str] | None = None, prog: str = "megatron-bagel convert adapter") -> int:
    """Export, import or merge. Returns the exit status."""
    typed = parser(prog).parse_args(argv)

    def work() -> None:
        from megatron_bagel.checkpoint import convert_adapter
        from megatron_bagel.model.positions import sincos_2d

        check_writable(typed.output, "--output")
        base = needs("--base", weights=WEIGHT_KINDS, autoencoder="wanted")
        on_hub = {} if typed.mode == "export" else {"adapter": needs_adapter("--adapter"), "base": base}
        args, _ = with_local_folders(typed, on_hub)
        if args.mode == "export":
            print(convert_adapter.export_adapter(command.step_folder(args.checkpoint), args.output, args.weights, args.dtype))
        elif args.mode == "import":
            print(convert_adapter.import_adapter(args.adapter, args.base, args.output, args.weights))
        else:
            print(convert_adapter.merge_adapter(args.adapter, args.base, args.output, sincos_2d, args.weights, args.dtype))

    return command.run(prog, work)
