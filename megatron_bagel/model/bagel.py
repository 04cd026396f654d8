# SPDX-License-Identifier: Apache-2.0
"""One pipeline stage of BAGEL's decoder: embeddings, Megatron-Core's ``TransformerBlock`` over MoT layers, two heads."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.enums import ModelType
from megatron.core.tensor_parallel import (
    VocabParallelEmbedding,
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from megatron_bagel.config.architecture import BagelArch
from megatron_bagel.config.parallel_sizes import padded_vocabulary
from megatron_bagel.model.batch import MicroBatch
from megatron_bagel.model.cross_entropy import VocabularyShard, chunked_cross_entropy, cross_entropy
from megatron_bagel.model.embedders import TimestepEmbedder
from megatron_bagel.model.experts import ExpertPair, join, per_expert
from megatron_bagel.model.flow import interpolate, target_velocity
from megatron_bagel.model.keyed_dropout import Draws
from megatron_bagel.model.marks import mark
from megatron_bagel.model.norm import RMSNorm
from megatron_bagel.model.pack_context import AttentionPlan, PackContext
from megatron_bagel.model.positions import sincos_2d


class BagelModel(MegatronModule):
    """One pipeline stage of the decoder. ``pre_process`` stages embed; ``post_process`` stages hold the final norms and the heads.

    Without an autoencoder in ``arch`` (``--visual_gen False``) the latent modules do not exist.
    """

    def __init__(
        self,
        config: TransformerConfig,
        arch: BagelArch,
        spec: ModuleSpec,
        pre_process: bool = True,
        post_process: bool = True,
        vp_stage: int | None = None,
        freeze_und: bool = False,
        vocab_divisor: int = 1,
        ce_chunk_tokens: int = 0,
    ) -> None:
        super().__init__(config=config)
        self.arch, self.freeze_und, self.vp_stage = arch, freeze_und, vp_stage
        self.pre_process, self.post_process, self.ce_chunk_tokens = pre_process, post_process, ce_chunk_tokens
        self.share_embeddings_and_output_weights = arch.llm.tie_word_embeddings
        hidden, has_latents = config.hidden_size, arch.autoencoder is not None
        self.vocab_rows = padded_vocabulary(arch.llm.vocab_size, config.tensor_model_parallel_size, vocab_divisor)
        if pre_process or (post_process and self.share_embeddings_and_output_weights):
            self.embedding = MegatronModule(config)
            self.embedding.word_embeddings = VocabParallelEmbedding(self.vocab_rows, hidden, init_method=config.init_method, config=config)
        if pre_process and has_latents:
            self.vae2llm = nn.Linear(arch.latent_token_dim, hidden)
            self.time_embedder = TimestepEmbedder(hidden)
            table = sincos_2d(hidden, arch.max_latent_size)
            self.register_buffer("latent_pos_embed", table, persistent=False)
        # The final norms need the token counts of the experts, which the final norm of TransformerBlock would not receive.
        self.decoder = TransformerBlock(
            config, spec, post_layer_norm=False, pre_process=pre_process, post_process=post_process, vp_stage=vp_stage
        )
        if post_process:
            self._build_heads(has_latents)
        self._mark_shared_embedding()
        #: Whether gradients flow into the first layer even if no embedding trains, as recomputation and the schedules need for adapters.
        self.input_requires_grad = False
        self.model_type = ModelType.encoder_or_decoder

    def _build_heads(self, has_latents: bool) -> None:
        config, arch = self.config, self.arch
        two_experts = arch.llm.has_gen_mlp
        self.final_layernorm = ExpertPair(config, lambda: RMSNorm(config, config.hidden_size, config.layernorm_epsilon), two_experts)
        self.output_layer = ColumnParallelLinear(
            config.hidden_size, self.vocab_rows, config=config, init_method=config.init_method, bias=False,
            skip_weight_param_allocation=self.share_embeddings_and_output_weights,
        )  # fmt: skip
        # Loss tokens are gathered from all ranks before the head, so the head sees complete rows.
        self.output_layer.sequence_parallel = False
        self.output_layer.allreduce_dgrad = config.tensor_model_parallel_size > 1
        if has_latents:
            self.llm2vae = nn.Linear(config.hidden_size, arch.latent_token_dim)
            # An untrained head predicts no motion, as in the original's initialisation.
            nn.init.zeros_(self.llm2vae.weight)
            nn.init.zeros_(self.llm2vae.bias)

    def _mark_shared_embedding(self) -> None:
        """Mark tied embeddings on different stages: Megatron sums their gradients, and only the first stage's count in norms."""
        weight = self.shared_embedding_or_output_weight()
        if weight is None or (self.pre_process and self.post_process):
            return
        # The mark gives the weight a separate bucket, so that both stages shard it identically over the data-parallel ranks.
        mark(weight, shared_embedding=True, shared=self.post_process)

    def set_input_tensor(self, input_tensor: torch.Tensor | list[torch.Tensor]) -> None:
        """Receive the previous stage's hidden states from Megatron's schedules."""
        self.decoder.set_input_tensor(input_tensor[0] if isinstance(input_tensor, list) else input_tensor)

    def shared_embedding_or_output_weight(self) -> torch.Tensor | None:
        """Return the weight that the first and the last stage share if embeddings are tied; Megatron sums its gradients."""
        if self.share_embeddings_and_output_weights and hasattr(self, "embedding"):
            return self.embedding.word_embeddings.weight
        return None

    def embed_text(self, ids: torch.Tensor) -> torch.Tensor:
        """Embed token ids [n] as [n, h]."""
        return self.embedding.word_embeddings(ids)

    def embed_times(self, t: torch.Tensor) -> torch.Tensor:
        """Embed timesteps ``t`` [n] in [0, 1] as [n, h]."""
        return self.time_embedder(t)

    def embed_latents(self, x_t: torch.Tensor, times: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        """Embed latent tokens ``x_t`` [n, p * p * z] at table rows ``position_ids`` [n] as [n, h].

        ``times`` [n, h], or [1, h] for tokens of one time, comes from ``embed_times``.
        """
        dtype = self.vae2llm.weight.dtype
        return self.vae2llm(x_t.to(dtype)) + times + self.latent_pos_embed[position_ids].to(dtype)

    def embed(self, batch: MicroBatch) -> torch.Tensor:
        """Return the hidden states of all slots, [length, h]."""
        und = self.embed_text(batch.text_ids)
        if batch.vit_features is not None:
            und = torch.cat([und, batch.vit_features.to(und.dtype)])
        gen = und[:0]
        if self.freeze_und:
            # A tied embedding on a stage without the head still gets (zero) gradients, because gradient reduction waits for them.
            und = und * 0 + und.detach() if self.share_embeddings_and_output_weights and not self.post_process else und.detach()
        if self.arch.autoencoder is not None:
            x_t = interpolate(batch.latents, batch.noise, batch.timesteps)
            # Tokens of one image share a timestep, so the MLP runs once per distinct value.
            times = self.embed_times(batch.time_values)[batch.time_rows]
            gen = self.embed_latents(x_t, times, batch.latent_position_ids)
        return join([und, gen], batch.length)

    def decode(
        self,
        hidden: torch.Tensor | None,
        n_und: int,
        n_gen: int,
        position_ids: torch.Tensor,
        attention: AttentionPlan,
        draws: Draws | None = None,
    ) -> torch.Tensor:
        """Run this stage's layers; the final norm is not applied.

        Args:
            hidden: Hidden states [length, h], or None on later stages.
            n_und: Tokens of the understanding expert.
            n_gen: Tokens of the generation expert.
            position_ids: RoPE positions of the slots, [length].
            attention: The attention plan of the pack.
            draws: The random words of the tokens, for the dropout of adapters.

        Returns:
            Hidden states [length, 1, h], or this rank's share of the rows under sequence parallelism.
        """
        llm = self.arch.llm
        dtype = self.config.params_dtype
        context = PackContext.of(n_und, n_gen, position_ids, attention, llm.head_dim, llm.rope_theta, dtype)
        if draws is not None:
            context.draws = (Draws(draws.words[:n_und]), Draws(draws.words[n_und : n_und + n_gen]))
        if hidden is not None:
            if self.input_requires_grad and torch.is_grad_enabled() and not hidden.requires_grad:
                hidden = hidden.requires_grad_()
            if self.config.sequence_parallel:
                hidden = scatter_to_sequence_parallel_region(hidden)
            hidden = hidden.unsqueeze(1)
        return self.decoder(hidden_states=hidden, attention_mask=None, packed_seq_params=context)

    def final_norm(self, hidden: torch.Tensor, n_und: int, n_gen: int) -> torch.Tensor:
        """Apply each expert's final norm; return rows [n_und + n_gen, h], complete on every tensor-parallel rank."""
        hidden = hidden.squeeze(1)
        first_slot = 0
        if self.config.sequence_parallel:
            first_slot = parallel_state.get_tensor_model_parallel_rank() * hidden.shape[0]
        und, gen = per_expert(self.final_layernorm, *PackContext.slice_by_expert(hidden, first_slot, n_und, n_gen))
        normed = join([und.detach() if self.freeze_und else und, gen], hidden.shape[0])
        if self.config.sequence_parallel:
            # The heads' input gradients are already complete on every rank, so the backward pass slices instead of summing.
            normed = gather_from_sequence_parallel_region(normed, tensor_parallel_output_grad=False)
        return normed[: n_und + n_gen]

    def run_decoder(self, hidden: torch.Tensor, n_und: int, position_ids: torch.Tensor, attention: AttentionPlan) -> torch.Tensor:
        """Run all layers and the final norms on unpadded hidden states [n, h], for inference."""
        n_gen = hidden.shape[0] - n_und
        return self.final_norm(self.decode(hidden, n_und, n_gen, position_ids, attention), n_und, n_gen)

    def text_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return this rank's share of the logits of ``hidden`` [n, h], [n, V / tp]. Rows that pad the vocabulary give -inf."""
        weight = self.shared_embedding_or_output_weight()
        if weight is not None and not self.pre_process:
            # Called only for its hooks: overlapped parameter gathering waits there for the weight that the head reads next.
            self.embedding.word_embeddings(torch.zeros(0, dtype=torch.long, device=hidden.device))
        logits = self.output_layer(hidden, weight=weight)[0]
        first_token = parallel_state.get_tensor_model_parallel_rank() * logits.shape[-1]
        tokens = min(max(self.arch.llm.vocab_size - first_token, 0), logits.shape[-1])
        return F.pad(logits[..., :tokens], (0, logits.shape[-1] - tokens), value=float("-inf")) if tokens < logits.shape[-1] else logits

    def all_text_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the logits of the full vocabulary, [n, V], on every tensor-parallel rank: each chooses the next token."""
        return gather_from_tensor_model_parallel_region(self.text_logits(hidden))

    def velocity(self, hidden: torch.Tensor) -> torch.Tensor:
        """Predict the velocity of hidden states [n, h], [n, p * p * z]."""
        return self.llm2vae(hidden)

    def losses(self, hidden: torch.Tensor, batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the unreduced cross entropy [n_ce] and squared velocity error [n_mse, p * p * z], both fp32.

        Without loss tokens the results are empty but stay connected to the heads. Every parameter then gets a (zero) gradient
        on every rank, which overlapped gradient reduction waits for.
        """
        normed = self.final_norm(hidden, batch.n_und, batch.n_vae)
        ce, predicted = self._text_losses(normed.index_select(0, batch.ce_slots), batch.labels), self._velocities(normed, batch)
        if self.arch.autoencoder is None:
            return ce, predicted
        target = target_velocity(batch.latents, batch.noise).index_select(0, batch.mse_rows)
        return ce, (predicted - target.float()) ** 2

    def predictions(self, hidden: torch.Tensor, batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the logits [n_ce, V / tp] and velocities [n_mse, p * p * z] of the loss tokens, both fp32."""
        normed = self.final_norm(hidden, batch.n_und, batch.n_vae)
        return self.text_logits(normed.index_select(0, batch.ce_slots)).float(), self._velocities(normed, batch)

    def _velocities(self, normed: torch.Tensor, batch: MicroBatch) -> torch.Tensor:
        if self.arch.autoencoder is None:
            return normed.new_zeros((0, 1), dtype=torch.float32)
        return self.velocity(normed.index_select(0, batch.mse_slots)).float()

    def _text_losses(self, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the unreduced cross entropy [n] of the loss tokens [n, h]."""
        if not self.ce_chunk_tokens:
            return cross_entropy(self.text_logits(hidden).float(), labels)
        with torch.no_grad():
            # Called only for its hooks: overlapped parameter gathering waits there for the weight that is read next.
            self.text_logits(hidden[:0])
        weight, tied = self.shared_embedding_or_output_weight(), self.share_embeddings_and_output_weights
        weight = self.output_layer.weight if weight is None else weight
        shard = VocabularyShard.of(self.arch.llm.vocab_size, weight.shape[0])
        return chunked_cross_entropy(hidden, weight, labels, shard, self.ce_chunk_tokens, tied)

    def forward(self, batch: MicroBatch) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Return losses (or predictions) on the last stage, and hidden states [length, 1, h] on the others."""
        hidden = self.embed(batch) if self.pre_process else None
        hidden = self.decode(hidden, batch.n_und, batch.n_vae, batch.position_ids, batch.attention, batch.draws)
        if not self.post_process:
            return hidden
        return self.predictions(hidden, batch) if batch.predict else self.losses(hidden, batch)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> ShardedStateDict:
        """Shard every parameter of the stage for dist_checkpointing."""
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        head = f"{prefix}output_layer.weight"
        if head in state:
            # Megatron-Core does the same for embeddings: the rows that pad the vocabulary depend on the parallel sizes.
            state[head] = replace(state[head], allow_shape_mismatch=True)
        key = f"{prefix}embedding.word_embeddings.weight"
        if key in state and not self.pre_process:
            # With tied embeddings the first stage's copy is saved, and this copy on the last stage is a replica.
            state[key] = replace(state[key], replica_id=(1, *state[key].replica_id[1:]))
        return state
