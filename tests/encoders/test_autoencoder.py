# SPDX-License-Identifier: Apache-2.0
"""The autoencoder against recorded tensors and diffusers' AutoencoderKL; images of any size side by side; wrong files refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from megatron_bagel.config.architecture import AutoencoderArch
from megatron_bagel.encoders.autoencoder import AutoEncoder
from megatron_bagel.encoders.autoencoder_io import load_autoencoder, save_autoencoder
from megatron_bagel.encoders.group_norm import split_group_norm
from tests.encoders.helpers import small_autoencoder


def golden_autoencoder(goldens: Path) -> AutoEncoder:
    arch = AutoencoderArch.from_dict(json.loads((goldens / "hf" / "tiny_extra.json").read_text())["ae"])
    return load_autoencoder(goldens / "hf" / "ae.safetensors", arch)


def test_names_and_shapes_are_the_released_ones(goldens: Path) -> None:
    expected = json.loads((goldens / "names_shapes.json").read_text())["autoencoder"]
    assert {name: list(tensor.shape) for name, tensor in golden_autoencoder(goldens).state_dict().items()} == expected


@pytest.mark.parametrize("gradients", [False, True])
def test_equals_the_recorded_tensors(goldens: Path, gradients: bool) -> None:
    recorded = load_file(goldens / "modules.safetensors")
    model = golden_autoencoder(goldens)
    close = {"atol": 2e-5, "rtol": 1e-4}
    with torch.set_grad_enabled(gradients):
        mean, logvar = model.encode_moments(recorded["vae.image"])
        latent = model.sample(mean, logvar, recorded["vae.posterior_noise"])
        decoded = model.decode(recorded["vae.encoded_scaled"])
    torch.testing.assert_close(mean, recorded["vae.mean"], **close)
    torch.testing.assert_close(logvar, recorded["vae.logvar"], **close)
    torch.testing.assert_close(latent, recorded["vae.encoded_scaled"], **close)
    torch.testing.assert_close(decoded, recorded["vae.decoded"], **close)


def test_padded_encoding_equals_the_recorded_batch(goldens: Path) -> None:
    """The original pads all images of a row to the largest; its recorded latents carry that padding's effect."""
    model = golden_autoencoder(goldens)
    batch = load_file(goldens / "batches" / "flex_0.safetensors")
    recorded = load_file(goldens / "train" / "flex_0_expected.safetensors")
    row = json.loads((goldens / "batches" / "flex_0.json").read_text())
    patch = json.loads((goldens / "hf" / "tiny_extra.json").read_text())["top"]["latent_patch_size"]
    shapes = [(patch * rows, patch * columns) for rows, columns in row["patchified_vae_latent_shapes"]]
    factor = model.arch.downsample
    padded = batch["padded_images"].float()
    images = [image[:, : rows * factor, : columns * factor] for image, (rows, columns) in zip(padded, shapes, strict=True)]
    for i, (mean, logvar) in enumerate(model.encode_padded(images)):
        own = (i, slice(None), slice(shapes[i][0]), slice(shapes[i][1]))
        latent = model.sample(mean, logvar, recorded["vae_posterior_noise"][own])
        torch.testing.assert_close(latent, recorded["padded_latent"][own], atol=2e-5, rtol=1e-4)
    assert model.encode_padded([]) == []


# Parts of a name here -> there; blocks of a resolution are counted from the coarsest in diffusers' decoder, from the finest here.
RENAMES = (
    ("mid.block_1", "mid_block.resnets.0"),
    ("mid.block_2", "mid_block.resnets.1"),
    ("mid.attn_1.norm", "mid_block.attentions.0.group_norm"),
    ("mid.attn_1.q", "mid_block.attentions.0.to_q"),
    ("mid.attn_1.k", "mid_block.attentions.0.to_k"),
    ("mid.attn_1.v", "mid_block.attentions.0.to_v"),
    ("mid.attn_1.proj_out", "mid_block.attentions.0.to_out.0"),
    ("downsample.conv", "downsamplers.0.conv"),
    ("upsample.conv", "upsamplers.0.conv"),
    ("nin_shortcut", "conv_shortcut"),
    ("norm_out", "conv_norm_out"),
)


def peer_name(name: str, levels: int) -> str:
    for ours, theirs in RENAMES:
        name = name.replace(ours, theirs)
    parts = name.split(".")
    if parts[1] in ("down", "up"):
        level = int(parts[2]) if parts[1] == "down" else levels - 1 - int(parts[2])
        parts[1:3] = [f"{parts[1]}_blocks", str(level)]
        parts = ["resnets" if part == "block" else part for part in parts]
    return ".".join(parts)


def test_equals_diffusers_with_mapped_weights() -> None:
    torch.manual_seed(1)
    arch = AutoencoderArch(ch=32, ch_mult=(1, 2, 4), num_res_blocks=2)
    model = AutoEncoder(arch).eval()
    peer = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 64, 128),
        layers_per_block=2,
        latent_channels=16,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).eval()
    shapes = {name: tensor.shape for name, tensor in peer.state_dict().items()}
    mapped = {peer_name(name, 3): tensor for name, tensor in model.state_dict().items()}
    peer.load_state_dict({name: tensor.view(shapes[name]) for name, tensor in mapped.items()}, strict=True)
    images = torch.randn(2, 3, 24, 40)
    latents = torch.randn(2, 16, 6, 10)
    with torch.no_grad():
        mean, logvar = model.encode_moments(images)
        posterior = peer.encode(images).latent_dist
        decoded = model.decode(arch.scale_factor * (latents - arch.shift_factor))
        expected = peer.decode(latents).sample
    torch.testing.assert_close(mean, posterior.mean, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(logvar, posterior.logvar, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(decoded, expected, atol=2e-5, rtol=1e-4)


@settings(max_examples=10, deadline=None)
@given(sizes=st.lists(st.tuples(st.sampled_from([8, 16, 24]), st.sampled_from([8, 16])), max_size=6))
def test_an_image_is_encoded_as_if_alone(sizes: list[tuple[int, int]]) -> None:
    model = small_autoencoder()
    images = [torch.randn(3, *size, generator=torch.Generator().manual_seed(i)) for i, size in enumerate(sizes)]
    together = model.encode_many(images)
    assert len(together) == len(images)
    for image, moments in zip(images, together, strict=True):
        for got, expected in zip(moments, model.encode_moments(image[None]), strict=True):
            torch.testing.assert_close(got, expected[0], atol=1e-5, rtol=1e-5)


def test_large_images_are_split_into_several_calls() -> None:
    model = small_autoencoder()
    images = list(torch.randn(5, 3, 8, 8))
    expected = model.encode_many(images)
    model.use_kernels("plain", 130)
    calls: list[int] = []
    model.encoder.register_forward_hook(lambda _m, inputs, _o: calls.append(len(inputs[0])))
    for got, want in zip(model.encode_many(images), expected, strict=True):
        torch.testing.assert_close(got[0], want[0], atol=1e-5, rtol=1e-5)
    assert calls == [2, 2, 1]


def test_decode_undoes_the_scaling_of_sample() -> None:
    model = small_autoencoder()
    mean = torch.randn(1, 16, 4, 4)
    latent = model.sample(mean, torch.full_like(mean, -200.0), torch.randn_like(mean))
    torch.testing.assert_close(model.decode(latent), model.decoder(mean), atol=1e-5, rtol=1e-5)


def test_size_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="9x8 pixels.*factor 2"):
        small_autoencoder().encode_moments(torch.zeros(1, 3, 9, 8))


def test_saved_and_loaded_autoencoder_is_the_same(tmp_path: Path) -> None:
    model = small_autoencoder()
    save_autoencoder(model, tmp_path / "ae" / "ae.safetensors")
    loaded = load_autoencoder(tmp_path / "ae" / "ae.safetensors")
    assert loaded.arch == model.arch
    assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), model.state_dict().values(), strict=True))
    assert not loaded.training and not any(parameter.requires_grad for parameter in loaded.parameters())


def test_half_precision_file_is_loaded_as_fp32(tmp_path: Path) -> None:
    model = small_autoencoder()
    save_autoencoder(model, tmp_path / "ae.safetensors", dtype=torch.bfloat16)
    for name, tensor in load_autoencoder(tmp_path / "ae.safetensors").state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name].bfloat16().float())


def test_missing_left_over_and_misshapen_tensors_are_listed(tmp_path: Path) -> None:
    path = tmp_path / "ae.safetensors"
    save_autoencoder(small_autoencoder(), path)
    tensors = load_file(path)
    del tensors["encoder.conv_in.bias"]
    tensors["encoder.extra"] = torch.zeros(1)
    tensors["decoder.conv_out.bias"] = torch.zeros(4)
    save_file(tensors, path)
    with pytest.raises(ValueError) as error:
        load_autoencoder(path)
    for part in (str(path), "missing tensors: encoder.conv_in.bias", "unexpected tensors: encoder.extra", "decoder.conv_out.bias is [4]"):
        assert part in str(error.value)


@pytest.mark.parametrize("content", [None, b"not a safetensors file"])
def test_path_that_is_no_weight_file_is_named_with_its_flag(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "ae.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match="--vae_path .*ae.safetensors"):
        load_autoencoder(path)


@pytest.mark.parametrize("kernels", ["split_norm", "channels_last"])
def test_kernels_change_nothing_but_rounding(kernels: str) -> None:
    """Single images and batches, also with a mean far from zero, which costs a careless variance its digits."""
    plain = small_autoencoder()
    other = copy.deepcopy(plain).use_kernels(kernels)
    generator = torch.Generator().manual_seed(0)
    images = [torch.rand(3, *size, generator=generator) * 2 - 1 for size in [(32, 48), (64, 64), (32, 48), (16, 16)]]
    images.append(images[0] * 0.01 + 0.9)
    for ours, theirs in zip(other.encode_many(images), plain.encode_many(images), strict=True):
        for one, two in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5 * float(two.abs().max()))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_split_norm_is_torchs(memory_format: torch.memory_format) -> None:
    norm = torch.nn.GroupNorm(32, 64)
    torch.nn.init.normal_(norm.weight), torch.nn.init.normal_(norm.bias)
    x = (torch.randn(3, 64, 9, 7, generator=torch.Generator().manual_seed(1)) + 5).contiguous(memory_format=memory_format)
    result = split_group_norm(x, 32, norm.weight, norm.bias, norm.eps)
    assert result.is_contiguous(memory_format=memory_format)
    torch.testing.assert_close(result, norm(x.contiguous()), rtol=1e-5, atol=1e-5)
