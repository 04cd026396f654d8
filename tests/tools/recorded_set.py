# SPDX-License-Identifier: Apache-2.0
"""A small set in the goldens' format, of another model size, recorded from this code: to show that the checker reads sizes from files.

Recorded by other means than the checker uses: the dense attention oracle, gradients of plain mean losses.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from megatron_bagel.checkpoint.hf.folder import HFFolder
from megatron_bagel.checkpoint.hf.load import entries_of, load_weights
from megatron_bagel.checkpoint.hf.weight_map import WeightMap
from megatron_bagel.config.architecture import AutoencoderArch, BagelArch, LLMArch, ViTArch
from megatron_bagel.config.transformer_config import transformer_config
from megatron_bagel.encoders.autoencoder_io import load_autoencoder
from megatron_bagel.encoders.image_encoding import encode_latents
from megatron_bagel.encoders.vision_tower import VisionTower
from megatron_bagel.layout.items import Item, Mode, Sample
from megatron_bagel.layout.order import expert_order
from megatron_bagel.layout.pack import LayoutSpec, Pack, build_pack
from megatron_bagel.model.batch import Features, make_microbatch
from megatron_bagel.model.build import build_decoder
from megatron_bagel.model.flow import shift_timesteps
from tests.inference.tiny_model import VOCABULARY, write_tiny_model

PADDING = 7


def other_arch() -> BagelArch:
    """Nothing as in the goldens: width, depth, head sizes, tied embeddings, patches, tables, autoencoder, timestep shift."""
    return BagelArch(
        llm=LLMArch(48, 64, 3, 6, 3, VOCABULARY, rope_theta=1e4, tie_word_embeddings=True, initializer_range=0.3),
        vit=ViTArch(32, 48, 2, 2, image_size=56),
        autoencoder=AutoencoderArch(ch=32, ch_mult=(1, 1, 1), num_res_blocks=1, z_channels=4),
        latent_patch_size=1,
        max_latent_size=20,
        vit_max_num_patch_per_side=4,
        timestep_shift=2.0,
    )


def _pack(arch: BagelArch) -> Pack:
    spec = LayoutSpec(301, 302, 303, 304, vit_max_side=4, vae_downsample=arch.vae_token_pixels, max_latent_size=arch.max_latent_size)
    ids = np.arange(5, 9)
    understand = (Item("vit", image=0, height=28, width=42), Item("text", ids=ids, loss=True))
    draw = (Item("text", ids=ids), Item("vae", image=0, height=8, width=16, loss=True), Item("vae", image=1, height=12, width=8))
    return build_pack([Sample("a", 0, 0, understand), Sample("b", 0, 0, draw)], spec)


def write_recorded_set(folder: Path) -> Path:
    """Write model, one batch and what training makes of it under ``folder``; needs process groups. Returns ``folder``."""
    write_tiny_model(folder, other_arch())
    model = HFFolder(folder / "hf")
    arch, pack, noise = model.arch, _pack(model.arch), torch.Generator().manual_seed(3)
    decoder, tower = build_decoder(arch, transformer_config(arch.llm)), VisionTower(arch)
    load_weights(model.weights(), WeightMap(arch), [decoder, tower])
    patches = torch.randn(len(pack.vit_positions), 588, generator=noise).half()
    sizes = [(image.height, image.width) for image in pack.images_of("vae")]
    padded = torch.zeros(len(sizes), 3, *np.max(sizes, 0)).half()
    for number, (height, width) in enumerate(sizes):
        padded[number, :, :height, :width] = torch.randn(3, height, width, generator=noise)
    cells = [side // arch.autoencoder.downsample for side in padded.shape[2:]]
    posterior = torch.randn(len(sizes), arch.autoencoder.z_channels, *cells, generator=noise)
    flow = torch.randn(len(pack.vae_positions), arch.latent_token_dim, generator=noise)
    raw = torch.full((len(pack.vae_positions),), -torch.inf)
    raw[np.isin(pack.vae_positions, pack.mse_positions)] = 0.4

    images = [image[:, :height, :width].float() for image, (height, width) in zip(padded, sizes, strict=True)]
    own = [one[:, : height // 4, : width // 4] for one, (height, width) in zip(posterior, sizes, strict=True)]
    autoencoder = load_autoencoder(folder / "hf" / "ae.safetensors", arch.autoencoder)
    largest = max(image.shape[-2] for image in images), max(image.shape[-1] for image in images)
    latents = encode_latents(autoencoder, images, own, arch.latent_patch_size, largest)
    vit = tower(patches.float(), torch.from_numpy(pack.vit_position_ids), [len(patches)])
    features = Features(vit, latents, flow, shift_timesteps(raw, arch.timestep_shift))
    ce, mse = decoder(make_microbatch(pack, expert_order(pack), features, "dense"))
    (ce.mean() + mse.mean()).backward()
    norms = {}
    for entry, parameter in entries_of([decoder, tower], WeightMap(arch)):
        norms.update({name: float(part.norm()) for name, part in zip(entry.hf, entry.unfuse(parameter.grad), strict=True)})

    _write_batch(folder, pack, {"packed_vit_tokens": patches, "padded_images": padded, "packed_timesteps": raw})
    recorded = {"ce": ce.detach(), "mse": mse.detach(), "flow_noise": flow, "vae_posterior_noise": posterior}
    (folder / "train").mkdir()
    save_file(recorded, folder / "train" / "flex_0_expected.safetensors")
    losses = {"ce": float(ce.mean()), "mse": float(mse.mean()), "loss": float(ce.mean() + mse.mean())}
    total = float(torch.tensor(list(norms.values())).norm())
    still = {name: norm for name, norm in norms.items() if name.startswith("connector.") or not name.startswith("vit_model.")}
    frozen = {"losses": losses, "total_norm": float(torch.tensor(list(still.values())).norm()), "nonzero_grad": still}
    expected = {
        "flex_0": {"losses": losses, "total_norm": total, "grad_norms": norms},
        "freeze_vit": {**frozen, "exactly_zero_grad": [], "grad_none": []},
    }
    (folder / "train" / "expected.json").write_text(json.dumps(expected))
    return folder


def _write_batch(folder: Path, pack: Pack, tensors: dict[str, torch.Tensor]) -> None:
    (folder / "batches").mkdir()
    plain = {
        "sequence_length": pack.sequence_length,
        "sample_lens": [*pack.sample_lens.tolist(), PADDING],
        "split_lens": [*pack.split_lens.tolist(), PADDING],
        "attn_modes": [*(Mode(mode).name.lower() for mode in pack.split_modes), "causal"],
        "patchified_vae_latent_shapes": pack.latent_shapes.tolist(),
    }
    (folder / "batches" / "flex_0.json").write_text(json.dumps(plain))
    fields = {
        "packed_text_ids": pack.text_ids,
        "packed_text_indexes": pack.text_positions,
        "packed_position_ids": pack.position_ids,
        "packed_vae_token_indexes": pack.vae_positions,
        "packed_latent_position_ids": pack.latent_position_ids,
        "packed_vit_token_indexes": pack.vit_positions,
        "packed_vit_position_ids": pack.vit_position_ids,
        "vit_token_seqlens": pack.vit_shapes.prod(1),
        "ce_loss_indexes": pack.ce_positions,
        "packed_label_ids": pack.labels,
        "ce_loss_weights": pack.ce_weights,
        "mse_loss_indexes": pack.mse_positions,
    }
    arrays = {name: torch.from_numpy(array) for name, array in fields.items()}
    save_file({**arrays, **tensors}, folder / "batches" / "flex_0.safetensors")
