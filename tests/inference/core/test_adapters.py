# SPDX-License-Identifier: Apache-2.0
"""An adapter that ``--adapter`` merges while a model loads answers and draws as the adapter beside its base does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from megatron_bagel.checkpoint.dist.stored_adapter import identify
from megatron_bagel.checkpoint.hf.adapter_map import AdapterMap
from megatron_bagel.checkpoint.hf.folder import HFFolder
from megatron_bagel.checkpoint.hf.load import load_weights
from megatron_bagel.checkpoint.hf.peft_folder import write_peft_folder
from megatron_bagel.checkpoint.hf.weight_map import WeightMap
from megatron_bagel.config.lora import LoraSettings
from megatron_bagel.inference.core.context import Context, GuidedContext
from megatron_bagel.inference.core.engine import Engine
from megatron_bagel.inference.core.guidance import Guidance
from megatron_bagel.inference.core.image import decode_picture, generate_latents
from megatron_bagel.inference.core.image_sampling import ImageSampling
from megatron_bagel.inference.core.load_engine import LoadOptions, load_engine
from megatron_bagel.model.build import build_decoder
from tests.model.test_lora import released

LORA = LoraSettings(rank=3, alpha=6.0, experts="both", targets=("qkv", "proj", "fc1", "fc2", "vae2llm", "llm2vae"))
GRID = (2, 3)


def unmerged(engine: Engine, folder: Path, adapter_map: AdapterMap) -> Engine:
    """The engine with random adapters beside the weights of its decoder."""
    decoder = build_decoder(engine.arch, engine.decoder.config, lora=LORA).eval()
    load_weights(HFFolder(folder).weights("ema"), WeightMap(engine.arch), [decoder])
    adapter_map.initialise([decoder], seed=1)
    generator = torch.Generator().manual_seed(0)
    for _, parameter in adapter_map.adapter_entries([decoder]):
        parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return replace(engine, decoder=decoder)


@torch.no_grad()
def outputs(engine: Engine) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits of a text, and latents and pixels of a picture that four guided steps draw from words."""
    ids = engine.tokenizer.encode("a red circle on a green background.")
    (logits,) = engine.logits_of([Context()], [[engine.tokenizer.bos, *ids]])
    (context,) = engine.add_text([Context()], [ids])
    noise = torch.randn(GRID[0] * GRID[1], engine.arch.latent_token_dim, generator=torch.Generator().manual_seed(3))
    sampling = ImageSampling(num_timesteps=5, guidance=Guidance(text_scale=3.0, img_scale=1.0, interval=(0.0, 1.0)))
    (latents,) = generate_latents(engine, [GuidedContext(context, Context(), context)], [GRID], [noise], sampling)
    return logits, latents, torch.from_numpy(decode_picture(engine, latents, GRID)).int()


def test_a_merged_adapter_answers_and_draws_as_the_unmerged_one(engine: Engine, tiny_folder: Path, tmp_path: Path) -> None:
    """To 1e-5 in logits and latents; a pixel may round to its neighbour. The base alone differs."""
    adapter_map = AdapterMap(engine.arch, LORA)
    beside = unmerged(engine, tiny_folder, adapter_map)
    base = identify(tiny_folder, "ema")
    factors = released(beside.decoder, adapter_map)
    write_peft_folder(tmp_path / "adapter", LORA, list(adapter_map.entries.values()), factors, base, torch.float32)
    merged = load_engine(tiny_folder, LoadOptions(adapter=str(tmp_path / "adapter")))
    expected, found, plain = outputs(beside), outputs(merged), outputs(engine)
    for name, ours, theirs, without in zip(("logits", "latents"), found, expected, plain, strict=False):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
        assert (ours - without).abs().max() > 1e-2
    assert (found[2] - expected[2]).abs().max() <= 1
