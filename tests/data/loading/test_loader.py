# SPDX-License-Identifier: Apache-2.0
"""The loader: workers change nothing, replicas share one global order, the saved position is that of what was handed out."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from megatron_bagel.config.batch_size import BatchSizes
from megatron_bagel.data.keyed_random import keyed_generator, keyed_integers
from megatron_bagel.data.loading.loaded_pack import LoadedPack
from megatron_bagel.data.loading.loader import PackLoader, StepBatch
from megatron_bagel.data.loading.noise import flow_noise, posterior_noise, raw_timesteps
from megatron_bagel.data.loading.pack_reader import PackReader
from megatron_bagel.data.loading.planned_steps import LARGE_BATCH
from megatron_bagel.data.planner.assign import PackPlan, assign_packs
from megatron_bagel.data.planner.cost_model import CostModel, Measures
from megatron_bagel.data.planner.mix import SourceRule
from megatron_bagel.data.planner.planner import Planner, PlannerConfig
from megatron_bagel.data.planner.stream import NoSampleLeft
from megatron_bagel.layout.items import Item, Sample
from megatron_bagel.layout.pack import LayoutSpec, PackImage, build_pack
from megatron_bagel.platform.launch.signals import StopRequest
from tests.data.planner.measured_sample import measure_sample

SPEC = LayoutSpec(bos=1, eos=2, start_of_image=3, end_of_image=4, vit_max_side=8, max_latent_size=8)


@dataclass
class Pictures:
    """Editing-like samples: a clean condition twice (VAE and ViT), a text, a noised target; pixels are keyed noise."""

    name: str = "unified_edit"
    size: int = 11
    weight: float = 1.0
    is_mandatory: bool = False
    keep_position: bool = True
    broken: int = -1

    def __len__(self) -> int:
        return self.size

    def siblings(self, index: int) -> range:
        return range(self.size)

    def sample(self, index: int, epoch: int) -> Sample:
        length = int(keyed_integers(9, 5, self.name, index, epoch))
        dropped = bool(keyed_integers(2, 6, self.name, index, epoch))
        items = (
            Item("vae", image=0, height=32, width=16 + 16 * (index % 2), dropped=dropped),
            Item("vit", image=0, height=28, width=28),
            Item("text", ids=np.arange(5, 5 + length)),
            Item("vae", loss=True, image=1, height=32, width=32),
        )
        return Sample(f"{self.name}/pictures", index, epoch, items, self.name)

    def measure(self, indexes: np.ndarray, epoch: int) -> Measures:
        rows = [measure_sample(self.sample(int(index), epoch), SPEC, CostModel()) for index in indexes]
        return Measures(*np.array(rows, dtype=np.int64).reshape(-1, 3).T)

    def pixels(self, index: int, image: PackImage) -> torch.Tensor:
        if index == self.broken:
            raise ValueError("the image cannot be decoded (truncated)")
        return torch.from_numpy(keyed_generator(0, index, image.kind, image.image).random((3, image.height, image.width), np.float32))

    def describe(self, index: int) -> str:
        return f"{self.name}/pictures, 0000.parquet row {index}"


def loader(
    replica: int = 0, replicas: int = 1, workers: int = 0, rampup: tuple[int, ...] = (), large_batch: int = LARGE_BATCH, limit: int = 60,
    rules: dict[str, SourceRule] | None = None, **source,
) -> PackLoader:  # fmt: skip
    planner = Planner([Pictures(**source)], PlannerConfig(90, 70, limit, 5, seed=1, global_batch_size=4, mix=rules or {}))
    reader = PackReader([Pictures(**source)], SPEC, seed=9)
    return PackLoader(planner, reader, replica, replicas, workers, sizes=BatchSizes.of(4, rampup), large_batch=large_batch)


def same(one: LoadedPack, other: LoadedPack) -> bool:
    return (
        one.plan == other.plan
        and torch.equal(one.vit_patches, other.vit_patches)
        and torch.equal(one.vae_buffer, other.vae_buffer)
        and np.array_equal(one.raw_timesteps, other.raw_timesteps)
        and np.array_equal(one.pack.position_ids, other.pack.position_ids)
    )


def plans(batch: StepBatch) -> list[PackPlan]:
    return [pack.plan for pack in batch.packs]


def share(plans: list[PackPlan], replica: int, replicas: int) -> list[PackPlan]:
    return assign_packs(plans, replicas)[replica]


@pytest.mark.parametrize("large_batch", [4, 5])
def test_workers_change_nothing(large_batch: int) -> None:
    """Nor does a process that plans, which a batch of ``large_batch`` packs gets."""
    alone, two = loader(), loader(workers=2, large_batch=large_batch)
    for _ in range(4):
        expected, got = next(alone), next(two)
        assert expected.totals == got.totals and alone.state_dict() == two.state_dict()
        assert all(same(a, b) for a, b in zip(expected.packs, got.packs, strict=True))
    assert (two.planner.packs_made == 0) == (large_batch == 4)
    two.close()


def test_a_planning_process_reports_what_it_skips_and_why_it_fails() -> None:
    """Samples of more than 23 tokens are skipped; one epoch of 11 samples makes few packs."""
    here, aside = loader(limit=23), loader(workers=1, large_batch=1, limit=23)
    for _ in range(3):
        next(here), next(aside)
    shared = min(len(aside.skipped()), len(here.skipped()))  # the process plans further ahead
    assert shared and aside.skipped()[:shared] == here.skipped()[:shared] and not aside.planner.skipped()
    aside.close()
    ends = []
    for workers, large_batch in ((0, 5), (2, 5), (1, 1)):  # plans run ahead of training, and the end comes when it is due
        short = loader(workers=workers, large_batch=large_batch, rules={"unified_edit": SourceRule(((0, 1.0),), 4)})
        with pytest.raises(NoSampleLeft, match="no sample is left to draw"):
            ends.append(0)
            while ends[-1] < 100:
                next(short)
                ends[-1] += 1
    assert ends[0] > 0 and len(set(ends)) == 1


def test_replicas_share_one_global_order() -> None:
    whole = loader()
    hands = [loader(replica, 2) for replica in range(2)]
    for _ in range(3):
        expected = next(whole)
        shares = [next(hand) for hand in hands]
        assert all(share.totals == expected.totals for share in shares)
        packs = sorted((pack for share in shares for pack in share.packs), key=lambda pack: pack.plan.number)
        assert all(same(a, b) for a, b in zip(expected.packs, packs, strict=True))


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_that_grow_are_slices_of_the_same_sequence(workers: int) -> None:
    """Also after a resume in the middle of the ramp, on another number of replicas."""
    ramp = (2, 2, 6)
    flat, whole, first, again = loader(), loader(rampup=ramp), loader(0, 2, workers, ramp), loader(1, 2, rampup=ramp)
    sequence = [plan for _ in range(4) for plan in plans(next(flat))]
    steps = [plans(next(whole)) for _ in range(5)]
    assert [len(step) for step in steps] == [2, 2, 2, 4, 4]
    assert [plan for step in steps for plan in step] == sequence[: sum(map(len, steps))]
    assert [plans(next(first)) for _ in range(2)] == [share(step, 0, 2) for step in steps[:2]]
    again.load_state_dict(first.state_dict())
    assert [plans(next(again)) for _ in range(3)] == [share(step, 1, 2) for step in steps[2:]]
    first.close()


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_continues_on_other_sizes(workers: int) -> None:
    whole = loader()
    expected = [next(whole) for _ in range(4)]
    first = loader(0, 2, workers)
    for _ in range(2):
        next(first)
    state = first.state_dict()
    again = loader(0, 4)
    again.load_state_dict(state)
    assert [plans(next(again)) for _ in range(2)] == [share(plans(step), 0, 4) for step in expected[2:]]
    assert plans(next(first)) == share(plans(expected[2]), 0, 2)  # saving disturbed nothing
    first.close()
    assert plans(next(first)) == share(plans(expected[3]), 0, 2)  # nor does stopping the workers
    first.close()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_batch_read_ahead_is_not_handed_out(workers: int) -> None:
    """The saved position stays in front of it, its size is that of its place in a growing batch, and it is read once."""
    ramp = (2, 2, 6)
    plain, early = loader(rampup=ramp), loader(workers=workers, rampup=ramp)
    for _ in range(4):
        early.read_ahead()
        early.read_ahead()
        assert early.state_dict() == plain.state_dict()
        upcoming, expected = early.upcoming, next(plain)
        assert upcoming is not None and next(early) is upcoming and early.upcoming is None
        assert upcoming.totals == expected.totals and all(same(a, b) for a, b in zip(upcoming.packs, expected.packs, strict=True))
    early.read_ahead()
    again = loader(rampup=ramp)
    again.load_state_dict(early.state_dict())
    expected = plans(next(plain))
    assert plans(next(again)) == plans(next(early)) == expected
    early.read_ahead()
    early.load_state_dict(early.state_dict())  # what was read ahead is discarded, like what workers have read
    assert early.upcoming is None and plans(next(early)) == plans(next(plain))
    early.close()


@pytest.mark.parametrize("workers", [0, 2])
def test_the_end_comes_when_it_is_due(workers: int) -> None:
    """The batches before it are handed out first, and reading ahead raises nothing."""
    rules = {"unified_edit": SourceRule(((0, 1.0),), 4)}
    plain, early, counts = loader(rules=rules), loader(workers=workers, rules=rules), []
    for batches in (plain, early):
        counts.append(0)
        with pytest.raises(NoSampleLeft):
            while True:
                next(batches)
                counts[-1] += 1
                if batches is early:
                    state = early.state_dict()
                    early.read_ahead()
                    assert early.state_dict() == state
    assert counts[0] == counts[1] > 0 and early.state_dict() == plain.state_dict()


def test_nothing_is_read_ahead_after_a_stop_signal() -> None:
    stopped, request = loader(), StopRequest()
    stopped.give_up_after(request)
    request.number = 15
    stopped.read_ahead()
    assert stopped.upcoming is None and len(next(stopped).packs) == 4


def test_pixels_lie_in_sequence_order() -> None:
    loaded = next(loader()).packs[0]
    pack = loaded.pack
    assert loaded.vit_patches.shape == (len(pack.vit_positions), 3 * 14 * 14)
    for image, pixels in zip(pack.images_of("vae"), loaded.vae_images(), strict=True):
        assert torch.equal(pixels, Pictures().pixels(pack.samples[image.sample].index, image))
    noised = [image.noised for image in pack.images_of("vae")]
    assert list(np.isfinite(loaded.raw_timesteps)) == noised and not all(noised)


@pytest.mark.parametrize("workers", [0, 1])
def test_broken_image_is_named_and_its_sample_replaced_by_the_next(workers: int) -> None:
    whole, broken = loader(), loader(workers=workers, broken=3)
    seen = 0
    for _ in range(4):
        expected, batch = next(whole), next(broken)
        failed = [(place, sample) for place, pack in enumerate(batch.packs) for sample, _ in pack.failures]
        assert plans(batch) == plans(expected) and batch.totals == expected.totals
        for place, sample in failed:
            source, index, _ = batch.packs[place].plan.samples[sample]
            assert (source, index) == (0, 3)
            reason = dict(batch.packs[place].failures)[sample]
            assert "of unified_edit/pictures, 0000.parquet row 3 cannot be read: the image cannot be decoded" in reason
            with pytest.raises(ValueError, match="row 3 cannot be read"):
                broken.reader[batch.packs[place].plan]
        batch = broken.replaced(batch, failed)
        assert not any(pack.failures for pack in batch.packs)
        for place, pack in enumerate(batch.packs):
            assert pack.plan.tokens == pack.pack.sequence_length <= 90
            assert len(set(pack.plan.samples)) == len(pack.plan.samples)
            kept = [s for n, s in enumerate(expected.packs[place].plan.samples) if (place, n) not in failed]
            assert set(kept) <= set(pack.plan.samples) and len(pack.plan.samples) <= len(expected.packs[place].plan.samples)
            assert not any(index == 3 for _, index, _ in pack.plan.samples)
        seen += len(failed)
    assert seen > 0
    broken.close()


def test_nothing_to_replace_a_broken_sample_with() -> None:
    alone = loader(size=1, broken=0)
    batch = next(alone)
    assert batch.packs[0].failures
    with pytest.raises(ValueError, match="row 0 cannot be read, and its dataset has no other sample.*verify_index"):
        alone.replaced(batch, [(0, place) for place, _ in batch.packs[0].failures])


def test_uneven_replicas_are_refused_at_once() -> None:
    with pytest.raises(ValueError, match="global_batch_size"):
        loader(0, 3)


def test_noise_belongs_to_the_image_not_to_the_pack() -> None:
    samples = [Pictures().sample(index, 0) for index in range(4)]
    alone = [build_pack([sample], SPEC) for sample in samples]
    together = build_pack(samples[::-1], SPEC)
    flow = torch.cat([flow_noise(pack, 3, 64) for pack in alone[::-1]])
    assert torch.equal(flow, flow_noise(together, 3, 64))
    assert np.array_equal(np.concatenate([raw_timesteps(pack, 3) for pack in alone[::-1]]), raw_timesteps(together, 3))
    posterior = [noise for pack in alone[::-1] for noise in posterior_noise(pack, 3, 16, 8)]
    assert all(torch.equal(a, b) for a, b in zip(posterior, posterior_noise(together, 3, 16, 8), strict=True))
    clean = torch.cat([torch.full((image.tokens,), not image.noised) for image in together.images_of("vae")])
    assert flow_noise(together, 3, 64)[clean].abs().sum() == 0
    assert not torch.equal(flow, flow_noise(together, 4, 64))


def test_frames_of_a_clip_share_a_timestep_and_copies_of_an_image_do_not_share_noise() -> None:
    clip = (
        Item("vae", loss=True, image=0, height=32, width=32, split_end=False, frame_delta=1),
        Item("vae", loss=True, image=1, height=32, width=32, split_start=False, frame_delta=1),
        Item("vae", loss=True, image=2, height=32, width=32),
        Item("vae", image=2, height=32, width=32),
    )
    pack = build_pack([Sample("interleave/clips", 0, 0, clip)], SPEC)
    raw = raw_timesteps(pack, 0)
    assert raw[0] == raw[1] != raw[2] and raw[3] == -np.inf
    noise = posterior_noise(pack, 0, 16, 8)
    assert not torch.equal(noise[2], noise[3])
    flow = flow_noise(pack, 0, 64).view(4, 4, 64)
    assert not torch.equal(flow[0], flow[1])


def test_pack_without_images() -> None:
    pack = build_pack([Sample("text/notes", 0, 0, (Item("text", loss=True, ids=np.arange(5, 9)),))], SPEC)
    assert flow_noise(pack, 0, 64).shape == (0, 64)
    assert posterior_noise(pack, 0, 16, 8) == [] and raw_timesteps(pack, 0).shape == (0,)
