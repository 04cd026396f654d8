# SPDX-License-Identifier: Apache-2.0
"""Upload an exported model folder to a hub, with its model card.

    %(prog)s my_model --to owner/name --license apache-2.0
    %(prog)s my_model --to owner/name@experiment --license other --license-name "My terms" --license-link https://example.org/terms

The folder comes from convert megatron-to-hf, or from a run with --export_hf_every. Log in with hf auth login, or set HF_TOKEN. HF_ENDPOINT
names a hub other than huggingface.co. Every weight file is checked first, and all files appear in one commit.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from megatron_bagel.cli.convert import command_line as command
from megatron_bagel.cli.usage import command_parser
from megatron_bagel.common.hub_names import parse_hub_name
from megatron_bagel.common.paths import path_flag


def parser(prog: str) -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    arguments = command_parser(__doc__, prog)
    arguments.add_argument("folder", type=path_flag, help="exported model folder")
    arguments.add_argument("--to", required=True, metavar="NAME", help="owner/name[@branch]; the model is made if it does not exist")
    arguments.add_argument("--license", required=True, metavar="ID", help="licence of the weights: an identifier of the hub, or other")
    arguments.add_argument("--license-name", metavar="NAME", help="name of the licence, with --license other")
    arguments.add_argument("--license-link", metavar="URL", help="its text, with --license other")
    arguments.add_argument("--message", default="Upload weights", help="message of the commit (default: %(default)s)")
    arguments.add_argument("--private", action="store_true", help="a model that is made now is visible to its owner alone")
    return arguments


def main(argv: Sequence[str] | None = None, prog: str = "megatron-bagel convert push") -> int:
    """Upload the folder. Returns the exit status."""
    args = parser(prog).parse_args(argv)

    def work() -> None:
        from megatron_bagel.checkpoint.hf.hub_push import Licence, push

        name = parse_hub_name(args.to)
        if name is None:
            raise ValueError(f"--to {args.to}: write owner/name, or owner/name@branch")
        licence = Licence(args.license, args.license_name, args.license_link)
        print(push(args.folder, name, licence, args.message, args.private))

    return command.run(prog, work)
