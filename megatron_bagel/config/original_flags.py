"""What a flag of the original BAGEL becomes here: the same, another setting, or a refusal with its reason.

The words stand in each flag's field (see flag.py) and docs/flags.md is made from them. validate.py refuses, resolve.py translates.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

#: FSDP sharding strategies -> what they are under Megatron.
SHARDING_STRATEGIES: dict[str, str] = {
    "FULL_SHARD": "distributed optimizer over all data-parallel ranks",
    "SHARD_GRAD_OP": "distributed optimizer over all data-parallel ranks",
    "HYBRID_SHARD": "distributed optimizer in num_replicate groups of ranks",
    "_HYBRID_SHARD_ZERO2": "distributed optimizer in num_replicate groups of ranks",
    "NO_SHARD": "no distributed optimizer: every rank holds the whole optimizer state",
}


@dataclass(frozen=True)
class Compatibility:
    """What happens to a flag of the original, with a note: the setting it becomes, or which values are refused and why."""

    kind: Literal["as is", "becomes", "refused"]
    note: str = ""


AS_IS = Compatibility("as is")


def as_is(note: str) -> Compatibility:
    """Same name, meaning and default, with a remark."""
    return Compatibility("as is", note)


def becomes(note: str) -> Compatibility:
    """Another setting does its work."""
    return Compatibility("becomes", note)


def refused(note: str) -> Compatibility:
    """Some values cannot be honoured and end the run at start-up."""
    return Compatibility("refused", note)
