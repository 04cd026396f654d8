# SPDX-License-Identifier: Apache-2.0
"""Chunks of logits give the losses and gradients of all logits at once, on one rank and over a divided vocabulary."""

from __future__ import annotations

import pytest
import torch
from megatron.core import parallel_state

from megatron_bagel.model.build import build_decoder
from megatron_bagel.model.cross_entropy import VocabularyShard, chunked_cross_entropy, cross_entropy
from tests.distributed import run_ranks
from tests.model.test_bagel import MIXED
from tests.model.tiny import microbatch, tiny_arch, tiny_config
from tests.strategies import SPEC

TOKENS, HIDDEN, VOCABULARY = 23, 16, 50


def inputs(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, output weight, labels, and the gradient of the losses."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(rows, HIDDEN, generator=generator).to(dtype).requires_grad_() for rows in (TOKENS, VOCABULARY))
    return hidden, weight, torch.randint(VOCABULARY, (TOKENS,), generator=generator), torch.rand(TOKENS, generator=generator)


def whole(vocabulary: int = VOCABULARY, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Losses and both gradients by torch's own cross entropy; rows from ``vocabulary`` on are padding."""
    hidden, weight, labels, grad = inputs(dtype)
    losses = torch.nn.functional.cross_entropy((hidden @ weight[:vocabulary].t()).float(), labels % vocabulary, reduction="none")
    losses.backward(grad)
    return [losses.detach(), hidden.grad, weight.grad]


@pytest.mark.usefixtures("single_rank")
@pytest.mark.parametrize("chunk_tokens", [1, 7, 23, 1000])
@pytest.mark.parametrize("vocabulary", [VOCABULARY, 41])
@pytest.mark.parametrize("tied", [False, True])
def test_chunks_equal_the_whole(chunk_tokens: int, vocabulary: int, tied: bool) -> None:
    hidden, weight, labels, grad = inputs()
    shard = VocabularyShard.of(vocabulary, len(weight))
    losses = chunked_cross_entropy(hidden, weight, labels % vocabulary, shard, chunk_tokens, tied)
    losses.backward(grad)
    for ours, theirs in zip((losses.detach(), hidden.grad, weight.grad), whole(vocabulary), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.usefixtures("single_rank")
def test_bf16_gradients_are_near() -> None:
    hidden, weight, labels, grad = inputs(torch.bfloat16)
    chunked_cross_entropy(hidden, weight, labels, VocabularyShard.of(VOCABULARY, VOCABULARY), 7, True).backward(grad)
    for ours, theirs in zip((hidden.grad, weight.grad), whole(dtype=torch.bfloat16)[1:], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)


@pytest.mark.usefixtures("single_rank")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gradient_buffer_gets_the_gradient_itself(dtype: torch.dtype) -> None:
    """As Megatron's DDP leaves it: added to what is there, and marked."""
    hidden, weight, labels, grad = inputs(dtype)
    weight.main_grad = torch.ones(weight.shape)
    chunked_cross_entropy(hidden, weight, labels, VocabularyShard.of(VOCABULARY, VOCABULARY), 7, False).backward(grad)
    assert weight.grad_added_to_main_grad
    tolerance = 1e-6 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(weight.main_grad - 1, whole(dtype=dtype)[2].float(), rtol=tolerance, atol=tolerance)


@pytest.mark.usefixtures("single_rank")
def test_no_loss_token_gives_zeros() -> None:
    hidden, weight, labels, _ = inputs()
    losses = chunked_cross_entropy(hidden[:0], weight, labels[:0], VocabularyShard.of(VOCABULARY, VOCABULARY), 7, False)
    losses.sum().backward()
    assert losses.shape == (0,) and not weight.grad.any() and not hidden.grad.any()


@pytest.mark.usefixtures("single_rank")
@pytest.mark.parametrize("tied", [False, True])
def test_the_decoder_uses_it(tied: bool) -> None:
    arch = tiny_arch(tie_word_embeddings=tied)
    results = []
    for chunk_tokens in (0, 4):
        torch.manual_seed(0)
        model = build_decoder(arch, tiny_config(arch), ce_chunk_tokens=chunk_tokens)
        ce, mse = model(microbatch(MIXED, arch, SPEC))
        (ce.sum() + mse.sum()).backward()
        results.append([ce.detach(), mse.detach(), *(parameter.grad for parameter in model.parameters())])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6 * float(theirs.abs().max() + 1))


def kept_bytes(chunk_tokens: int) -> int:
    """What autograd keeps for the backward pass."""
    held: list[torch.Tensor] = []
    hidden, weight, labels, _ = inputs()

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        held.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        if chunk_tokens:
            chunked_cross_entropy(hidden, weight, labels, VocabularyShard.of(VOCABULARY, VOCABULARY), chunk_tokens, False)
        else:
            cross_entropy((hidden @ weight.t()).float(), labels)
    return sum({tensor.untyped_storage().data_ptr(): tensor.nbytes for tensor in held if tensor.dtype.is_floating_point}.values())


@pytest.mark.usefixtures("single_rank")
def test_no_logits_are_kept() -> None:
    logits = TOKENS * VOCABULARY * 4
    assert kept_bytes(7) == (TOKENS + VOCABULARY) * HIDDEN * 4 + TOKENS * 4 and kept_bytes(0) > logits


def _divided(vocabulary: int) -> list[torch.Tensor]:
    hidden, weight, labels, grad = inputs()
    rank, rows = parallel_state.get_tensor_model_parallel_rank(), VOCABULARY // 2
    own = weight.detach()[rank * rows : (rank + 1) * rows].clone().requires_grad_()
    losses = chunked_cross_entropy(hidden, own, labels % vocabulary, VocabularyShard.of(vocabulary, rows), 7, False)
    losses.backward(grad)
    return [losses.detach(), hidden.grad, own.grad]


@pytest.mark.distributed
def test_a_divided_vocabulary_gives_the_same() -> None:
    """Also where one rank has padding alone."""
    for vocabulary, results in zip(
        (VOCABULARY, 31, 20), run_ranks(_for_each, 2, parallel={"tensor_model_parallel_size": 2})[0], strict=True
    ):
        losses, hidden_grad, weight_grad = whole(vocabulary)
        torch.testing.assert_close(results[0], losses, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(results[1], hidden_grad, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(results[2], weight_grad[: VOCABULARY // 2], rtol=1e-6, atol=1e-6)


def _for_each() -> list[list[torch.Tensor]]:
    return [_divided(vocabulary) for vocabulary in (VOCABULARY, 31, 20)]
