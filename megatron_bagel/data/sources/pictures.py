# SPDX-License-Identifier: Apache-2.0
"""The encoded bytes of a row's pictures: in the row itself, among the members of its tar sample, or in files below the image folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_bagel.data.sources.files import is_below, join, read_raw
from megatron_bagel.data.sources.records import BadRow, bad_row
from megatron_bagel.data.sources.row_rules import BUILD
from megatron_bagel.data.sources.unit import SourceUnit

SHOWN_NAME = 200  # characters of a file name in a reason
_WITHOUT_BYTES = "an image {bytes, path} without bytes; write the files' bytes into the parquet file"


def image_bytes(value: Any, column: str) -> bytes:
    """Return the bytes of an image cell: bytes themselves, or the struct {bytes, path} of Hugging Face's datasets."""
    if isinstance(value, dict) and "bytes" in value:
        if value["bytes"] is None:
            raise BadRow(f"column {column} holds {_WITHOUT_BYTES}")
        value = value["bytes"]
    if not isinstance(value, bytes):
        kind = "not a list of bytes" if column == "image_list" else "not bytes"
        raise BadRow(f"column {column} holds {type(value).__name__}, {kind}")
    return value


def read_file(kind: str, name: str, unit: SourceUnit) -> bytes:
    """Return the bytes of a file below the unit's image folder; ``kind`` says what it is. Raises BadRow if it cannot be read."""
    shown = name if len(name) <= SHOWN_NAME else f"{name[:SHOWN_NAME]}..."
    if not unit.rules.allow_outside_root and not is_below(unit.image_dir, name):
        raise BadRow(f"{kind} {shown} leaves the folder {unit.image_dir}; --allow_outside_root of {BUILD} reads it")
    try:
        return read_raw(join(unit.image_dir, name))
    except MemoryError:
        raise
    except Exception as error:  # a client of a remote file system may raise anything
        reason = error.strerror if isinstance(error, OSError) and error.strerror else bad_row(error)
        raise BadRow(f"{kind} {join(unit.image_dir, shown)} cannot be read ({reason})") from error


@dataclass(frozen=True)
class Pictures:
    """Reads the pictures that one row names. ``members`` are those of its sample in a tar file, whose name is ``key``."""

    unit: SourceUnit
    members: Mapping[str, bytes] = field(default_factory=dict)
    key: str = ""

    def read(self, value: Any) -> bytes:
        """Return the bytes of a picture: given as bytes, as {bytes, path}, or by name. Raises BadRow if there are none."""
        if isinstance(value, dict) and ("bytes" in value or "path" in value):
            value = value.get("bytes") or (value.get("path") if self.unit.image_dir else None)
            if value is None:
                raise BadRow(_WITHOUT_BYTES)
        if isinstance(value, bytes):
            return value
        if value is None and self.key:
            raise BadRow(f"no picture in sample {self.key}, which has the members {self._names()}")
        if not isinstance(value, str) or not value:
            raise BadRow(f"an image is a file name, bytes or {{bytes, path}}, not {type(value).__name__}")
        if self.key:
            return self._member(value)
        if not self.unit.image_dir:
            raise BadRow(f"image {value[:SHOWN_NAME]} is a file name, and the dataset has no folder of images (data_dir)")
        return read_file("image", value, self.unit)

    def _member(self, name: str) -> bytes:
        for member in (name, name.removeprefix(f"{self.key}.").lower(), name.rsplit("/", 1)[-1].split(".", 1)[-1].lower()):
            if member in self.members:
                return self.members[member]
        raise BadRow(f"member {name[:SHOWN_NAME]} is missing from sample {self.key}, which has {self._names()}")

    def _names(self) -> str:
        return ", ".join(sorted(self.members))
