# SPDX-License-Identifier: Apache-2.0
"""A conversation so far: cached keys and values, their number, and the RoPE position of the next item."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from megatron_bagel.inference.core.kv_cache import LayerCache


@dataclass(frozen=True)
class Context:
    """One sample's past. ``caches`` maps Megatron's 1-based layer number to that layer's cache.

    ``length`` counts cached tokens, and ``position`` counts RoPE positions; an image of any size takes one position.
    A context never changes, so an earlier one is a snapshot of the conversation at that point.
    """

    caches: Mapping[int, LayerCache] = field(default_factory=dict)
    length: int = 0
    position: int = 0

    def advanced(self, caches: Mapping[int, LayerCache], tokens: int, positions: int) -> Context:
        """Return the context after ``tokens`` more tokens that take ``positions`` RoPE positions."""
        return Context(caches, self.length + tokens, self.position + positions)


@dataclass(frozen=True)
class GuidedContext:
    """A conversation in the three views that classifier-free guidance compares.

    ``main`` is everything, ``without_text`` is everything before the last text, and ``without_images`` is all texts alone,
    with separate RoPE positions.
    """

    main: Context = field(default_factory=Context)
    without_text: Context = field(default_factory=Context)
    without_images: Context = field(default_factory=Context)
