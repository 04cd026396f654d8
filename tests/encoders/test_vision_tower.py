# SPDX-License-Identifier: Apache-2.0
"""The vision tower against recorded features, transformers' SigLIP, and itself: packing, order, recompute, no image at all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import SiglipVisionConfig, SiglipVisionModel

from megatron_bagel.checkpoint.hf.initial_weights import initial_value
from megatron_bagel.checkpoint.hf.weight_map import WeightMap
from megatron_bagel.config.architecture import BagelArch, LLMArch, ViTArch
from megatron_bagel.data.transforms import vit_patches
from megatron_bagel.encoders.vision_tower import VisionTower
from tests.encoders.helpers import SIDE, small_arch, small_tower
from tools.compare_tensors import is_rounding_alone


def packed(shapes: list[tuple[int, int]], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Random patches and their ids for images of (rows, columns) patches."""
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.arange(rows)[:, None] * SIDE + torch.arange(cols) for rows, cols in shapes]
    lengths = [rows * cols for rows, cols in shapes]
    patches = torch.randn(sum(lengths), 588, generator=generator)
    return patches, torch.cat([i.flatten() for i in ids]) if ids else torch.empty(0, dtype=torch.long), lengths


def golden_tower(goldens: Path) -> VisionTower:
    arch = BagelArch.from_hf_folder(goldens / "hf", **json.loads((goldens / "hf" / "tiny_extra.json").read_text())["top"])
    tower = VisionTower(arch)
    weights = load_file(goldens / "hf" / "ema.safetensors")
    tower.load_state_dict({name: weights[name].float() for name in tower.state_dict()})
    return tower


def test_parameter_names_are_the_released_ones(goldens: Path) -> None:
    names = json.loads((goldens / "names_shapes.json").read_text())["model"]
    expected = {name: shape[0] for name, shape in names.items() if name.startswith(("vit_model.", "connector."))}
    assert {name: list(tensor.shape) for name, tensor in golden_tower(goldens).state_dict().items()} == expected


def test_each_stage_equals_the_recorded_one(goldens: Path) -> None:
    modules = load_file(goldens / "modules.safetensors")
    batch = load_file(goldens / "batches" / "flex_0.safetensors")
    tower = golden_tower(goldens)
    seen: dict[str, torch.Tensor] = {}
    vision = tower.vit_model.vision_model
    stages = {"embed": vision.embeddings, "out": vision.post_layernorm, "connector": tower.connector}
    stages |= {f"layer_{i}": layer for i, layer in enumerate(vision.encoder.layers)}
    for name, module in stages.items():
        module.register_forward_hook(lambda _m, _i, output, name=name: seen.__setitem__(name, output))
    lengths = modules["vit.seqlens"].tolist()
    n = sum(lengths)
    out = tower(batch["packed_vit_tokens"][:n].float(), batch["packed_vit_position_ids"][:n], lengths)
    for name, output in seen.items():
        torch.testing.assert_close(output, modules[f"vit.{name}"], atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(out, modules["vit.connector_plus_pos"], atol=2e-5, rtol=1e-4)


def test_whole_batch_equals_the_recorded_one(goldens: Path) -> None:
    """Lengths 9, 2, 6, 12, 9, 8: images of equal length are not neighbours, so the order is undone at the end."""
    batch = load_file(goldens / "batches" / "flex_0.safetensors")
    recorded = load_file(goldens / "train" / "flex_0_expected.safetensors")
    tower = golden_tower(goldens)
    ids = batch["packed_vit_position_ids"]
    out = tower(batch["packed_vit_tokens"].float(), ids, batch["vit_token_seqlens"].tolist())
    torch.testing.assert_close(out - tower.vit_pos_embed[ids], recorded["connector_out"], atol=2e-5, rtol=1e-4)


def test_only_key_biases_have_no_gradient() -> None:
    """What comparisons of layouts leave out is what softmax does not see: in float64 its gradient is 1e-12 of any other's."""
    tower = small_tower().double()
    patches, ids, lengths = packed([(2, 3), (4, 2), (2, 3)])
    tower(patches.double(), ids, lengths).square().sum().backward()
    sizes = {name: float(parameter.grad.abs().max()) for name, parameter in tower.named_parameters() if parameter.grad is not None}
    left_out = {name for name in sizes if is_rounding_alone(name)}
    assert left_out == {name for name in sizes if name.endswith("k_proj.bias")} and len(left_out) == 2
    assert max(sizes[name] for name in left_out) < 1e-12 * min(sizes[name] for name in sizes.keys() - left_out)


def test_square_image_equals_transformers_siglip() -> None:
    """Without dropped layers, on the full grid, the features are those of the peer's vision model."""
    arch = small_arch(select_layer=-1)
    tower = small_tower(select_layer=-1)
    config = SiglipVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, image_size=14 * SIDE, patch_size=14
    )
    peer = SiglipVisionModel(config).eval()
    weights = tower.vit_model.state_dict()
    convolution = weights["vision_model.embeddings.patch_embedding.weight"].view(32, 14, 14, 3).permute(0, 3, 1, 2)
    weights["vision_model.embeddings.patch_embedding.weight"] = convolution
    # transformers 5 dropped the "vision_model." prefix; the pooling head behind the features is the peer's alone.
    if not any(name.startswith("vision_model.") for name in peer.state_dict()):
        weights = {name.removeprefix("vision_model."): tensor for name, tensor in weights.items()}
    mismatch = peer.load_state_dict(weights, strict=False)
    assert all(".head." in f".{name}" for name in mismatch.missing_keys) and not mismatch.unexpected_keys
    image = torch.randn(3, 14 * SIDE, 14 * SIDE, generator=torch.Generator().manual_seed(1))
    seen: list[torch.Tensor] = []
    tower.vit_model.register_forward_hook(lambda _m, _i, output: seen.append(output))
    with torch.no_grad():
        tower(vit_patches(image, arch.vit.patch_size), torch.arange(SIDE * SIDE), [SIDE * SIDE])
        expected = peer(image[None]).last_hidden_state[0]
    torch.testing.assert_close(seen[0], expected, atol=1e-5, rtol=1e-5)


@settings(max_examples=15, deadline=None)
@given(shapes=st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=6), rope=st.booleans())
def test_an_image_does_not_see_the_others(shapes: list[tuple[int, int]], rope: bool) -> None:
    tower = small_tower(rope)
    patches, ids, lengths = packed(shapes)
    together = tower(patches, ids, lengths)
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    spans = [slice(start, start + length) for start, length in zip(starts, lengths, strict=True)]
    alone = torch.cat([tower(patches[s], ids[s], [s.stop - s.start]) for s in spans])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


def test_recompute_changes_nothing_but_memory() -> None:
    patches, ids, lengths = packed([(2, 3), (1, 4), (3, 2), (2, 2)])
    results = []
    for recompute in (False, True):
        tower = small_tower(recompute=recompute)
        out = tower(patches, ids, lengths)
        out.square().sum().backward()
        results.append([out, *(parameter.grad for parameter in tower.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("rope", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
def test_no_image_gives_no_rows_and_zero_gradients(rope: bool, recompute: bool) -> None:
    tower = small_tower(rope, recompute)
    out = tower(*packed([]))
    assert out.shape == (0, 48)
    out.sum().backward()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in tower.parameters())


def test_rope_is_relative_in_rows_and_columns() -> None:
    """Moving an image by whole rows and columns changes no feature before the absolute table of the decoder is added."""
    tower = small_tower(rope=True)
    patches, ids, lengths = packed([(3, 4)])
    moved = ids + 2 * SIDE + 3
    features = [tower(patches, i, lengths) - tower.vit_pos_embed[i] for i in (ids, moved)]
    torch.testing.assert_close(features[0], features[1], atol=1e-5, rtol=1e-5)
    swapped = tower(patches, ids.flip(0), lengths) - tower.vit_pos_embed[ids.flip(0)]
    assert (swapped - features[0]).abs().max() > 1e-3


def test_lengths_that_disagree_with_patches_are_refused() -> None:
    patches, ids, lengths = packed([(2, 2), (2, 3)])
    with pytest.raises(ValueError, match="sum to 10.*9 patches"):
        small_tower()(patches[:-1], ids, lengths)


def test_same_generator_gives_the_same_random_weights() -> None:
    towers = []
    for _ in range(2):
        tower = VisionTower(small_arch())
        tower.reset_parameters(torch.Generator().manual_seed(5))
        towers.append(tower.state_dict())
    assert all(torch.equal(towers[0][name], towers[1][name]) for name in towers[0])
    table = towers[0]["vit_model.vision_model.embeddings.position_embedding.weight"]
    assert abs(table.std().item() * 32**0.5 - 1) < 0.1


def test_a_seeded_tower_sees_where_as_well_as_what() -> None:
    """At the start a patch's place moves its embedding about as much as its contents do: a small model learns places only then."""
    arch = BagelArch(LLMArch(64, 96, 1, 2, 1, 64), ViTArch(96, 192, 2, 3, image_size=140), None, vit_max_num_patch_per_side=10)
    entries = WeightMap(arch).entries
    embeddings = "vit_model.vision_model.embeddings."
    patches = initial_value(entries[f"{embeddings}patch_embedding.weight"], arch, 1)
    places = initial_value(entries[f"{embeddings}position_embedding.weight"], arch, 1)
    flat = torch.ones(patches.shape[1])  # a white patch
    assert 0.5 < (patches @ flat).norm() / places.norm(dim=1).mean() < 2
