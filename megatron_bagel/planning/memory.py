# SPDX-License-Identifier: Apache-2.0
"""Computes the peak memory of a rank: what it has between steps, activations by recomputation mode, buffers, encoders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from megatron_bagel.config.parallel_sizes import encoders_on_all_ranks
from megatron_bagel.costs.inputs import CostInputs
from megatron_bagel.costs.memory import MemoryModel, RankMemory
from megatron_bagel.planning.activations import FP32, ActivationModel, Recompute, modes
from megatron_bagel.planning.rank_tokens import RankTokens, largest


@dataclass(frozen=True)
class StageMemory:
    """Bytes of a rank of one pipeline stage.

    Attributes:
        stage: The number of the stage.
        static: What the rank has between steps.
        activations: Activations of all microbatches in flight with the chosen recomputation.
        by_mode: The same for each mode of recomputation.
        buffers: Position tables, inputs of all microbatches, hidden states that stages exchange, and the largest temporary tensor.
        encoders: Weights of the autoencoder and, unless ``encoder_memory`` is constant, activations of the ViT. With
            ``overlap_vae_encode`` also the latents of the next step and the workspace of a second stream, which keeps its memory.
        encoding: Workspace of the autoencoder or, with constant encoder memory, activations of a chunk of the ViT, whichever is larger.
            It is free while the decoder has activations, so the peak counts the larger of the two.
    """

    stage: int
    static: RankMemory
    activations: int
    by_mode: dict[str, int]
    buffers: int
    encoders: int
    encoding: int

    @property
    def peak(self) -> int:
        """Return the peak bytes in a step, without what CUDA and the allocator take."""
        static = self.static
        between_steps = static.weight_bytes + static.gradient_bytes + static.optimizer_bytes + static.average_bytes
        return between_steps + self.buffers + self.encoders + max(self.activations, self.encoding)

    def to_dict(self) -> dict[str, object]:
        """Return the bytes for JSON."""
        return {
            "stage": self.stage, **{name: value for name, value in asdict(self.static).items() if name != "autoencoder_bytes"},
            "activation_bytes": self.activations, "activation_bytes_by_recompute": self.by_mode, "buffer_bytes": self.buffers,
            "encoder_bytes": self.encoders, "encoding_workspace_bytes": self.encoding, "peak_bytes": self.peak,
        }  # fmt: skip


class PeakMemory:
    """Computes the memory of the stages of a run for given packs."""

    def __init__(self, inputs: CostInputs, memory_model: MemoryModel | None = None) -> None:
        self.arch, self.megatron, self.frozen = inputs.arch, inputs.megatron, inputs.frozen
        self.memory_model, self.activations = memory_model or MemoryModel(inputs), ActivationModel(inputs)

    def stage(self, stage: int, packs: Sequence[RankTokens], recompute: Recompute | None = None) -> StageMemory:
        """Return the memory of a rank of ``stage`` whose replica trains on ``packs`` in a step."""
        static, tokens, recompute = self.memory_model.rank(stage), largest(packs), recompute or Recompute.of(self.megatron)
        vit, constant = self._vit_activations(stage, packs), self.megatron.encoder_memory == "constant"
        workspace = self._encoding(packs) if static.autoencoder_bytes else 0
        ahead = workspace + self._early_latents(packs) if static.autoencoder_bytes and self.megatron.overlap_vae_encode else 0
        compared_modes = modes(max(map(len, self.activations.chunks(stage))))
        by_mode = {name: self._in_flight(stage, tokens, len(packs), mode) for name, mode in compared_modes.items()}
        return StageMemory(
            stage=stage,
            static=static,
            activations=self._in_flight(stage, tokens, len(packs), recompute),
            by_mode=by_mode,
            buffers=self._buffers(stage, packs, tokens),
            encoders=static.autoencoder_bytes + (0 if constant else vit) + ahead,
            encoding=max(workspace, vit if constant else 0),
        )

    def stages(self, packs: Sequence[RankTokens], recompute: Recompute | None = None) -> list[StageMemory]:
        """Return the memory of a rank of each stage."""
        return [self.stage(stage, packs, recompute) for stage in range(self.megatron.pipeline_model_parallel_size)]

    def _in_flight(self, stage: int, tokens: RankTokens, microbatches: int, recompute: Recompute) -> int:
        """Return the activation bytes of all microbatches in flight, and of what is recomputed at one time."""
        model = self.activations
        microbatch = model.microbatch(stage, tokens, recompute)
        return round(model.in_flight(stage, microbatches) * microbatch) + model.working_set(stage, tokens, recompute)

    def _buffers(self, stage: int, packs: Sequence[RankTokens], tokens: RankTokens) -> int:
        """Return the bytes of the ``buffers`` of a stage."""
        arch, model, stages = self.arch, self.activations, self.megatron.pipeline_model_parallel_size
        hidden, width = arch.llm.hidden_size, model.bytes
        buffers = 0
        if arch.autoencoder is not None and stage == 0:
            buffers += arch.max_latent_size**2 * hidden * width
        if arch.vit is not None and (stage == 0 or encoders_on_all_ranks(self.megatron)):
            buffers += arch.vit_max_num_patch_per_side**2 * hidden * width
        if stage in (0, stages - 1):
            # Latents and noise of the step's packs; ViT features and their gradient.
            buffers += sum(2 * pack.gen * arch.latent_token_dim * FP32 for pack in packs)
        if stage == 0:
            buffers += sum(2 * pack.vit * hidden * width for pack in packs)
        if stages > 1:
            # Received and sent hidden states and gradients. What was sent stays until its backward pass.
            buffers += round((model.in_flight(stage, len(packs)) + 3) * model.hidden_bytes(tokens))
        gradient = model.mlp_gradient(tokens) + 2 * model.hidden_bytes(tokens)
        if stage == stages - 1:
            # The gradient of the log probabilities has their size, in fp32.
            loss_tokens = min(tokens.ce, self.megatron.ce_chunk_tokens or tokens.ce)
            gradient = max(gradient, loss_tokens * FP32 * -(-arch.llm.vocab_size // model.tp))
        return buffers + gradient

    def _share(self, stage: int) -> float:
        """Return the share of a replica's ViT images that a rank of ``stage`` encodes."""
        megatron = self.megatron
        ranks = megatron.tensor_model_parallel_size * megatron.pipeline_model_parallel_size * megatron.context_parallel_size
        if encoders_on_all_ranks(megatron):
            return 1 / ranks
        return 1.0 if stage == 0 else 0.0

    def _vit_activations(self, stage: int, packs: Sequence[RankTokens]) -> int:
        """Return the bytes that the vision tower saves.

        Its backward pass is after the last microbatch's, so it saves them for all images of the step, or for one chunk of them.
        """
        vit, share = self.arch.vit, self._share(stage)
        sizes = [image.tokens for pack in packs for image in pack.images if image.kind == "vit"]
        if vit is None or not sizes or not share:
            return 0
        tokens = sum(sizes) * share
        if self.megatron.encoder_memory == "constant":
            tokens = min(tokens, max(self.megatron.encoder_chunk_tokens, *sizes))
        width, v, h = self.activations.bytes, vit.hidden_size, self.arch.llm.hidden_size
        patches = vit.num_channels * vit.patch_size**2 * width
        statistics = 4 * FP32 + FP32 * vit.num_attention_heads
        # Norm inputs and outputs, queries, keys, values, attention's result and its copy, and the MLP's two.
        layer = (9 * v + 2 * vit.intermediate_size) * width + statistics
        connector = (2 * v + 2 * h) * width
        if not self.frozen.tower_backward:
            return round(tokens * (v * width + 2 * h * width))
        if self.megatron.recompute_vit:
            return round(tokens * (patches + self.arch.n_vit_layers * v * width + 2 * v * width) + layer * tokens)
        return round(tokens * (patches + self.arch.n_vit_layers * layer + connector))

    def _early_latents(self, packs: Sequence[RankTokens]) -> int:
        """Return the bytes of the latents that a rank encodes for the next step, taken to be as large as this one."""
        megatron = self.megatron
        ranks = megatron.tensor_model_parallel_size * megatron.pipeline_model_parallel_size * megatron.context_parallel_size
        share = 1 / ranks if encoders_on_all_ranks(megatron) else 1.0
        tokens = sum(image.tokens for pack in packs for image in pack.images if image.kind == "vae")
        return round(tokens * share * self.arch.latent_token_dim * FP32)

    def _encoding(self, packs: Sequence[RankTokens]) -> int:
        """Return the workspace of the autoencoder: four tensors in a residual block of the largest image at full resolution."""
        if self.arch.autoencoder is None:
            return 0
        pixels = max((image.height * image.width for pack in packs for image in pack.images if image.kind == "vae"), default=0)
        return 4 * pixels * self.arch.autoencoder.ch * FP32
