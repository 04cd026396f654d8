# SPDX-License-Identifier: Apache-2.0
"""Cross entropy of the loss tokens: from logits, or from hidden states in chunks, so that the logits of all tokens never exist.

A vocabulary of 152,064 makes 0.6 MB of fp32 logits for a token, and the usual way keeps them for the backward pass. The chunked way
keeps one number per token and computes the logits of a chunk again in the backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from megatron_bagel.model.marks import mark


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the unreduced cross entropy [n] of fp32 logits [n, V / tp]."""
    if parallel_state.get_tensor_model_parallel_world_size() == 1:
        return F.cross_entropy(logits, labels, reduction="none")
    return vocab_parallel_cross_entropy(logits.unsqueeze(1), labels.unsqueeze(1)).squeeze(1)


@dataclass(frozen=True)
class VocabularyShard:
    """The part of the vocabulary that a tensor-parallel rank has.

    Attributes:
        first: The first token of the shard.
        tokens: The tokens of the shard; further rows of the weight pad it.
        group: The tensor-parallel ranks, or None for one rank.
    """

    first: int
    tokens: int
    group: dist.ProcessGroup | None

    @classmethod
    def of(cls, vocabulary: int, rows: int) -> VocabularyShard:
        """Return the shard of this rank, for a vocabulary of which each rank has ``rows`` rows."""
        first = parallel_state.get_tensor_model_parallel_rank() * rows
        one_rank = parallel_state.get_tensor_model_parallel_world_size() == 1
        group = None if one_rank else parallel_state.get_tensor_model_parallel_group()
        return cls(first, min(max(vocabulary - first, 0), rows), group)

    def local_labels(self, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return whether each of ``labels`` [n] is in the shard, and its place there, [n, 1] both; any place if it is not.

        Every label has a row, because picking rows by a mask makes the host wait for their number.
        """
        places = labels - self.first
        is_local = (places >= 0) & (places < self.tokens)
        return is_local.unsqueeze(1), places.clamp(0, self.tokens - 1).unsqueeze(1)


def chunked_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, shard: VocabularyShard, chunk_tokens: int, tied: bool
) -> torch.Tensor:
    """Return the unreduced cross entropy [n] of hidden states, in fp32.

    Args:
        hidden: The hidden states of the loss tokens, [n, h], complete on every tensor-parallel rank.
        weight: This rank's rows of the output layer, [V / tp, h].
        labels: The tokens to predict, [n].
        shard: This rank's part of the vocabulary.
        chunk_tokens: The tokens whose logits exist at one time.
        tied: Whether the weight is the embedding too. Its gradient then goes through autograd, which adds the embedding's.
    """
    return _ChunkedCrossEntropy.apply(hidden, weight, labels, shard, chunk_tokens, tied)


class _ChunkedCrossEntropy(Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, shard: VocabularyShard, chunk_tokens: int, tied: bool
    ) -> torch.Tensor:
        maxima = hidden.new_full((len(hidden),), float("-inf"), dtype=torch.float32)
        # Sums of exponentials, and the logits of the labels on the ranks that have them.
        sums, targets = torch.zeros(2, len(hidden), dtype=torch.float32, device=hidden.device)
        for rows in _chunks(len(hidden), chunk_tokens):
            logits = _logits(hidden[rows], weight, shard)
            if not shard.tokens:
                continue
            is_local, places = shard.local_labels(labels[rows])
            targets[rows] = torch.where(is_local, logits.gather(1, places), 0.0).squeeze(1)
            maxima[rows] = logits.amax(1)
            sums[rows] = logits.sub_(maxima[rows].unsqueeze(1)).exp_().sum(1)
        log_sums, targets = _over_ranks(maxima, sums, targets, shard.group)
        ctx.save_for_backward(hidden, weight, labels, log_sums)
        ctx.shard, ctx.chunk_tokens, ctx.tied = shard, chunk_tokens, tied
        return log_sums - targets

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, labels, log_sums = ctx.saved_tensors
        shard: VocabularyShard = ctx.shard
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        hidden_grad = torch.zeros_like(hidden) if needs_hidden else None
        weight_grad = _WeightGradient(weight, direct=not ctx.tied) if needs_weight else None
        for rows in _chunks(len(hidden), ctx.chunk_tokens):
            # The gradient of the logits is (softmax - one at the label) times that of the loss.
            logit_grad = _logits(hidden[rows], weight, shard).sub_(log_sums[rows].unsqueeze(1)).exp_()
            if shard.tokens:
                is_local, places = shard.local_labels(labels[rows])
                logit_grad.scatter_add_(1, places, -is_local.to(logit_grad.dtype))
            logit_grad = logit_grad.mul_(grad[rows].unsqueeze(1)).to(hidden.dtype)
            if hidden_grad is not None:
                torch.mm(logit_grad, weight[: shard.tokens], out=hidden_grad[rows])
            if weight_grad is not None:
                weight_grad.add(logit_grad, hidden[rows])
        if hidden_grad is not None and shard.group is not None:
            dist.all_reduce(hidden_grad, group=shard.group)
        return hidden_grad, weight_grad.result() if weight_grad is not None else None, None, None, None, None


class _WeightGradient:
    """Sums the chunks' gradients of the output weight.

    With ``direct`` they go straight into Megatron's gradient buffer, if the weight has one (``fused.py`` explains the mark). Otherwise
    they are summed in fp32.
    """

    def __init__(self, weight: torch.Tensor, direct: bool) -> None:
        self.weight = weight
        self.buffer = getattr(weight, "main_grad", None) if direct else None
        self.total = torch.zeros_like(weight, dtype=torch.float32) if self.buffer is None else self.buffer

    def add(self, logit_grad: torch.Tensor, hidden: torch.Tensor) -> None:
        """Add the product of a chunk's gradient of the logits [n, tokens] and its hidden states [n, h]."""
        rows = self.total[: logit_grad.shape[1]]
        if rows.dtype == hidden.dtype:
            rows.addmm_(logit_grad.t(), hidden)
        else:
            rows.add_(logit_grad.t().mm(hidden))

    def result(self) -> torch.Tensor:
        """Return the gradient for autograd, uninitialised if the buffer has it."""
        if self.buffer is None:
            return self.total.to(self.weight.dtype)
        mark(self.weight, grad_added_to_main_grad=True)
        return torch.empty_like(self.weight)


def _chunks(tokens: int, chunk_tokens: int) -> Iterator[slice]:
    return (slice(start, min(start + chunk_tokens, tokens)) for start in range(0, tokens, chunk_tokens))


def _logits(hidden: torch.Tensor, weight: torch.Tensor, shard: VocabularyShard) -> torch.Tensor:
    """Return fp32 logits [n, tokens of the shard], rounded to the weight's dtype first as the output layer's are."""
    return hidden.mm(weight[: shard.tokens].t()).float()


def _over_ranks(
    maxima: torch.Tensor, sums: torch.Tensor, targets: torch.Tensor, group: dist.ProcessGroup | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the log-sum-exp over the whole vocabulary and the logits of the labels, both [n]."""
    if group is None:
        return maxima + sums.log(), targets
    largest = maxima.clone()
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    summed = torch.stack([sums * (maxima - largest).exp(), targets])
    dist.all_reduce(summed, group=group)
    return largest + summed[0].log(), summed[1]
