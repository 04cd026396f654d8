# SPDX-License-Identifier: Apache-2.0
"""The plan of a run that has no machine yet: ``python -m megatron_bagel.plan --model bagel-7b-mot --gpus 64 [flags of training]``."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace

from megatron_bagel.cli.hub_models import needs, with_hub_folders, with_local_folders
from megatron_bagel.cli.usage import short_name
from megatron_bagel.common.writable import check_writable_file
from megatron_bagel.config.flag import check_values
from megatron_bagel.config.parser import parse_with
from megatron_bagel.config.plan_arguments import PlanArguments
from megatron_bagel.config.resolved_yaml import resolved_yaml


def main(arguments: Sequence[str] | None = None, prog: str = "python -m megatron_bagel.plan") -> int:
    """Check the settings, then print the plan or the best parallel plans. Returns the exit status."""
    try:
        config, options = parse_with(PlanArguments, sys.argv[1:] if arguments is None else arguments, prog)
        if options.print_config:
            check_values(options)
            print(resolved_yaml(config, options.gpus, has_gpu=True), end="")
            return 0
        if options.png is not None:
            check_writable_file(options.png, "--png")
        # Training's accounting is imported late: its packages take seconds, and --help needs none of them.
        from megatron_bagel.cli.resolve_plan import resolve_plan
        from megatron_bagel.planning.command import answer
        from megatron_bagel.planning.report import tables_of_names

        if options.list_models:
            print(tables_of_names())
            return 0
        config, options = with_hub_folders(config, weights=False), with_hub_model(options)
        print(answer(resolve_plan(config, options), options))
    except (ValueError, OSError) as error:
        print(f"{short_name(prog)}: error: {error}", file=sys.stderr)
        return 2
    return 0


def with_hub_model(options: PlanArguments) -> PlanArguments:
    """Return the plan's flags with a folder in place of a model on a hub. Configs alone are downloaded: a plan reads no weights."""
    args, _ = with_local_folders(Namespace(model=options.model), {"model": needs("--model")})
    return options if args.model is None else replace(options, model=str(args.model))
