# SPDX-License-Identifier: Apache-2.0
"""The two passes of the vision tower around the decoder's schedule, with activations of the whole step or of one chunk of images.

``StepPass`` keeps the activations of all images from the forward pass to the backward pass. ``ChunkedPass`` keeps none: it computes
features without gradients, and after the schedule each chunk runs forward again and backward at once. Memory is then that of one
chunk, however many packs a step has, for one more forward pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch

from megatron_bagel.data.transforms import RawPatches, ready_patches
from megatron_bagel.platform.device import to_device


@dataclass(frozen=True)
class TowerImage:
    """One image as the tower reads it: ``patches`` [tokens, patch * patch * 3] and ``position_ids`` [tokens], both on the host."""

    patches: torch.Tensor | RawPatches
    position_ids: torch.Tensor


class TowerPass(Protocol):
    """The interface of both ways."""

    @property
    def waits_for_gradient(self) -> bool:
        """Return whether the last ``encode`` needs a ``backward``."""

    def encode(self, tower: torch.nn.Module, images: Sequence[TowerImage], patch_values: int) -> torch.Tensor:
        """Return the features of the images, one after the other, [tokens, h], without history.

        ``patch_values`` are the numbers of a patch, which a step without images does not show.
        """

    def backward(self, gradient: torch.Tensor) -> None:
        """Send the gradient of the features through the tower of the last ``encode``, once."""


class StepPass:
    """Keeps the activations of all images until the backward pass."""

    def __init__(self, device: torch.device | str) -> None:
        self.device = device
        self._output: torch.Tensor | None = None

    @property
    def waits_for_gradient(self) -> bool:
        """Return whether the last ``encode`` needs a ``backward``."""
        return self._output is not None

    def encode(self, tower: torch.nn.Module, images: Sequence[TowerImage], patch_values: int) -> torch.Tensor:
        """Run the tower once over all images."""
        output = _run(tower, images, patch_values, self.device)
        self._output = output if output.requires_grad else None
        return output.detach()

    def backward(self, gradient: torch.Tensor) -> None:
        """Go backward through the activations."""
        output, self._output = self._output, None
        if output is None:
            raise ValueError("the vision tower has no features that wait for a gradient")
        torch.autograd.backward(output, gradient)


class ChunkedPass:
    """Keeps the pixels, and computes the activations of ``chunk_tokens`` tokens (or one larger image) at a time."""

    def __init__(self, device: torch.device | str, chunk_tokens: int) -> None:
        self.device, self.chunk_tokens = device, chunk_tokens
        self._tower: torch.nn.Module | None = None
        self._chunks: list[list[TowerImage]] = []
        self._patch_values = 0

    @property
    def waits_for_gradient(self) -> bool:
        """Return whether the last ``encode`` needs a ``backward``."""
        return self._tower is not None

    def encode(self, tower: torch.nn.Module, images: Sequence[TowerImage], patch_values: int) -> torch.Tensor:
        """Run the tower over each chunk, without gradients."""
        chunks = list(_chunks(images, self.chunk_tokens))
        with torch.no_grad():
            features = torch.cat([_run(tower, chunk, patch_values, self.device) for chunk in chunks])
        trains = torch.is_grad_enabled() and any(parameter.requires_grad for parameter in tower.parameters())
        self._tower, self._chunks, self._patch_values = (tower, chunks, patch_values) if trains else (None, [], 0)
        return features

    def backward(self, gradient: torch.Tensor) -> None:
        """Run each chunk forward again, now with gradients, and backward. Gradients are exchanged with the last chunk only."""
        tower, chunks, self._tower, self._chunks = self._tower, self._chunks, None, []
        if tower is None:
            raise ValueError("the vision tower has no features that wait for a gradient")
        parts = gradient.split([_tokens(chunk) for chunk in chunks])
        for number, (chunk, part) in enumerate(zip(chunks, parts, strict=True), start=1):
            # Megatron's DDP would start to reduce a bucket when each of its gradients has arrived once.
            no_sync = getattr(tower, "no_sync", nullcontext)
            with nullcontext() if number == len(chunks) else no_sync():
                torch.autograd.backward(_run(tower, chunk, self._patch_values, self.device), part)


def tower_pass(device: torch.device | str, chunk_tokens: int | None) -> TowerPass:
    """Return the pass for ``chunk_tokens`` tokens at a time, or for all images of a step if it is None."""
    return StepPass(device) if chunk_tokens is None else ChunkedPass(device, chunk_tokens)


def _tokens(images: Sequence[TowerImage]) -> int:
    return sum(len(image.patches) for image in images)


def _chunks(images: Sequence[TowerImage], chunk_tokens: int) -> Iterator[list[TowerImage]]:
    """Yield consecutive images of at most ``chunk_tokens`` tokens, or one larger image. Without images there is one empty chunk."""
    chunk: list[TowerImage] = []
    for image in images:
        if chunk and _tokens(chunk) + len(image.patches) > chunk_tokens:
            yield chunk
            chunk = []
        chunk.append(image)
    yield chunk


def _run(tower: torch.nn.Module, images: Sequence[TowerImage], patch_values: int, device: torch.device | str) -> torch.Tensor:
    # The empty tensors are for a step without images, whose backward pass gives every weight a gradient of zeros.
    patches = ready_patches([image.patches for image in images], patch_values, device)
    position_ids = torch.cat([torch.zeros(0, dtype=torch.long), *(image.position_ids for image in images)])
    return tower(patches, to_device(position_ids, device), [len(image.patches) for image in images])
