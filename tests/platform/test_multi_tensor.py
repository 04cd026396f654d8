# SPDX-License-Identifier: Apache-2.0
"""Norm and scaling of many tensors: the bits of Megatron-Core's stand-ins on a CPU, without a number read on the host."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from megatron.core import utils
from megatron.core.optimizer import clip_grads

from megatron_bagel.platform import multi_tensor
from tests.host_waits import HostWaits

SHAPES = st.lists(st.one_of(st.tuples(st.integers(0, 40)), st.tuples(st.integers(1, 9), st.integers(1, 70))), min_size=1, max_size=8)
FLAG = torch.zeros(1, dtype=torch.int)


def _tensors(shapes: list[tuple[int, ...]], seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) * 10 ** (3 * index % 7) for index, shape in enumerate(shapes)]


@given(SHAPES, st.integers(0, 99))
def test_the_norm_is_the_stand_in_s(shapes: list[tuple[int, ...]], seed: int) -> None:
    tensors = _tensors(shapes, seed)
    expected, _ = utils.local_multi_tensor_l2_norm(2048, FLAG, [tensors], False)
    with HostWaits() as seen:
        norm, _ = multi_tensor.l2_norm(2048, FLAG, [tensors], False)
    assert not seen.places
    assert torch.equal(norm, expected) and norm.dtype == torch.float32


@given(SHAPES, st.integers(0, 99), st.floats(1e-3, 1.0))
def test_scaling_is_the_stand_in_s_in_place_and_into_others(shapes: list[tuple[int, ...]], seed: int, factor: float) -> None:
    tensors, expected = _tensors(shapes, seed), _tensors(shapes, seed)
    others = [torch.full_like(tensor, 7.0) for tensor in tensors]
    utils.local_multi_tensor_scale(2048, FLAG, [expected, expected], factor)
    with HostWaits() as seen:
        multi_tensor.scale(2048, FLAG, [tensors, others], factor)
    assert all(map(torch.equal, tensors, _tensors(shapes, seed))) and all(map(torch.equal, others, expected))
    with seen:
        multi_tensor.scale(2048, FLAG, [tensors, tensors], factor)
    assert all(map(torch.equal, tensors, expected)) and not seen.places


def test_megatron_core_clips_with_them() -> None:
    """Its own stand-ins are gone where nothing better is installed."""
    assert clip_grads.l2_norm_impl is not utils.local_multi_tensor_l2_norm
    assert clip_grads.multi_tensor_scale_impl is not utils.local_multi_tensor_scale
