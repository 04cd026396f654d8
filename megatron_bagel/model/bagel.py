"""The decoder of BAGEL as one pipeline stage: embeddings, Megatron-Core's TransformerBlock over MoT layers, two heads."""

from __future__ import annotations

from dataclasses import replace

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
    vocab_parallel_cross_entropy,
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
from megatron_bagel.model.embedders import TimestepEmbedder
from megatron_bagel.model.experts import ExpertPair, join, per_expert
from megatron_bagel.model.flow import interpolate, target_velocity
from megatron_bagel.model.norm import RMSNorm
from megatron_bagel.model.pack_context import AttentionPlan, PackContext
from megatron_bagel.model.positions import sincos_2d


class BagelModel(MegatronModule):
    """One stage of the decoder. ``pre_process`` stages embed, ``post_process`` stages hold the final norms and the heads.

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
    ) -> None:
        super().__init__(config=config)
        self.arch, self.freeze_und, self.vp_stage = arch, freeze_und, vp_stage
        self.pre_process, self.post_process = pre_process, post_process
        self.share_embeddings_and_output_weights = arch.llm.tie_word_embeddings
        hidden, draws = config.hidden_size, arch.autoencoder is not None
        self.vocab_rows = padded_vocabulary(arch.llm.vocab_size, config.tensor_model_parallel_size, vocab_divisor)
        if pre_process or (post_process and self.share_embeddings_and_output_weights):
            self.embedding = MegatronModule(config)
            self.embedding.word_embeddings = VocabParallelEmbedding(self.vocab_rows, hidden, init_method=config.init_method, config=config)
        if pre_process and draws:
            self.vae2llm = nn.Linear(arch.latent_token_dim, hidden)
            self.time_embedder = TimestepEmbedder(hidden)
            table = sincos_2d(hidden, arch.max_latent_size)
            self.register_buffer("latent_pos_embed", table, persistent=False)
        # The final norms need the expert split, which TransformerBlock's own final norm would not get.
        self.decoder = TransformerBlock(
            config, spec, post_layer_norm=False, pre_process=pre_process, post_process=post_process, vp_stage=vp_stage
        )
        if post_process:
            self._build_heads(draws)
        self._mark_shared_embedding()
        self.model_type = ModelType.encoder_or_decoder

    def _build_heads(self, draws: bool) -> None:
        config, arch = self.config, self.arch
        two = arch.llm.has_gen_mlp
        self.final_layernorm = ExpertPair(config, lambda: RMSNorm(config, config.hidden_size, config.layernorm_epsilon), two)
        self.output_layer = ColumnParallelLinear(
            config.hidden_size, self.vocab_rows, config=config, init_method=config.init_method, bias=False,
            skip_weight_param_allocation=self.share_embeddings_and_output_weights,
        )  # fmt: skip
        # Loss tokens are gathered from all ranks before the head, so the head itself works on whole rows.
        self.output_layer.sequence_parallel = False
        self.output_layer.allreduce_dgrad = config.tensor_model_parallel_size > 1
        if draws:
            self.llm2vae = nn.Linear(config.hidden_size, arch.latent_token_dim)
            # Zero at first, so that an untrained head predicts no motion (the original's initialisation).
            nn.init.zeros_(self.llm2vae.weight)
            nn.init.zeros_(self.llm2vae.bias)

    def _mark_shared_embedding(self) -> None:
        """Tied embeddings on different stages: Megatron sums their gradients, and counts only the first stage's in norms."""
        weight = self.shared_embedding_or_output_weight()
        if weight is None or (self.pre_process and self.post_process):
            return
        # A bucket of its own, so that both stages cut it over the data-parallel ranks in the same places.
        weight.shared_embedding = True
        weight.shared = self.post_process

    def set_input_tensor(self, input_tensor: torch.Tensor | list[torch.Tensor]) -> None:
        """Megatron's schedules hand the previous stage's hidden states here."""
        self.decoder.set_input_tensor(input_tensor[0] if isinstance(input_tensor, list) else input_tensor)

    def shared_embedding_or_output_weight(self) -> torch.Tensor | None:
        """The weight that first and last stage share when embeddings are tied; Megatron sums its gradients."""
        if self.share_embeddings_and_output_weights and hasattr(self, "embedding"):
            return self.embedding.word_embeddings.weight
        return None

    def embed_text(self, ids: torch.Tensor) -> torch.Tensor:
        """[n] -> [n, h]."""
        return self.embedding.word_embeddings(ids)

    def embed_latents(self, x_t: torch.Tensor, t: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        """Latent tokens ``x_t`` [n, p * p * z] at timesteps ``t`` [n] and table rows ``position_ids`` [n] -> [n, h]."""
        dtype = self.vae2llm.weight.dtype
        return self.vae2llm(x_t.to(dtype)) + self.time_embedder(t) + self.latent_pos_embed[position_ids].to(dtype)

    def embed(self, batch: MicroBatch) -> torch.Tensor:
        """Hidden states of all slots, [length, h]."""
        und = self.embed_text(batch.text_ids)
        if batch.vit_features is not None:
            und = torch.cat([und, batch.vit_features.to(und.dtype)])
        gen = und[:0]
        if self.freeze_und:
            # Not quite cut off: a tied embedding gets (zero) gradients on a stage without the head, where reduction waits for them.
            und = und * 0 + und.detach() if self.share_embeddings_and_output_weights and not self.post_process else und.detach()
        if self.arch.autoencoder is not None:
            x_t = interpolate(batch.latents, batch.noise, batch.timesteps)
            gen = self.embed_latents(x_t, batch.timesteps, batch.latent_position_ids)
        return join([und, gen], batch.length)

    def decode(
        self, hidden: torch.Tensor | None, n_und: int, n_gen: int, position_ids: torch.Tensor, attention: AttentionPlan
    ) -> torch.Tensor:
        """Run this stage's layers: [length, h] (None on later stages) -> [length (or its share), 1, h], before the final norm."""
        llm = self.arch.llm
        dtype = self.config.params_dtype
        context = PackContext.of(n_und, n_gen, position_ids, attention, llm.head_dim, llm.rope_theta, dtype)
        if hidden is not None:
            if self.config.sequence_parallel:
                hidden = scatter_to_sequence_parallel_region(hidden)
            hidden = hidden.unsqueeze(1)
        return self.decoder(hidden_states=hidden, attention_mask=None, packed_seq_params=context)

    def final_norm(self, hidden: torch.Tensor, n_und: int, n_gen: int) -> torch.Tensor:
        """Each expert's final norm; rows [n_und + n_gen, h], whole on every tensor-parallel rank."""
        hidden = hidden.squeeze(1)
        first = 0
        if self.config.sequence_parallel:
            first = parallel_state.get_tensor_model_parallel_rank() * hidden.shape[0]
        und, gen = per_expert(self.final_layernorm, *PackContext.split_rows(hidden, first, n_und, n_gen))
        normed = join([und.detach() if self.freeze_und else und, gen], hidden.shape[0])
        if self.config.sequence_parallel:
            # The heads' input gradients are whole on every rank already: they must be cut, not summed.
            normed = gather_from_sequence_parallel_region(normed, tensor_parallel_output_grad=False)
        return normed[: n_und + n_gen]

    def run_decoder(self, hidden: torch.Tensor, n_und: int, position_ids: torch.Tensor, attention: AttentionPlan) -> torch.Tensor:
        """All layers and the final norms on an unpadded [n, h], for inference."""
        n_gen = hidden.shape[0] - n_und
        return self.final_norm(self.decode(hidden, n_und, n_gen, position_ids, attention), n_und, n_gen)

    def text_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[n, h] -> this rank's share of the logits, [n, V / tp]. Those of rows that pad the vocabulary are -inf: no token is there."""
        weight = self.shared_embedding_or_output_weight()
        if weight is not None and not self.pre_process:
            # Called for its hooks alone: overlapped parameter gathering waits there for the weight that the head is about to read.
            self.embedding.word_embeddings(torch.zeros(0, dtype=torch.long, device=hidden.device))
        logits = self.output_layer(hidden, weight=weight)[0]
        first = parallel_state.get_tensor_model_parallel_rank() * logits.shape[-1]
        tokens = min(max(self.arch.llm.vocab_size - first, 0), logits.shape[-1])
        return F.pad(logits[..., :tokens], (0, logits.shape[-1] - tokens), value=float("-inf")) if tokens < logits.shape[-1] else logits

    def all_text_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[n, h] -> logits of the whole vocabulary, [n, V], on every tensor-parallel rank: all of them choose the next token."""
        return gather_from_tensor_model_parallel_region(self.text_logits(hidden))

    def velocity(self, hidden: torch.Tensor) -> torch.Tensor:
        """[n, h] -> predicted velocity, [n, p * p * z]."""
        return self.llm2vae(hidden)

    def losses(self, hidden: torch.Tensor, batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Unreduced cross entropy [n_ce] and squared velocity error [n_mse, p * p * z], both fp32.

        Without loss tokens the results are empty but still hang on the heads: every parameter gets a (zero) gradient on every
        rank, which overlapped gradient reduction waits for.
        """
        logits, predicted = self.predictions(hidden, batch)
        ce = cross_entropy(logits, batch.labels)
        if self.arch.autoencoder is None:
            return ce, predicted
        target = target_velocity(batch.latents, batch.noise).index_select(0, batch.mse_rows)
        return ce, (predicted - target.float()) ** 2

    def predictions(self, hidden: torch.Tensor, batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """What the losses are about: logits [n_ce, V / tp] and velocities [n_mse, p * p * z], both fp32."""
        normed = self.final_norm(hidden, batch.n_und, batch.n_vae)
        logits = self.text_logits(normed.index_select(0, batch.ce_slots)).float()
        if self.arch.autoencoder is None:
            return logits, normed.new_zeros((0, 1), dtype=torch.float32)
        return logits, self.velocity(normed.index_select(0, batch.mse_slots)).float()

    def forward(self, batch: MicroBatch) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Losses (or predictions) on the last stage, hidden states [length, 1, h] elsewhere."""
        hidden = self.embed(batch) if self.pre_process else None
        hidden = self.decode(hidden, batch.n_und, batch.n_vae, batch.position_ids, batch.attention)
        if not self.post_process:
            return hidden
        return self.predictions(hidden, batch) if batch.predict else self.losses(hidden, batch)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> ShardedStateDict:
        """Every parameter of the stage, for dist_checkpointing."""
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        head = f"{prefix}output_layer.weight"
        if head in state:
            # As Megatron-Core does for embeddings: how many rows pad the vocabulary depends on the layout.
            state[head] = replace(state[head], allow_shape_mismatch=True)
        key = f"{prefix}embedding.word_embeddings.weight"
        if key in state and not self.pre_process:
            # The last stage's copy of tied embeddings: the first stage's is the one that is saved.
            state[key] = replace(state[key], replica_id=(1, *state[key].replica_id[1:]))
        return state


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Unreduced cross entropy [n] of fp32 logits [n, V / tp]."""
    if parallel_state.get_tensor_model_parallel_world_size() == 1:
        return F.cross_entropy(logits, labels, reduction="none")
    return vocab_parallel_cross_entropy(logits.unsqueeze(1), labels.unsqueeze(1)).squeeze(1)
