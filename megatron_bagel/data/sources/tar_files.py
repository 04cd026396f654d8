# SPDX-License-Identifier: Apache-2.0
"""WebDataset shards (tar files, also those of Megatron-Energon), by the webdataset library: members with a common name are a sample.

A sample's row is the content of its ``.json`` member. Its ``.txt`` member is ``caption``, and its picture members are ``image`` (the only
one, or all) and ``image_list``, unless the row says otherwise.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from megatron_bagel.common.json_text import decode
from megatron_bagel.data.sources.files import open_raw
from megatron_bagel.data.sources.parse import parse_line
from megatron_bagel.data.sources.pictures import Pictures
from megatron_bagel.data.sources.records import BadRow, RawSample
from megatron_bagel.data.sources.row_format import RowFormat
from megatron_bagel.data.sources.row_samples import sample_of
from megatron_bagel.data.sources.unit import SourceUnit

if TYPE_CHECKING:
    from types import ModuleType

PICTURE_ENDINGS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "pgm", "jp2", "avif", "img")


def _library() -> ModuleType:
    try:
        from webdataset import tariterators
    except ImportError as error:
        raise ValueError("tar shards need the package webdataset, which is not installed (pip install 'megatron-bagel[data]')") from error
    return tariterators


def count_tar_samples(path: str) -> int:
    """Return the number of samples of a tar file from its headers. Raises BadRow if it is none, ValueError without the library."""
    split = _library().base_plus_ext
    count, last_key = 0, None
    try:
        with open_raw(path) as raw, tarfile.open(fileobj=raw, mode="r:") as tar:
            for member in tar:
                key = split(member.name)[0] if member.isreg() and not _is_meta(member.name) else None
                if key is not None and key != last_key:
                    count, last_key = count + 1, key
    except (tarfile.TarError, OSError, EOFError) as error:
        raise BadRow(f"not a readable tar file ({error}); compressed archives must be unpacked") from error
    return count


def _is_meta(name: str) -> bool:
    return re.match(r"__[^/]*__($|/)", name) is not None


def read_tar(unit: SourceUnit) -> Iterator[tuple[int, Callable[[], RawSample] | BadRow]]:
    """Yield the samples of a tar file: (number, function that parses it, or a reason). A truncated file ends with a reason."""
    library, row = _library(), unit.first_row
    problems: list[str] = []  # of the sample that comes next

    def note(error: Exception) -> bool:
        problems.append(str(error.args[0]) if error.args else type(error).__name__)
        return True

    try:
        with open_raw(unit.path) as raw:
            members = ({**member, "__url__": unit.path} for member in library.tar_file_iterator(raw))
            for sample in library.group_by_keys(members, handler=note):
                yield row, BadRow(problems[0].splitlines()[0][:200]) if problems else partial(_parse, sample, unit)
                row += 1
                problems.clear()
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        yield (
            row,
            BadRow(f"the file cannot be read from here on ({str(error).splitlines()[0][:200] if str(error) else type(error).__name__})"),
        )


def _parse(sample: Mapping[str, Any], unit: SourceUnit) -> RawSample:
    assert unit.row_format is not None
    members = {name: data for name, data in sample.items() if not name.startswith("__")}
    row = tar_row(members, unit.row_format, parse_line(members["json"], unit.rules) if "json" in members else {})
    return sample_of(row, unit.group, Pictures(unit, members, str(sample["__key__"])), unit.row_format, unit.rules)


def tar_row(members: Mapping[str, bytes], row_format: RowFormat, content: Mapping[str, Any]) -> dict[str, Any]:
    """Return a sample's row: the content of its JSON, completed by its other members. ``columns`` may also name members."""
    pictures = sorted(filter(_is_picture, members), key=lambda name: [int(part) if part.isdigit() else -1 for part in name.split(".")])
    row = row_format.renamed(content)
    for ours, theirs in row_format.columns:
        if theirs in members:
            row[ours] = theirs if _is_picture(theirs) else decode(members[theirs])
    if "txt" in members and "captions" not in row:
        row.setdefault("caption", decode(members["txt"]))
    if pictures:
        row.setdefault("image", pictures[0] if len(pictures) == 1 else pictures)
        row.setdefault("image_list", pictures)
    return row


def _is_picture(name: str) -> bool:
    return name.rsplit(".", 1)[-1] in PICTURE_ENDINGS
