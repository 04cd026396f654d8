# SPDX-License-Identifier: Apache-2.0
"""What a training checkpoint of adapters says about itself: their settings, and the weights that they belong to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_bagel.checkpoint.dist.checksums import read_checksums
from megatron_bagel.checkpoint.dist.step_folders import is_complete, read_state
from megatron_bagel.checkpoint.hf.base_identity import BaseIdentity, digest_of_file, digest_of_sums
from megatron_bagel.checkpoint.hf.folder import HFFolder
from megatron_bagel.config.architecture import ConfigSources
from megatron_bagel.config.lora import LoraSettings

#: Key in the JSON state.
ADAPTER = "adapter"


@dataclass(frozen=True)
class StoredAdapter:
    """The adapters of a run, and their base. A checkpoint then holds adapters, and parts that train in full, but not the base."""

    lora: LoraSettings
    base: BaseIdentity

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values that ``adapter_in`` reads."""
        return {"settings": self.lora.to_dict(), "base": self.base.to_dict()}


def adapter_in(state: Mapping[str, Any]) -> StoredAdapter | None:
    """Return the adapters of a checkpoint by its JSON state, or None for a checkpoint of a whole model."""
    stored = state.get(ADAPTER)
    if stored is None:
        return None
    return StoredAdapter(LoraSettings.from_dict(stored["settings"]), BaseIdentity.from_dict(stored["base"]))


def adapter_of(folder: Path) -> StoredAdapter | None:
    """Return the adapters of a checkpoint by its folder, or None for another checkpoint, and for a folder that is none."""
    return adapter_in(read_state(folder)) if is_complete(folder) else None


def refuse_adapters(state: Mapping[str, Any], folder: Path) -> None:
    """Raise ValueError if a checkpoint that must hold a whole model holds adapters alone."""
    stored = adapter_in(state)
    if stored is not None:
        raise ValueError(
            f"{folder} holds the adapters of {stored.base.folder} and not a whole model. Continue it with the flags of its run "
            f"(--lora_rank {stored.lora.rank} ...), or merge it first: megatron-bagel convert adapter merge"
        )


def identify(folder: Path, weights: str, weights_name: str | None = None) -> BaseIdentity:
    """Return the identity of the ``weights`` ("model" or "ema") of a model folder or a training checkpoint.

    Raises:
        ValueError: The folder has no such weights, or is a checkpoint without checksums or of adapters.
    """
    path = folder.resolve()
    if not is_complete(folder):
        reader = HFFolder(folder, sources=ConfigSources(weights_name=weights_name)).weights(weights)
        return BaseIdentity(str(path), weights, digest_of_file(reader), weights_name)
    refuse_adapters(read_state(folder), folder)
    sums = read_checksums(folder)
    if sums is None:
        raise ValueError(f"{folder} has no checksums, by which an adapter would know its base; save it once more with this version")
    return BaseIdentity(str(path), weights, digest_of_sums(sums))
