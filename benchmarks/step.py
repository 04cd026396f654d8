# SPDX-License-Identifier: Apache-2.0
"""One training step of a named config, timed part by part: encode, forward, backward, update, EMA. fp32 on a CPU, bf16 on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import NoLaps, Stopwatch, matmul_gflops
from benchmarks.named_configs import CONFIGS, SEED, bench_pack, megatron_config
from megatron_bagel import platform
from megatron_bagel.config.architecture import BagelArch
from megatron_bagel.costs.flops import StepWork, mfu_flops, work_flops
from megatron_bagel.encoders.autoencoder import AutoEncoder, VaeKernels
from megatron_bagel.encoders.image_encoding import encode_latents, patch_values, tower_images
from megatron_bagel.encoders.tower_pass import tower_pass
from megatron_bagel.encoders.vision_tower import VisionTower
from megatron_bagel.layout.order import expert_order
from megatron_bagel.layout.pack import Pack
from megatron_bagel.model.batch import Features, make_microbatch
from megatron_bagel.model.build import build_decoder
from megatron_bagel.model.kernels.choice import KernelsName
from megatron_bagel.platform.side_stream import SideStream
from megatron_bagel.training.losses import LossTotals, LossWeights, microbatch_loss
from megatron_bagel.training.optim.ema import ShardedEma
from megatron_bagel.training.optim.one_pass import StateDtype
from megatron_bagel.training.optim.optimizer import OptimizerSettings, build_optimizer, finalize_gradients, optimizer_step, wrap_ddp


@dataclass
class Inputs:
    """What the loader and the keyed generators would hand to the step. Patches stay on the host, as the vision tower takes them there."""

    images: list[Tensor]
    patches: Tensor
    posterior_noise: list[Tensor]
    noise: Tensor
    timesteps: Tensor


def random_inputs(pack: Pack, arch: BagelArch) -> Inputs:
    """Pixels in [-1, 1] and draws of the right shapes."""
    generator, device = torch.Generator().manual_seed(SEED), platform.device()
    downsample, channels = arch.autoencoder.downsample, arch.autoencoder.z_channels
    vae = pack.images_of("vae")
    images = [torch.rand(3, image.height, image.width, generator=generator) * 2 - 1 for image in vae]
    posterior = [torch.randn(channels, i.height // downsample, i.width // downsample, generator=generator) for i in vae]
    per_image = [torch.rand((), generator=generator) if image.noised else torch.zeros(()) for image in vae]
    timesteps = torch.cat([t.expand(image.tokens) for t, image in zip(per_image, vae, strict=True)])
    patches = torch.rand(len(pack.vit_positions), 3 * 14 * 14, generator=generator) * 2 - 1
    noise = torch.randn(len(pack.vae_positions), arch.latent_token_dim, generator=generator)
    return Inputs([x.to(device) for x in images], patches, [x.to(device) for x in posterior], noise.to(device), timesteps.to(device))


@dataclass(frozen=True)
class StepOptions:
    """What a measured step may change. The defaults are those of a run.

    Attributes:
        recompute_layers: Activation checkpointing of the first layers of the decoder, and of the ViT if it is not 0.
        backend: The attention; None is flex on a GPU and sdpa on a CPU.
        transformer_impl: The implementation of the decoder's modules.
        vae_bf16: Whether the autoencoder runs under bf16 autocast.
        vae_kernels: How the autoencoder encodes.
        overlap_vae: Whether the latents of the next step are encoded on a second stream beside this step's backward pass.
        stored_latents: Whether latents come from a cache, so that the autoencoder does not run.
        vit_chunk_tokens: The ViT tokens whose activations exist at one time; None keeps those of the step.
        ce_chunk_tokens: The loss tokens whose logits exist at one time; 0 keeps all.
        fused_kernels: The elementwise kernels of the decoder.
        one_pass: Whether moments, weights and averages are updated in one pass.
        optimizer_state_dtype: The type of the moments.
    """

    recompute_layers: int = 0
    backend: str | None = None
    transformer_impl: str = "local"
    vae_bf16: bool = False
    vae_kernels: VaeKernels = "plain"
    overlap_vae: bool = False
    stored_latents: bool = False
    vit_chunk_tokens: int | None = None
    ce_chunk_tokens: int = 0
    fused_kernels: KernelsName = "eager"
    one_pass: bool = False
    optimizer_state_dtype: StateDtype = "fp32"


class BenchStep:
    """Model, optimizer and EMA of a config on its pack, with the parts of a training step as methods."""

    def __init__(self, arch: BagelArch, pack: Pack, options: StepOptions = StepOptions()) -> None:
        device, bf16 = platform.device(), platform.has_gpu()
        dtype = torch.bfloat16 if bf16 else torch.float32
        config = megatron_config(arch, options.recompute_layers, bf16)
        self.arch, self.pack, self.inputs = arch, pack, random_inputs(pack, arch)
        self.options = options
        self.images = tower_images(pack, self.inputs.patches.split([image.tokens for image in pack.images_of("vit")]))
        self.backend = options.backend or ("flex" if platform.has_gpu() else "sdpa")
        self.vae = AutoEncoder(arch.autoencoder).use_kernels(options.vae_kernels).to(device).requires_grad_(False)
        self.tower_pass = tower_pass(device, options.vit_chunk_tokens)
        vision = VisionTower(arch, options.recompute_layers > 0)
        vision.reset_parameters(torch.Generator().manual_seed(SEED))
        decoder = build_decoder(
            arch,
            config,
            transformer_impl=options.transformer_impl,
            ce_chunk_tokens=options.ce_chunk_tokens,
            fused_kernels=options.fused_kernels,
        )
        # The head starts at zero, which would leave the decoder without a gradient from the images.
        torch.nn.init.normal_(decoder.llm2vae.weight, std=0.02)
        settings = OptimizerSettings(lr=1e-4, bf16=bf16, one_pass=options.one_pass, state_dtype=options.optimizer_state_dtype)
        self.modules = wrap_ddp(config, [decoder.to(device, dtype), vision.to(device, dtype)], settings)
        self.optimizer = build_optimizer(self.modules, settings)
        self.ema = ShardedEma(dict(zip(("decoder", "vision"), self.modules, strict=True)), self.optimizer, 0.9999)
        self.totals = LossTotals.of([pack])
        self.parameters = sum(p.numel() for module in self.modules for p in module.parameters())
        self.side = SideStream(device)
        self.early: Callable[[], list[Tensor]] | None = None
        self.stored: Tensor | None = None
        if options.stored_latents:
            self.stored = self.latents()

    def latents(self) -> Tensor:
        """The latents of the step: encoded now or beside the step before, or as a cache would hand them out."""
        if self.stored is not None:
            return self.stored
        if self.early is not None:
            (latents,) = self.early()
            return latents
        return self.encoded_latents()

    def encoded_latents(self) -> Tensor:
        """The latents of the step's pictures, encoded on the current stream."""
        with torch.autocast(platform.device().type, torch.bfloat16, enabled=self.options.vae_bf16):
            return encode_latents(self.vae, self.inputs.images, self.inputs.posterior_noise, self.arch.latent_patch_size)

    def run(self, watch: Stopwatch | NoLaps) -> float:
        """One step; returns its loss."""
        watch.start()
        for module in self.modules:
            module.zero_grad_buffer()
        self.optimizer.zero_grad()
        watch.lap("zero_grad")
        latents = self.latents()
        watch.lap("autoencoder")
        device, pack = latents.device, self.pack
        features = self.tower_pass.encode(self.modules[1], self.images, patch_values(self.arch.vit)).requires_grad_()
        watch.lap("vit_forward")
        whole = Features(features, latents, self.inputs.noise, self.inputs.timesteps)
        batch = make_microbatch(pack, expert_order(pack), whole, self.backend, device)
        watch.lap("batch")
        ce, mse = self.modules[0](batch)
        loss, _ = microbatch_loss(ce, mse, batch.ce_weights, self.totals, LossWeights())
        watch.lap("decoder_forward")
        if self.options.overlap_vae:
            # A lap waits for the device, so the latents of the next round run beside the longest one.
            self.early = self.side.queue(lambda: [self.encoded_latents()])
        loss.backward()
        self.tower_pass.backward(features.grad)
        watch.lap("backward")
        finalize_gradients(self.modules)
        self.ema.prepare()
        optimizer_step(self.optimizer)
        watch.lap("optimizer")
        self.ema.update()
        watch.lap("ema")
        return loss.item()


def measure_step(name: str, rounds: int, warmup: int, options: StepOptions = StepOptions(), pack: Pack | None = None) -> dict[str, Any]:
    """Medians over ``rounds`` steps after ``warmup`` ones, tokens per second, peak memory, and the rate against plain matrix products."""
    arch = CONFIGS[name].arch
    pack = pack or bench_pack(CONFIGS[name])
    step, watch = BenchStep(arch, pack, options), Stopwatch(warmup)
    losses = [step.run(watch) for _ in range(warmup + rounds)]
    return {"config": name, **step_figures(step, watch, losses)}


def step_figures(step: BenchStep, watch: Stopwatch, losses: Sequence[float]) -> dict[str, Any]:
    """The figures of a step that was run: medians, tokens per second, peak memory, and the rate against plain matrix products."""
    arch, pack, options = step.arch, step.pack, step.options
    work = StepWork.of(pack)
    parts = work_flops(arch, work)
    if options.stored_latents:
        parts = replace(parts, autoencoder=0.0)
    parts_s, rounds = watch.medians(), watch.rounds()
    seconds = sorted(rounds)[len(rounds) // 2]
    dtype = torch.bfloat16 if platform.has_gpu() else torch.float32
    gflops = matmul_gflops(work.tokens // 2, arch.llm.hidden_size, 2 * arch.llm.intermediate_size, dtype=dtype)
    return {
        "attention_backend": step.backend,
        "transformer_impl": options.transformer_impl,
        "fused_kernels": options.fused_kernels,
        "vae_encode_bf16": options.vae_bf16,
        "overlap_vae_encode": options.overlap_vae,
        "dtype": str(dtype).removeprefix("torch."),
        "recompute_layers": options.recompute_layers,
        "parameters": step.parameters,
        "samples": len(pack.samples),
        "images": {kind: len(pack.images_of(kind)) for kind in ("vit", "vae")},
        "tokens": work.tokens,
        "generation_tokens": work.vae_tokens,
        "step_s": seconds,
        "tokens_per_s": work.tokens / seconds,
        "parts_s": parts_s,
        "peak_mem_bytes": platform.peak_memory_bytes(),
        "mfu_formula_flops": mfu_flops(arch.llm, work),
        "work_flops": asdict(parts),
        "achieved_gflops": parts.total / seconds / 1e9,
        "matmul_gflops": gflops,
        "share_of_matmul_rate": parts.total / seconds / 1e9 / gflops,
        "first_loss": losses[0],
        "last_loss": losses[-1],
    }
