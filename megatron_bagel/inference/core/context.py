"""What has been said so far: cached keys and values, their number, and the RoPE position of the next item."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from megatron_bagel.inference.core.kv_cache import LayerCache


@dataclass(frozen=True)
class Context:
    """One sample's past. ``caches`` maps Megatron's 1-based layer number to that layer's cache.

    ``length`` counts cached tokens; ``position`` counts RoPE positions, of which an image takes one whatever its size.
    A context never changes, so keeping an earlier one is a snapshot of the conversation at that point.
    """

    caches: Mapping[int, LayerCache] = field(default_factory=dict)
    length: int = 0
    position: int = 0

    def advanced(self, caches: Mapping[int, LayerCache], tokens: int, positions: int) -> Context:
        """The context after ``tokens`` more tokens that took ``positions`` RoPE positions."""
        return Context(caches, self.length + tokens, self.position + positions)


@dataclass(frozen=True)
class GuidedContext:
    """A conversation in the three views that classifier-free guidance compares.

    ``main`` is everything; ``without_text`` is everything before the last text; ``without_images`` is all texts alone,
    with RoPE positions of its own.
    """

    main: Context = field(default_factory=Context)
    without_text: Context = field(default_factory=Context)
    without_images: Context = field(default_factory=Context)
