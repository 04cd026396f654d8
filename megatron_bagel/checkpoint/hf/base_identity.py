# SPDX-License-Identifier: Apache-2.0
"""Which weights an adapter belongs to: the folder they were read from, and a digest by which a copy elsewhere is known.

The digest covers name, shape, type and first values of every tensor, so it takes milliseconds for a model of any size. Weights that an
adapter was merged into, or that were trained on, have another one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_bagel.checkpoint.hf.safetensors_io import SafetensorsReader
from megatron_bagel.common.hub_names import hub_hint

_VALUES = 256  # bytes of each tensor


@dataclass(frozen=True)
class BaseIdentity:
    """The weights that an adapter belongs to.

    Attributes:
        folder: A model folder, or a training checkpoint.
        weights: "model" or "ema".
        digest: What identifies the values.
        weights_name: The name of the weight file in the folder, if it is not the usual one.
    """

    folder: str
    weights: str
    digest: str
    weights_name: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values that ``from_dict`` reads."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> BaseIdentity:
        """Read what ``to_dict`` returned."""
        return cls(str(values["folder"]), str(values["weights"]), str(values["digest"]), values.get("weights_name"))

    def check(self, other: BaseIdentity, adapter: object) -> None:
        """Raise ValueError if ``other`` has other weights than those that ``adapter`` belongs to."""
        if self.digest != other.digest:
            raise ValueError(
                f"the adapter {adapter} belongs to the {self.weights} weights of {self.folder} (digest {self.digest[:12]}); those of "
                f"{other.folder} are others (digest {other.digest[:12]}). A folder that an adapter was merged into is not its base any more"
            )


def digest_of_file(reader: SafetensorsReader) -> str:
    """Return the digest of a weight file or of all files of an index."""
    total = hashlib.sha256()
    for name in sorted(reader.keys()):  # noqa: SIM118
        total.update(f"{name} {reader.spec(name)} ".encode())
        total.update(reader.first_bytes(name, _VALUES))
    return total.hexdigest()


def digest_of_sums(sums: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the digest of a training checkpoint by the checksums of its tensor files."""
    tensors = sorted((name, str(entry["sha256"])) for name, entry in sums.items() if name.endswith(".distcp"))
    return hashlib.sha256(repr(tensors).encode()).hexdigest()


def path_of(identity: BaseIdentity, moved_to: str | None, remedy: str) -> Path:
    """Return where the base is now. Raises ValueError if it is in neither place; ``remedy`` says how to name its place."""
    path = Path(moved_to) if moved_to is not None else Path(identity.folder)
    if not path.exists():
        raise ValueError(f"the base of the adapter, {path}, does not exist; {remedy}{hub_hint(str(path))}")
    return path
