# SPDX-License-Identifier: Apache-2.0
"""Training: ``torchrun --nproc_per_node N -m megatron_bagel.train --config FILE [flags]``, or without torchrun on one process.

PyTorch is imported after the command line has been read, and Megatron-Core after the settings have been checked. So ``--help``,
``--print_config`` and errors do not wait for either.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from megatron_bagel.cli.hub_models import names_on_hub, with_hub_folders
from megatron_bagel.cli.usage import short_name
from megatron_bagel.config.package_rules import check_layer_packages, check_packages
from megatron_bagel.config.parser import Config, parse_with
from megatron_bagel.config.plan_arguments import PrintArguments
from megatron_bagel.config.resolved_yaml import resolved_yaml
from megatron_bagel.config.validate import validate, validate_settings

if TYPE_CHECKING:
    import torch.distributed as dist

    from megatron_bagel.config.architecture import BagelArch


#: Seconds that rank 0 has for its error before other ranks print theirs.
HEAD_START = 5.0


def main(arguments: Sequence[str] | None = None, prog: str = "python -m megatron_bagel.train") -> int:
    """Parse the command line, check everything that needs no other rank, then train. Returns the exit status."""
    try:
        config, options = parse_with(PrintArguments, sys.argv[1:] if arguments is None else arguments, prog)
        if options.print_config:
            return print_config(config)
        if config.megatron.dry_run:
            return report_dry_run(config)
        arch = prepare(config)
    except ValueError as error:
        return refuse(error, prog)
    restarts = config.resilience.inprocess_restarts
    if not restarts:
        attempt(config, arch, prog)
        return 0
    from megatron_bagel.platform.launch.inprocess_restart import restart_in_process

    try:
        restart_in_process(lambda store: attempt(config, arch, prog, store), restarts, longest_wait(config), short_name(prog))
    except ValueError as error:
        return refuse(error, prog)
    return 0


def refuse(error: ValueError, prog: str) -> int:
    """Print why the run cannot start: at once on rank 0, on others only if nothing ended them before. Returns the exit code."""
    rank = int(os.environ.get("RANK", "0"))
    if rank:
        # Most often all ranks meet the same error. Rank 0 prints it and exits, and the launcher ends the others before they print.
        is_first_of_host = os.environ.get("LOCAL_RANK", "0") == "0"
        time.sleep(HEAD_START if is_first_of_host else 2 * HEAD_START)
    where = f"on rank {rank} ({socket.gethostname()}): " if rank else ""
    print(f"{short_name(prog)}: error: {where}{error}", file=sys.stderr)
    return 2


def prepare(config: Config) -> BagelArch | None:
    """Check settings and machine, prepare the import of Megatron-Core, and return the model that the settings describe.

    Returns:
        The model; None if the settings name models on a hub, which are downloaded once the ranks have met.

    Raises:
        ValueError: for settings that cannot work here.
    """
    from megatron_bagel import platform
    from megatron_bagel.platform.device import check_processes
    from megatron_bagel.platform.launch.process_group import launched_world_size

    world_size, has_gpu = launched_world_size(), platform.has_gpu()
    arch = None
    if names_on_hub(config):
        validate_settings(config, world_size, has_gpu)
    else:
        arch = validate(config, world_size, has_gpu)
    check_packages(config)
    check_processes()
    platform.install()
    return arch


def attempt(config: Config, arch: BagelArch | None, prog: str, store: dist.Store | None = None) -> None:
    """Run training from its starting point to its end. The process group is made here and destroyed here.

    Args:
        config: Settings of the run, which have passed ``validate``.
        arch: The model that ``validate`` read; None if it is on a hub.
        prog: The command as it was started.
        store: Store in which the ranks meet. None uses the launcher's rendezvous.

    Raises:
        SystemExit: after an error.
    """
    import torch.distributed as dist

    from megatron_bagel import platform
    from megatron_bagel.platform.launch.child_processes import end_forks_with_this_process
    from megatron_bagel.platform.launch.process_group import init_distributed, shutdown_distributed

    # Not earlier: a process that nvidia-resiliency-ext forks to watch this one must outlive it.
    end_forks_with_this_process()
    # Megatron-Core is imported only now: the platform must be in place first.
    from megatron_bagel.cli.resolve_run import resolve_run
    from megatron_bagel.training.resilience.error_report import ErrorReport
    from megatron_bagel.training.setup import set_up as setup

    init_distributed(longest_wait(config), store=store)
    try:
        with ErrorReport(config.training.results_dir, short_name(prog)):
            world_size, has_gpu = dist.get_world_size(), platform.has_gpu()
            if arch is None:
                config = with_hub_folders(config)
                arch = validate(config, world_size, has_gpu)
            setup.execute(resolve_run(config, arch, world_size, has_gpu, short_name(prog)))
    finally:
        shutdown_distributed()


def longest_wait(config: Config) -> float:
    """Return the minutes that a collective may take before the first step is done."""
    return max(config.megatron.distributed_timeout_minutes, config.resilience.first_step_timeout_minutes)


def print_config(config: Config) -> int:
    """Print the resolved configuration on rank 0 (``--print_config``). Returns the exit status. Raises ValueError like a run."""
    from megatron_bagel import platform
    from megatron_bagel.platform.launch.process_group import launched_rank, launched_world_size

    world_size, has_gpu = launched_world_size(), platform.has_gpu()
    if config.megatron.dry_run:
        world_size, has_gpu = config.megatron.fake_world_size or world_size, True
    text = resolved_yaml(config, world_size, has_gpu)
    if launched_rank() == 0:
        print(text, end="")
    return 0


def report_dry_run(config: Config) -> int:
    """Print what one rank of a GPU run would build (``--dry_run``). Returns the exit status. Raises ValueError like a run."""
    from megatron_bagel import platform
    from megatron_bagel.platform.launch.process_group import launched_world_size

    world_size = config.megatron.fake_world_size or launched_world_size()
    config = with_hub_folders(config)
    arch = validate(config, world_size, has_gpu=True)
    check_layer_packages(config.megatron)
    platform.install()
    from megatron_bagel.cli.resolve_run import resolve_run
    from megatron_bagel.planning.dry_run import dry_run

    print(dry_run(resolve_run(config, arch, world_size, has_gpu=True), config.megatron.fake_rank).text())
    return 0
