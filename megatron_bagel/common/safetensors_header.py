# SPDX-License-Identifier: Apache-2.0
"""The header of a safetensors file, read without PyTorch: names, types, shapes and offsets, with an error that says what a file is instead.

A header is 8 bytes of length (little endian) and JSON: name -> {dtype, shape, data_offsets}. Nothing in a file is ever executed.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Any, NamedTuple

from megatron_bagel.common.files import refuse_lfs_pointer
from megatron_bagel.common.json_files import read_json
from megatron_bagel.common.json_text import parse_json

_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
_PICKLE_MARKS = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
_AGAIN = "it is truncated or damaged: download or copy it again"

#: The autoencoder's weights. An index for servers lists them beside the model's; they are read as a file of their own.
AUTOENCODER_FILE = "ae.safetensors"


class StoredTensor(NamedTuple):
    """A tensor in its file; ``offset`` counts bytes from the start of the file, and ``dtype`` is the format's name ("BF16")."""

    dtype: str
    shape: tuple[int, ...]
    offset: int


def read_header(file: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a file by rising offset. Raises ValueError for a file that is incomplete or no safetensors file."""
    try:
        refuse_lfs_pointer(file, "weights")
        with file.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            head = stream.read(9)
            _refuse_other_formats(file, head)
            length = struct.unpack("<Q", head[:8])[0] if len(head) >= 8 else 0
            if not 2 <= length <= min(size - 8, _MAX_HEADER_BYTES):
                raise ValueError(
                    f"{file} is not a complete safetensors file: it has {size:,} bytes, and its header claims {length:,}; {_AGAIN}"
                )
            entries = parse_json(head[8:] + stream.read(length - 1), f"the header of {file}")
    except OSError as error:
        raise ValueError(f"{file} cannot be read ({error.strerror or error})") from error
    return _tensors(file, entries, 8 + length, size)


def _refuse_other_formats(file: Path, head: bytes) -> None:
    if head[8:9] != b"{" and head.startswith(_PICKLE_MARKS):
        raise ValueError(
            f"{file} is a PyTorch pickle with the name of a safetensors file. Pickles can run code, so it was not opened; get the weights "
            "as safetensors"
        )
    if head.lstrip().startswith(b"<"):
        raise ValueError(f"{file} is a web page and no weights: the download failed; download it again")


def _tensors(file: Path, entries: Any, data_start: int, size: int) -> dict[str, StoredTensor]:
    try:
        entries.pop("__metadata__", None)
        ends = [int(entry["data_offsets"][1]) for entry in entries.values()]
        by_offset = sorted(entries.items(), key=lambda item: item[1]["data_offsets"][0])
        tensors = {
            str(name): StoredTensor(entry["dtype"], tuple(entry["shape"]), data_start + entry["data_offsets"][0])
            for name, entry in by_offset
        }
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file} is not a safetensors file: its header lists no tensors ({type(error).__name__}: {error})") from error
    if (end := data_start + max(ends, default=0)) > size:
        raise ValueError(
            f"{file} is not a complete safetensors file: its header names tensors up to byte {end:,}, and it has {size:,}; {_AGAIN}"
        )
    return tensors


def index_files(index: Path) -> set[str]:
    """Return the names of the files with the model's tensors, by an index. Raises ValueError if it is damaged or names other folders."""
    return set(_names_of_index(index).values()) - {AUTOENCODER_FILE}


def files_of_index(index: Path) -> dict[str, Path]:
    """Return the file of every tensor of the model that an index ``*.safetensors.index.json`` names.

    Raises:
        ValueError: The index is damaged, or names a file that does not exist or is in another folder.
    """
    names = _names_of_index(index)
    files = set(names.values()) - {AUTOENCODER_FILE}
    missing_files = sorted(name for name in files if not (index.parent / name).is_file())
    if missing_files:
        count = len(files)
        raise ValueError(
            f"{index} names files that do not exist: {', '.join(str(index.parent / name) for name in missing_files)} "
            f"({len(missing_files)} of {count}); the folder was not downloaded whole: download them"
        )
    return {tensor: index.parent / name for tensor, name in names.items() if name != AUTOENCODER_FILE}


def _names_of_index(index: Path) -> dict[str, str]:
    """Return the weight_map of an index: tensor names, and names of files in the same folder."""
    names = read_json(index, "weights").get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise ValueError(f"{index} has no weight_map of tensor names and files; copy it again")
    outside = sorted({name for name in names.values() if Path(name).name != name})
    if outside:
        raise ValueError(f"{index} names files outside its folder: {', '.join(outside)}; weights are read from one folder")
    return names
