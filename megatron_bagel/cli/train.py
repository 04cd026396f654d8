"""Train BAGEL: ``torchrun --nproc_per_node N -m megatron_bagel.train --config FILE [flags]``, or without torchrun on one process."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch.distributed as dist

from megatron_bagel import platform
from megatron_bagel.cli.usage import short_name
from megatron_bagel.config.architecture import BagelArch
from megatron_bagel.config.parser import Config, parse_config
from megatron_bagel.config.validate import validate
from megatron_bagel.platform.device import check_processes
from megatron_bagel.platform.launch.child_processes import end_forks_with_this_process
from megatron_bagel.platform.launch.inprocess_restart import restart_in_process
from megatron_bagel.platform.launch.process_group import init_distributed, launched_world_size, shutdown_distributed


def main(arguments: Sequence[str] | None = None, prog: str = "python -m megatron_bagel.train") -> int:
    """Parse, check everything that needs no other rank, then train. Returns the process's exit code."""
    try:
        config = parse_config(sys.argv[1:] if arguments is None else arguments, prog)
        if config.megatron.dry_run:
            return rehearse(config)
        arch = validate(config, launched_world_size(), platform.has_gpu())
        check_processes()
    except ValueError as error:
        print(f"{short_name(prog)}: error: {error}", file=sys.stderr)
        return 2
    platform.install()
    restarts = config.resilience.inprocess_restarts
    if not restarts:
        attempt(config, arch)
        return 0
    try:
        restart_in_process(lambda store: attempt(config, arch, store), restarts, longest_wait(config))
    except ValueError as error:
        print(f"{short_name(prog)}: error: {error}", file=sys.stderr)
        return 2
    return 0


def attempt(config: Config, arch: BagelArch, store: dist.Store | None = None) -> None:
    """One run from where it stands to its end, from no process group to none. An error becomes SystemExit.

    ``arch`` is the model that ``validate`` read. ``store`` is where the ranks meet, if the launcher's rendezvous is not to be used.
    """
    # Not before: a process that nvidia-resiliency-ext forks to watch this one must outlive it.
    end_forks_with_this_process()
    # Megatron-Core is imported only now: the platform must be in place first.
    from megatron_bagel.cli.resolve_run import resolve_run
    from megatron_bagel.training.resilience.error_report import ErrorReport
    from megatron_bagel.training.setup import set_up as setup

    init_distributed(longest_wait(config), store=store)
    try:
        with ErrorReport(config.training.results_dir):
            setup.execute(resolve_run(config, arch, dist.get_world_size(), platform.has_gpu()))
    finally:
        shutdown_distributed()


def longest_wait(config: Config) -> float:
    """Minutes that a collective may take before the first step is done."""
    return max(config.megatron.distributed_timeout_minutes, config.resilience.first_step_timeout_minutes)


def rehearse(config: Config) -> int:
    """``--dry-run``: one rank's share, without memory. Raises ValueError like a run. Its answers are those for GPUs."""
    world_size = config.megatron.fake_world_size or launched_world_size()
    arch = validate(config, world_size, has_gpu=True)
    platform.install()
    from megatron_bagel.cli.resolve_run import resolve_run
    from megatron_bagel.planning.dry_run import dry_run

    print(dry_run(resolve_run(config, arch, world_size, has_gpu=True), config.megatron.fake_rank).text())
    return 0
