# SPDX-License-Identifier: Apache-2.0
"""Single modules against ``modules.safetensors``: autoencoder, vision tower by layer, timestep embedding, tables, rotary positions."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_bagel import platform
from megatron_bagel.model.flow import shift_timesteps
from megatron_bagel.model.rope import rotary_table
from tools.golden_common import CaseResult, Comparison
from tools.golden_model import GoldenModel, Parts


@torch.no_grad()
def run_module_cases(goldens: Path, model: GoldenModel, parts: Parts) -> list[CaseResult]:
    """One result per module; recorded tensors that no check reads make a failing result of their own."""
    recorded = Recorded(load_file(goldens / "modules.safetensors"))
    checks = [
        autoencoder_check(recorded, model),
        vision_check(recorded, parts, goldens),
        timestep_check(recorded, parts),
        table_check(recorded, parts),
        rotary_check(recorded, parts),
        shift_check(recorded),
    ]
    unread = recorded.unread()
    if unread:
        checks.append(Comparison("modules/unknown", failures=[f"tensors this checker does not know: {', '.join(unread)}"], compared=1))
    return [check.result() for check in checks]


class Recorded:
    """The recorded tensors, on the device that computes; remembers which were read."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors
        self._read: set[str] = set()

    def __getitem__(self, name: str) -> Tensor:
        self._read.add(name)
        return self._tensors[name].to(platform.device())

    def names(self, prefix: str) -> list[str]:
        """Names that begin so."""
        return sorted(name for name in self._tensors if name.startswith(prefix))

    def unread(self) -> list[str]:
        """Names nothing asked for."""
        return sorted(set(self._tensors) - self._read)


def autoencoder_check(recorded: Recorded, model: GoldenModel) -> Comparison:
    """Moments, the sampled and scaled latent, the decoded picture."""
    check, autoencoder = Comparison("modules/vae"), model.autoencoder
    mean, logvar = autoencoder.encode_moments(recorded["vae.image"])
    check.close("mean", mean, recorded["vae.mean"])
    check.close("log variance", logvar, recorded["vae.logvar"])
    check.close("latent", autoencoder.sample(mean, logvar, recorded["vae.posterior_noise"]), recorded["vae.encoded_scaled"])
    check.close("decoded", autoencoder.decode(recorded["vae.encoded_scaled"]), recorded["vae.decoded"])
    return check


def vision_check(recorded: Recorded, parts: Parts, goldens: Path) -> Comparison:
    """The tower layer by layer. Its input, which is not recorded here, is the beginning of a training batch."""
    check, tower = Comparison("modules/vit"), parts.vision
    lengths = recorded["vit.seqlens"].tolist()
    patches, ids = first_images(goldens, lengths)
    seen: dict[str, Tensor] = {}
    vision = tower.vit_model.vision_model
    stages = {"embed": vision.embeddings, "out": vision.post_layernorm, "connector": tower.connector}
    stages |= {f"layer_{number}": layer for number, layer in enumerate(vision.encoder.layers)}
    hooks = [
        module.register_forward_hook(lambda _module, _inputs, output, name=name: seen.__setitem__(name, output))
        for name, module in stages.items()
    ]
    # Image by image: among each other the tower may reorder them inside.
    outputs: dict[str, list[Tensor]] = {}
    for one, one_ids in zip(patches.split(lengths), ids.split(lengths), strict=True):
        seen["connector_plus_pos"] = tower(one, one_ids, [len(one)])
        for name, output in seen.items():
            outputs.setdefault(name, []).append(output)
    for hook in hooks:
        hook.remove()
    for name, parts_of_images in outputs.items():
        check.close(name, torch.cat(parts_of_images), recorded[f"vit.{name}"])
    together = tower(patches, ids, lengths)
    check.close("all images in one call", together, recorded["vit.connector_plus_pos"])
    return check


def first_images(goldens: Path, lengths: list[int]) -> tuple[Tensor, Tensor]:
    """Patches and position ids of the batch whose first ViT images have these lengths."""
    for file in sorted((goldens / "batches").glob("*.safetensors")):
        batch = load_file(file)
        if "vit_token_seqlens" in batch and batch["vit_token_seqlens"][: len(lengths)].tolist() == lengths:
            tokens = sum(lengths)
            device = platform.device()
            return batch["packed_vit_tokens"][:tokens].float().to(device), batch["packed_vit_position_ids"][:tokens].to(device)
    raise ValueError(f"no batch in {goldens / 'batches'} begins with ViT images of {lengths} tokens, as vit.seqlens in modules.safetensors")


def timestep_check(recorded: Recorded, parts: Parts) -> Comparison:
    """Sinusoid and MLP."""
    check, embedder, t = Comparison("modules/time"), parts.decoder.time_embedder, recorded["time.t"]
    check.close("sinusoid", embedder.sinusoid(t), recorded["time.sinusoid"])
    check.close("embedding", embedder(t), recorded["time.out"])
    return check


def table_check(recorded: Recorded, parts: Parts) -> Comparison:
    """Some rows of the latent position table, in ascending order. Which ones is not recorded: each is compared with the nearest."""
    check, table, rows = Comparison("modules/latent_pos_embed"), parts.decoder.latent_pos_embed, recorded["latent_pos_embed"]
    nearest = [int((table - row).abs().amax(1).argmin()) for row in rows]
    check.close("rows", table[nearest], rows)
    # A table with rows and columns exchanged holds the same rows, but out of order.
    check.same("order of the rows", nearest, sorted(set(nearest)))
    return check


def rotary_check(recorded: Recorded, parts: Parts) -> Comparison:
    """Cosines and sines of rotary positions."""
    check, llm = Comparison("modules/rope"), parts.arch.llm
    cos, sin = rotary_table(recorded["rope.pos"], llm.head_dim, llm.rope_theta)
    check.close("cos", cos, recorded["rope.cos"])
    check.close("sin", sin, recorded["rope.sin"])
    return check


def shift_check(recorded: Recorded) -> Comparison:
    """Sigmoid and shift of raw timesteps, the shift in the tensor's name."""
    check, raw = Comparison("modules/tshift"), recorded["tshift.raw"]
    for name in recorded.names("tshift."):
        if name != "tshift.raw":
            check.close(name, shift_timesteps(raw, float(name.removeprefix("tshift."))), recorded[name])
    return check
