# SPDX-License-Identifier: Apache-2.0
"""The CPU stand-ins: "cuda" is read as "cpu" in every thread that entered, and random states replay."""

from __future__ import annotations

import threading

import pytest
import torch

from megatron_bagel import platform

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the stand-ins are for machines without a GPU")


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.zeros(2, device="cuda"),
        lambda: torch.zeros(2, device=torch.device("cuda", 0)),
        lambda: torch.zeros(2).cuda(),
        lambda: torch.zeros(2).to("cuda"),
        lambda: torch.zeros(2).to(device="cuda:0", dtype=torch.float64),
        lambda: torch.zeros(2, device=torch.cuda.current_device()),
        lambda: torch.empty(2, device="cuda", pin_memory=True),
        lambda: torch.nn.Linear(2, 2).cuda().weight,
    ],
)
def test_cuda_means_cpu(make):
    assert make().device == torch.device("cpu")


def test_a_second_install_changes_nothing():
    before = (torch.cuda.current_device, torch.cuda.Stream, torch.overrides._len_torch_function_stack())
    platform.install()
    assert before == (torch.cuda.current_device, torch.cuda.Stream, torch.overrides._len_torch_function_stack())


def test_a_thread_enters_for_itself():
    seen = []

    def work() -> None:
        platform.enter_thread()
        platform.enter_thread()
        seen.append(torch.zeros(1, device="cuda").device.type)
        seen.append(torch.overrides._len_torch_function_stack())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == ["cpu", 1]


def test_streams_and_events_take_the_calls_megatron_makes():
    stream, event = torch.cuda.Stream(), torch.cuda.Event(enable_timing=True)
    with torch.cuda.stream(stream):
        event.record(stream)
    stream.wait_event(event)
    torch.cuda.current_stream().wait_stream(stream)
    later = stream.record_event()
    torch.cuda.synchronize()
    assert event.query() and later.query() and event.elapsed_time(event) == 0.0


def test_random_state_replays_under_megatrons_recompute(single_rank):
    from megatron.core import tensor_parallel

    torch.manual_seed(5)
    x = torch.ones(64, requires_grad=True)
    kept = []

    def noisy(value: torch.Tensor) -> torch.Tensor:
        mask = torch.nn.functional.dropout(torch.ones_like(value), 0.5)
        kept.append(mask)
        return value * mask

    tensor_parallel.checkpoint(noisy, False, x).sum().backward()
    assert len(kept) == 2 and torch.equal(kept[0], kept[1])
    assert torch.equal(x.grad, kept[0])


def test_device_answers():
    assert platform.device() == torch.device("cpu") and platform.backend() == "gloo" and not platform.has_gpu()


def test_peak_memory_counts_bytes():
    before = platform.peak_memory_bytes()
    block = torch.ones(max(before, 1) // 4 + 16_000_000)
    assert platform.peak_memory_bytes() >= block.numel() * 4 > 64_000_000


def test_clipping_scales_in_place(single_rank):
    from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32

    parameter = torch.nn.Parameter(torch.zeros(3))
    parameter.grad = torch.tensor([3.0, 0.0, 4.0])
    address = parameter.grad.data_ptr()
    clip_grad_by_total_norm_fp32([parameter], 1.0, 5.0)
    torch.testing.assert_close(parameter.grad, torch.tensor([0.6, 0.0, 0.8]))
    assert parameter.grad.data_ptr() == address
