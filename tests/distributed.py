# SPDX-License-Identifier: Apache-2.0
"""Runs a test function on several real ranks, forked after Megatron-Core is imported, so that a 2-8 rank case costs seconds."""

from __future__ import annotations

import gc
import multiprocessing
import os
import queue
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megatron_bagel import platform
from megatron_bagel.platform.launch.process_group import init_distributed, shutdown_distributed


def run_ranks(
    function: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout: float = 270.0,
    parallel: dict[str, Any] | None = None,
    seed: int | None = 1234,
) -> list[Any]:
    """Call ``function(*args)`` on ``world_size`` forked ranks of one gloo group; returns their results in rank order.

    ``parallel`` holds arguments of Megatron-Core's ``initialize_model_parallel`` (an empty dict for its defaults); with None
    the function sets up groups itself. ``seed`` then seeds Megatron-Core's random states. ``timeout`` is in seconds, for all
    ranks together. Results travel by pickle: return numpy arrays or plain values, or tensors that are detached.
    Raises AssertionError with the traceback of the rank that failed first, or naming the ranks that did not answer.
    """
    if torch.distributed.is_initialized():
        raise RuntimeError("this process is in a process group already (single_rank, or a test that left one); ranks cannot fork")
    platform.install()
    context = multiprocessing.get_context("fork")
    answers: Any = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        job = (function, args, parallel, seed, timeout)
        ranks = [context.Process(target=_rank_main, args=(rank, world_size, store, answers, job)) for rank in range(world_size)]
        # What the parent has buffered would be printed once more by every rank.
        sys.stdout.flush()
        sys.stderr.flush()
        _forget_dead_groups()
        for process in ranks:
            process.start()
        try:
            return _collect(ranks, answers, time.monotonic() + timeout)
        finally:
            for process in ranks:
                process.join(0 if sys.exc_info()[0] else 10)
                if process.is_alive():
                    process.kill()
                    process.join()
            answers.close()


def fork(target: Callable[..., Any], *args: Any) -> Any:
    """A started process that runs ``target(*args)``: for programs that are killed, or that set up their own group."""
    _forget_dead_groups()
    process = multiprocessing.get_context("fork").Process(target=target, args=args)
    process.start()
    return process


def _forget_dead_groups() -> None:
    """Collect process groups of earlier tests (optimizers hold them in cycles) before a fork.

    Collected in the forked process, where their threads do not exist, they would crash it. What is left after the collection is
    frozen for the same reason.
    """
    if multiprocessing.parent_process() is None:
        gc.collect()
    gc.freeze()


def _collect(ranks: list[Any], answers: Any, deadline: float) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(ranks):
        try:
            rank, ok, content = answers.get(timeout=0.2)
        except queue.Empty:
            silent = [rank for rank in range(len(ranks)) if rank not in results]
            dead = [rank for rank in silent if ranks[rank].exitcode is not None]
            if dead and answers.empty():
                codes = ", ".join(f"rank {rank} with exit code {ranks[rank].exitcode}" for rank in dead)
                raise AssertionError(f"ended without an answer: {codes}") from None
            if time.monotonic() > deadline:
                raise AssertionError(f"no answer in time from rank {', '.join(map(str, silent))} of {len(ranks)}") from None
            continue
        if not ok:
            raise AssertionError(f"rank {rank} of {len(ranks)} failed:\n{content}")
        results[rank] = content
    return [results[rank] for rank in range(len(ranks))]


def _rank_main(rank: int, world_size: int, store: str, answers: Any, job: tuple) -> None:
    function, args, parallel, seed, timeout = job
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    try:
        torch.set_num_threads(1)
        platform.enter_thread()
        # Longer than the parent waits, so that it is the parent who tells which rank is silent.
        init_distributed(timeout / 60 + 1, f"file://{store}", rank, world_size)
        if parallel is not None:
            _initialize_model_parallel(parallel, seed)
        answers.put((rank, True, _portable(function(*args))))
        # Ranks leave together, or the first one out tears the connections of the others' last collective.
        torch.distributed.barrier()
        shutdown_distributed()
    except BaseException:
        answers.put((rank, False, traceback.format_exc()))
    finally:
        answers.close()
        answers.join_thread()
        sys.stdout.flush()
        sys.stderr.flush()
        # Not sys.exit: pytest's exit handlers belong to the parent.
        os._exit(0)


def _initialize_model_parallel(parallel: dict[str, Any], seed: int | None) -> None:
    from megatron.core import parallel_state, tensor_parallel

    parallel_state.initialize_model_parallel(**parallel)
    if seed is not None:
        tensor_parallel.model_parallel_cuda_manual_seed(seed)


def _portable(value: Any) -> Any:
    """Tensors as numpy arrays inside: torch would pass them through shared memory of a process that is about to end."""
    if isinstance(value, torch.Tensor):
        return _Tensor(value.detach().cpu().clone())
    if isinstance(value, dict):
        return {key: _portable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_portable(item) for item in value)
    return value


class _Tensor:
    """A tensor that pickles its bytes and comes out of the queue as a tensor again."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def __reduce__(self) -> tuple:
        flat = self.tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes() if self.tensor.numel() else b""
        return _restore, (flat, self.tensor.dtype, tuple(self.tensor.shape))


def _restore(flat: bytes, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    if not flat:
        return torch.zeros(shape, dtype=dtype)
    return torch.frombuffer(bytearray(flat), dtype=dtype).view(shape)
