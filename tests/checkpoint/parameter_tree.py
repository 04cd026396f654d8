# SPDX-License-Identifier: Apache-2.0
"""Modules with given parameter names and shapes, standing in for the decoder where only names matter."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from megatron_bagel.checkpoint.hf.weight_map import WeightMap

VISION = ("vit_model.", "connector.")


def parameter_tree(shapes: Iterable[tuple[str, tuple[int, ...]]], dtype: torch.dtype = torch.float32) -> nn.Module:
    """A module tree whose `named_parameters` are `shapes`, filled with NaN so that an unfilled one shows."""
    root = nn.Module()
    for name, shape in shapes:
        *path, leaf = name.split(".")
        node = root
        for part in path:
            if not hasattr(node, part):
                node.add_module(part, nn.Module())
            node = getattr(node, part)
        node.register_parameter(leaf, nn.Parameter(torch.full(shape, float("nan"), dtype=dtype)))
    return root


def model_like(weight_map: WeightMap, dtype: torch.dtype = torch.float32) -> list[nn.Module]:
    """[decoder, vision tower] with the map's names."""
    shapes = {name: entry.shape for name, entry in weight_map.entries.items()}
    decoder = parameter_tree(((n, s) for n, s in shapes.items() if not n.startswith(VISION)), dtype)
    return [decoder, parameter_tree(((n, s) for n, s in shapes.items() if n.startswith(VISION)), dtype)]
