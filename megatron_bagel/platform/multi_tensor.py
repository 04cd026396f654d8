# SPDX-License-Identifier: Apache-2.0
"""Norm and scaling of many tensors at once, where Megatron-Core has neither Transformer Engine's nor apex's kernels.

Megatron-Core's stand-ins read the norm of every tensor on the host, which then waits for a GPU once per tensor, and scale into a copy.
These take torch's functions on lists: a few launches on a GPU, nothing read. On a CPU the results are the same bits as the stand-ins'.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def l2_norm(chunk_size: int, noop_flag: Tensor, tensor_lists: list[list[Tensor]], per_tensor: bool, *_: Any) -> tuple[Tensor, None]:
    """Return the L2 norm of all tensors together, fp32 [1], with the arguments of ``amp_C.multi_tensor_l2norm``."""
    del chunk_size, noop_flag, per_tensor
    norms = torch._foreach_norm([tensor for tensors in tensor_lists for tensor in tensors])
    return torch.norm(torch.stack(norms)).float().reshape(1), None


def scale(chunk_size: int, noop_flag: Tensor, tensor_lists: list[list[Tensor]], factor: float) -> None:
    """Write the sources times ``factor`` to the targets, with the arguments of ``amp_C.multi_tensor_scale``."""
    del chunk_size, noop_flag
    sources, targets = tensor_lists
    if sources is not targets:  # clipping gives one list twice
        torch._foreach_copy_(targets, sources)
    torch._foreach_mul_(targets, factor)


def use_where_megatron_has_stand_ins() -> None:
    """Set these functions in Megatron-Core's gradient clipping, unless it found Transformer Engine's or apex's."""
    from megatron.core import utils
    from megatron.core.optimizer import clip_grads

    if clip_grads.l2_norm_impl is utils.local_multi_tensor_l2_norm:
        clip_grads.l2_norm_impl = l2_norm
    if clip_grads.multi_tensor_scale_impl is utils.local_multi_tensor_scale:
        clip_grads.multi_tensor_scale_impl = scale
