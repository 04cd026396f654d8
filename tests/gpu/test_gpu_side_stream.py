# SPDX-License-Identifier: Apache-2.0
"""The second stream of a GPU: its work waits for nothing queued later, its tensors arrive whole, and the host never waits."""

from __future__ import annotations

import torch

from megatron_bagel.data.loading.pack_reader import PackReader
from megatron_bagel.encoders.autoencoder import AutoEncoder
from megatron_bagel.encoders.image_encoding import ImageEncoder, ImageEncoderSettings
from megatron_bagel.platform.device import to_device
from megatron_bagel.platform.side_stream import SideStream, apart
from tests.data.loading.test_encoder_assignment import plans
from tests.data.loading.test_loader import SPEC, Pictures
from tests.encoders.test_sharded_image_encoding import ARCH

CYCLES = 200_000_000  # of a kernel that only waits: about a tenth of a second


def test_side_work_reads_what_was_written_and_is_read_when_it_is_done() -> None:
    side, written = SideStream("cuda"), torch.zeros(1 << 20, device="cuda")
    torch.cuda._sleep(CYCLES)
    written += 1

    def work() -> list[torch.Tensor]:
        torch.cuda._sleep(CYCLES)
        return [written * 2]

    for _ in range(3):  # the memory of one round must not be given to the next while it is read
        (result,) = side.queue(work)()
        torch.cuda._sleep(CYCLES // 4)
        total = result.sum()
        del result
        (other,) = side.queue(lambda: [torch.full((1 << 20,), 7.0, device="cuda")])()
        assert total.item() == 2 * (1 << 20) and other.sum().item() == 7 * (1 << 20)


def test_numbers_of_the_host_wait_for_nothing_else() -> None:
    device = torch.device("cuda", 0)
    with apart(device):  # makes the stream and its memory
        to_device(torch.ones(2), device).mul(2).tolist()
    torch.cuda._sleep(5 * CYCLES)  # the update of the step before
    update = torch.cuda.current_stream().record_event()
    with apart(device):
        assert to_device(torch.tensor([1.5, -2.0]), device).mul(2).tolist() == [3.0, -4.0]
    assert not update.query()


def test_early_latents_are_those_of_the_step_and_cost_no_wait() -> None:
    """torch raises where the host would wait for the device."""
    torch.manual_seed(0)
    autoencoder = AutoEncoder(ARCH.autoencoder).requires_grad_(False).cuda()
    encoder = ImageEncoder(ARCH, None, autoencoder, ImageEncoderSettings(seed=3, device="cuda"))
    packs = [PackReader([Pictures()], SPEC, seed=9)[plan] for plan in plans(Pictures())]
    expected = encoder.encode(packs)  # copies mean and deviation once
    torch.cuda.set_sync_debug_mode("error")
    try:
        encoder.encode_ahead(packs)
        torch.cuda._sleep(CYCLES)  # this step's schedule
        early = encoder.encode(packs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for ours, theirs in zip(early, expected, strict=True):
        torch.testing.assert_close(ours.latents, theirs.latents, atol=1e-5, rtol=1e-5)
        assert torch.equal(ours.noise, theirs.noise) and torch.equal(ours.timesteps, theirs.timesteps)
