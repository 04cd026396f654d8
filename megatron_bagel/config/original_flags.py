# SPDX-License-Identifier: Apache-2.0
"""The meaning of the original BAGEL's flags here: the same, another setting, or a refusal with its reason.

Each flag's field holds the note (see flag.py), and docs/flags.md shows it. validate.py refuses values; resolve.py translates them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

#: FSDP's sharding strategies, and what they become under Megatron.
SHARDING_STRATEGIES: dict[str, str] = {
    "FULL_SHARD": "distributed optimizer over all data-parallel ranks",
    "SHARD_GRAD_OP": "distributed optimizer over all data-parallel ranks",
    "HYBRID_SHARD": "distributed optimizer in num_replicate groups of ranks",
    "_HYBRID_SHARD_ZERO2": "distributed optimizer in num_replicate groups of ranks",
    "NO_SHARD": "no distributed optimizer: every rank holds the whole optimizer state",
}


@dataclass(frozen=True)
class Compatibility:
    """What a flag of the original means here. The note names the setting it becomes, or the refused values and the reason."""

    kind: Literal["as is", "becomes", "refused"]
    note: str = ""


AS_IS = Compatibility("as is")


def as_is(note: str) -> Compatibility:
    """Mark a flag of the same name, meaning and default, with a remark."""
    return Compatibility("as is", note)


def becomes(note: str) -> Compatibility:
    """Mark a flag whose work another setting does."""
    return Compatibility("becomes", note)


def refused(note: str) -> Compatibility:
    """Mark a flag of which some values cannot be honoured and end the run at start-up."""
    return Compatibility("refused", note)
