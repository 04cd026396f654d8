"""Plan a run before it has a machine: ``python -m megatron_bagel.plan --model bagel-7b-mot --gpus 64 [flags of training]``."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from megatron_bagel.cli.usage import short_name
from megatron_bagel.config.flag import check_values
from megatron_bagel.config.parser import parse_with
from megatron_bagel.config.plan_arguments import PlanArguments
from megatron_bagel.config.resolved_yaml import resolved_yaml


def main(arguments: Sequence[str] | None = None, prog: str = "python -m megatron_bagel.plan") -> int:
    """Check the settings, then print the plan or the best layouts. Returns the process's exit code."""
    try:
        config, wanted = parse_with(PlanArguments, sys.argv[1:] if arguments is None else arguments, prog)
        if wanted.print_config:
            check_values(wanted)
            print(resolved_yaml(config, wanted.gpus, has_gpu=True), end="")
            return 0
        # Training's accounting is imported late: its packages take seconds, and --help needs none of them.
        from megatron_bagel.cli.resolve_plan import resolve_plan
        from megatron_bagel.planning.command import answer
        from megatron_bagel.planning.report import tables_of_names

        print(tables_of_names() if wanted.list_models else answer(resolve_plan(config, wanted), wanted))
    except ValueError as error:
        print(f"{short_name(prog)}: error: {error}", file=sys.stderr)
        return 2
    return 0
