# SPDX-License-Identifier: Apache-2.0
"""The benchmark measures what it says: equal results of both layer kinds, a pack of the promised size, complete JSON."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.layers import _stacks, compare_layers, half_generation_pack
from benchmarks.measure import count_operators
from benchmarks.named_configs import CONFIGS, bench_pack, filled_pack
from benchmarks.record import read_record
from benchmarks.train_step import main
from megatron_bagel.layout.mask import PackMask


def test_gather_scatter_layer_is_the_same_mathematics(single_rank: None) -> None:
    ours, plain = _stacks(layers=2, hidden=128, tokens=128)
    places = torch.from_numpy(ours.order.positions)
    torch.testing.assert_close(ours.run(), plain.run()[places], rtol=1e-4, atol=1e-5)
    und, expert = ours.model.decoder.layers[1].mlp.und, plain.layers[1].experts[0]
    torch.testing.assert_close(und.linear_fc2.weight.grad, expert.down_proj.weight.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(und.linear_fc1.weight.grad.chunk(2)[0], expert.gate_proj.weight.grad, rtol=1e-4, atol=1e-4)


def test_expert_sorted_layer_launches_far_less(single_rank: None) -> None:
    result = compare_layers(hidden=128, layers=1, tokens=128, rounds=1)
    assert result["kernels_ratio"] < 0.6 and result["largest_difference"] < 1e-4


@pytest.mark.parametrize(("name", "tokens"), [("bench-tiny", 600), ("bench-7b-seventh", 36864)])
def test_a_filled_pack_is_nearly_full(name: str, tokens: int) -> None:
    """Two rounds of the 7B samples are longer than what is asked for, and one is half of it."""
    pack = filled_pack(CONFIGS[name], tokens)
    assert 0.95 * tokens < pack.sequence_length <= tokens
    assert {len(pack.images_of(kind)) > 0 for kind in ("vit", "vae")} == {True} and len(pack.ce_positions)
    with pytest.raises(ValueError, match="one round of the samples has"):
        filled_pack(CONFIGS[name], 50)


def test_half_of_the_tokens_are_generated() -> None:
    pack = half_generation_pack(2048)
    assert pack.sequence_length == 2048 == PackMask.of(pack).length
    assert sorted([*pack.text_positions, *pack.vae_positions]) == list(range(2048))
    assert len(pack.vae_positions) == pytest.approx(1024, abs=16)


def test_named_pack() -> None:
    pack = bench_pack(CONFIGS["bench-53m"])
    assert len(pack.samples) == 14 and abs(pack.sequence_length - 2150) < 100
    assert len({(image.sample, image.image) for image in pack.images}) == 20
    assert all(48 <= image.height <= 128 and 48 <= image.width <= 128 for image in pack.images)


def test_counter_sees_kernels_and_views() -> None:
    calls = count_operators(lambda: (torch.ones(2, 3).t() + 1).sum())
    assert (calls.total, calls.kernels) == (4, 3)


@pytest.mark.parametrize(("layers", "recomputed"), [(0, 0), (1, 1), (-1, 2)])
def test_json(tmp_path: Path, layers: int, recomputed: int) -> None:
    out = tmp_path / "result.json"
    main(["step", "--config", "bench-tiny", "--rounds", "1", "--recompute-layers", str(layers), "--output", str(out)])
    result = read_record(out).figures
    assert result["tokens_per_s"] > 0 and result["peak_mem_bytes"] > 0 and result["recompute_layers"] == recomputed
    assert result["last_loss"] < result["first_loss"]
    assert sum(result["parts_s"].values()) == pytest.approx(result["step_s"], rel=0.01)
