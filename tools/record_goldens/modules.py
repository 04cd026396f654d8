# SPDX-License-Identifier: Apache-2.0
"""Records single modules of the original: autoencoder, vision tower, connector, timesteps, positions, rotary angles, timestep shift."""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image
from torch import Tensor

from tools.record_goldens.data import read_batch
from tools.record_goldens.files import GoldenFolder
from tools.record_goldens.model import ModelSource
from tools.record_goldens.original import Original

_VAE_SEED = 8
_TIMES = (0.0, 1e-3, 0.25, 0.5, 0.999, 1.0)
_POSITIONS = (0, 1, 7, 100, 4000)
_RAW_TIMES = (-3.0, -1.0, 0.0, 1.0, 3.0, float("-inf"))
_SHIFTS = (1.0, 3.0, 4.0)
_SINUSOID = 256


@torch.no_grad()
def record_modules(original: Original, models: ModelSource, folder: GoldenFolder) -> None:
    """Write ``modules.safetensors``."""
    model, autoencoder = models.load()
    model.eval()
    side = models.settings.top["max_latent_size"]
    times, positions, raw = torch.tensor(_TIMES), torch.tensor(_POSITIONS), torch.tensor(_RAW_TIMES)
    cos, sin = model.language_model.model.rotary_emb(torch.zeros(1), positions[None])
    uniform = torch.sigmoid(raw)
    folder.tensors("modules.safetensors", {
        **_autoencoder(original, autoencoder, models.settings.ae["z_channels"], folder),
        **_vision(model, read_batch(folder, "flex_0")),
        "time.t": times, "time.sinusoid": model.time_embedder.timestep_embedding(times, _SINUSOID), "time.out": model.time_embedder(times),
        "latent_pos_embed": model.latent_pos_embed.pos_embed[[0, 1, side, side + 1, side * side - 1]],
        "rope.pos": positions, "rope.cos": cos[0], "rope.sin": sin[0], "tshift.raw": raw,
        **{f"tshift.{shift}": shift * uniform / (1 + (shift - 1) * uniform) for shift in _SHIFTS},
    })  # fmt: skip


def _autoencoder(original: Original, autoencoder: Any, channels: int, folder: GoldenFolder) -> dict[str, Tensor]:
    """Return one image, its posterior, its latent with the noise of it, and what the latent decodes to."""
    picture = original.data_utils.pil_img2rgb(Image.open(folder.root / "raw_data/vlm/images/0.png"))
    image = original.transforms.ImageTransform(48, 32, 16)(picture)[None]
    moments = autoencoder.encoder(image)
    with original.noise.fresh(_VAE_SEED) as drawn:
        latent = autoencoder.encode(image)
    return {
        "vae.image": image, "vae.mean": moments[:, :channels], "vae.logvar": moments[:, channels:], "vae.posterior_noise": drawn[0],
        "vae.encoded_scaled": latent, "vae.decoded": autoencoder.decode(latent),
    }  # fmt: skip


def _vision(model: Any, batch: dict[str, Any]) -> dict[str, Tensor]:
    """Return the vision tower over the first three images of a batch, layer by layer, and the connector after it."""
    lengths = batch["vit_token_seqlens"][:3]
    tokens = int(lengths.sum())
    pixels, positions = batch["packed_vit_tokens"][:tokens], batch["packed_vit_position_ids"][:tokens]
    ends = torch.nn.functional.pad(torch.cumsum(lengths, 0), (1, 0)).to(torch.int32)
    tower = model.vit_model.vision_model
    seen: dict[str, Tensor] = {}
    hooks = [
        layer.register_forward_hook(lambda module, inputs, output, name=f"vit.layer_{number}": seen.__setitem__(name, output.clone()))
        for number, layer in enumerate(tower.encoder.layers)
    ]
    embedded = tower.embeddings(pixels, positions)
    output = model.vit_model(
        packed_pixel_values=pixels, packed_flattened_position_ids=positions, cu_seqlens=ends, max_seqlen=int(lengths.max())
    )  # fmt: skip
    for hook in hooks:
        hook.remove()
    connected = model.connector(output)
    return {
        "vit.embed": embedded, "vit.out": output, **seen, "vit.connector": connected,
        "vit.connector_plus_pos": connected + model.vit_pos_embed(positions), "vit.seqlens": lengths,
    }  # fmt: skip
