# SPDX-License-Identifier: Apache-2.0
"""Ranks forked by tests/distributed.py: results in order, errors of any rank in the parent, nothing left running."""

from __future__ import annotations

import multiprocessing
import os
import socket

import pytest
import torch
import torch.distributed as dist

from megatron_bagel import platform
from megatron_bagel.platform.device import check_processes
from megatron_bagel.platform.launch.process_group import init_distributed, launched_world_size, reserved_port
from tests.distributed import run_ranks

pytestmark = pytest.mark.distributed


def _rank_and_sum(add: int) -> tuple[int, torch.Tensor]:
    value = torch.tensor([dist.get_rank() + add], device="cuda")
    dist.all_reduce(value)
    return dist.get_rank(), value


def test_results_come_back_in_rank_order():
    results = run_ranks(_rank_and_sum, 3, 10)
    assert [rank for rank, _ in results] == [0, 1, 2]
    assert all(torch.equal(total, torch.tensor([33])) for _, total in results)


def _backward() -> torch.Tensor:
    weight = torch.ones(3, requires_grad=True)
    (weight * 2).sum().backward()
    return weight.grad


def test_ranks_fork_after_the_parent_ran_a_backward_pass():
    expected = _backward()
    for gradient in run_ranks(_backward, 2):
        assert torch.equal(gradient, expected)


def _megatron_groups() -> tuple[int, int, float]:
    from megatron.core import parallel_state, tensor_parallel

    with tensor_parallel.get_cuda_rng_tracker().fork():
        drawn = torch.rand(1).item()
    return parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_data_parallel_world_size(), drawn


def test_megatron_groups_and_random_states():
    results = run_ranks(_megatron_groups, 4, parallel={"tensor_model_parallel_size": 2})
    assert [result[:2] for result in results] == [(0, 2), (1, 2), (0, 2), (1, 2)]
    draws = [result[2] for result in results]
    # Tensor parallel ranks draw apart, data parallel replicas alike.
    assert draws[0] == draws[2] and draws[1] == draws[3] and draws[0] != draws[1]


def _fail_on_last() -> None:
    if dist.get_rank() == dist.get_world_size() - 1:
        raise ValueError("the last rank has no such file")
    dist.barrier()


def test_error_of_one_rank_is_raised_with_its_traceback():
    with pytest.raises(AssertionError, match=r"(?s)rank 1 of 2 failed:.*_fail_on_last.*the last rank has no such file"):
        run_ranks(_fail_on_last, 2)
    assert not multiprocessing.active_children()


def _die() -> None:
    if dist.get_rank() == 0:
        os._exit(7)
    dist.barrier()


def test_death_of_a_rank_is_reported():
    with pytest.raises(AssertionError, match=r"rank 0 with exit code 7|rank 1 of 2 failed"):
        run_ranks(_die, 2)
    assert not multiprocessing.active_children()


def _wait() -> None:
    if dist.get_rank() == 0:
        import time

        time.sleep(60)


def test_ranks_that_hang_are_named_and_ended():
    with pytest.raises(AssertionError, match=r"no answer in time from rank 0 of 2"):
        run_ranks(_wait, 2, timeout=10)
    assert not multiprocessing.active_children()


def test_a_world_of_one_needs_no_launcher(single_rank):
    assert dist.get_world_size() == 1 and launched_world_size() == 1
    with pytest.raises(RuntimeError, match="process group already"):
        run_ranks(_wait, 2)


def test_half_a_launcher_environment_is_refused(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ValueError, match="has RANK but not WORLD_SIZE, MASTER_ADDR, MASTER_PORT"):
        init_distributed()


def test_processes_that_would_share_a_gpu_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    check_processes()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="--nproc_per_node 1"):
        check_processes()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    check_processes()


def test_attention_on_a_gpu_needs_no_plan_for_each_shape(monkeypatch):
    allowed = []
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", allowed.append)
    monkeypatch.setattr(platform, "has_gpu", lambda: True)
    platform.install()
    assert allowed == [False]


def test_a_reserved_port_is_given_to_nobody_else_and_its_store_can_listen() -> None:
    with reserved_port() as port:
        others = [socket.socket() for _ in range(200)]
        try:
            for other in others:
                other.bind(("", 0))
            assert port not in {other.getsockname()[1] for other in others}
        finally:
            for other in others:
                other.close()
        store = dist.TCPStore("127.0.0.1", port, 1, is_master=True)
        store.set("key", "value")
        assert dist.TCPStore("127.0.0.1", port, is_master=False).get("key") == b"value"
