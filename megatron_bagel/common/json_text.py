# SPDX-License-Identifier: Apache-2.0
"""The one rule for text and JSON from outside: encodings, byte-order marks, line ends, and how deep JSON may be nested.

Text is UTF-8, and a byte-order mark is not part of it. A line ends with LF or CR LF. Other characters that Unicode counts as line
ends are ordinary characters, because JSON allows them inside a string.
"""

from __future__ import annotations

import codecs
import json
import re
from typing import Any, BinaryIO

MAX_JSON_DEPTH = 100
HEAD_BYTES = 1 << 16  # bytes that suffice to recognise a container
# UTF-32 first: its little-endian mark begins with that of UTF-16.
_WIDE_MARKS = (
    (codecs.BOM_UTF32_LE, "UTF-32"), (codecs.BOM_UTF32_BE, "UTF-32"), (codecs.BOM_UTF16_LE, "UTF-16"), (codecs.BOM_UTF16_BE, "UTF-16"),
)  # fmt: skip
_CONTAINERS = (
    (b"\x1f\x8b", "is compressed with gzip", "decompress it with gunzip"),
    (b"\x28\xb5\x2f\xfd", "is compressed with zstd", "decompress it with unzstd"),
    (b"\xfd7zXZ\0", "is compressed with xz", "decompress it with unxz"),
    (b"BZh", "is compressed with bzip2", "decompress it with bunzip2"),
    (b"PK\x03\x04", "is a zip archive", "unpack it with unzip"),
    (b"PAR1", "is a parquet file", "write its rows as JSON, one object per line"),
    *((mark, f"is encoded as {name}", f"convert it with iconv -f {name} -t UTF-8") for mark, name in _WIDE_MARKS),
)
_BRACKETS = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|[\[{]|[\]}]', re.DOTALL)
_SURROGATE = re.compile("[\ud800-\udfff]")


def decode(data: bytes) -> str:
    """Decode UTF-8 without its byte-order mark. Raises ValueError for bytes of another encoding."""
    for mark, name in _WIDE_MARKS:
        if data.startswith(mark):
            raise ValueError(f"the text is encoded as {name}, UTF-8 is expected; convert it with iconv -f {name} -t UTF-8")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 ({error})") from error


def parse_json(text: bytes | str, where: str = "", max_depth: int = MAX_JSON_DEPTH) -> Any:
    """Parse one JSON value.

    Args:
        text: The text.
        where: The file, line or sender of the text. Error messages begin with it.
        max_depth: How deep objects and lists may be nested.

    Raises:
        ValueError: The text is not JSON, is nested deeper than ``max_depth``, or holds a number with too many digits for Python.
    """
    try:
        return _parse(text, max_depth)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not valid JSON ({error})" if where else f"not JSON ({error})") from error
    except ValueError as error:
        raise ValueError(f"{where} is not valid JSON ({error})" if where else str(error)) from error


def _parse(text: bytes | str, max_depth: int) -> Any:
    text = decode(text) if isinstance(text, bytes) else text
    if text.count("[") + text.count("{") > max_depth and _is_deeper(text, max_depth):
        raise ValueError(f"JSON nested deeper than {max_depth} levels")
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        raise
    except RecursionError as error:
        raise ValueError("JSON nested deeper than Python can read") from error
    except ValueError as error:  # Python limits the digits of an integer
        raise ValueError(f"JSON with a number that cannot be read ({str(error).split(';')[0]})") from error


def _is_deeper(text: str, max_depth: int) -> bool:
    depth = 0
    for match in _BRACKETS.finditer(text):
        sign = match[0]
        if sign[0] != '"':
            depth += 1 if sign in "[{" else -1
            if depth > max_depth:
                return True
    return False


def split_lines(text: str) -> list[str]:
    """Split text into lines without their ends. A last line without an end counts, an empty rest does not."""
    lines = text.split("\n")
    if not lines[-1]:
        lines.pop()
    return [line.removesuffix("\r") for line in lines]


def wrong_container(head: bytes) -> str | None:
    """Return what a file that should hold one JSON object per line is instead, and what to do, from its first bytes.

    None means that the file may hold such lines.
    """
    for mark, kind, remedy in _CONTAINERS:
        if head.startswith(mark):
            return f"{kind}: one JSON object per line is expected; {remedy}"
    text = head.removeprefix(codecs.BOM_UTF8).lstrip()
    line, end, rest = text.partition(b"\n")
    line = line.strip()
    if not end and b"\r" in line:
        return "ends its lines with CR alone: one JSON object per line is expected; convert it with tr '\\r' '\\n'"
    if line.startswith(b"[") and _is_list_of_objects(line, end, rest):
        return "is one JSON list: one JSON object per line is expected; convert it with jq -c '.[]'"
    if line == b"{" and rest.lstrip().startswith(b'"'):
        return "spreads its JSON over several lines: one JSON object per line is expected; convert it with jq -c ."
    return None


def _is_list_of_objects(line: bytes, end: bytes, rest: bytes) -> bool:
    """Return whether a file whose first line begins with ``[`` is a list of rows instead of lines of which the first is bad."""
    if not end:
        return line[1:].lstrip().startswith((b"{", b"]"))
    try:
        parse_json(line)
    except ValueError:
        return line == b"[" or line[1:].lstrip().startswith(b"{")
    return not rest.strip()


def head_of(file: BinaryIO) -> bytes:
    """Return the first bytes of an open file, enough for ``wrong_container``, and go back to its beginning."""
    head = file.read(HEAD_BYTES)
    file.seek(0)
    return head


def lone_surrogate(text: str) -> str | None:
    """Return the first half of a character without its other half ("U+D83D"), which no encoding can write, or None."""
    match = _SURROGATE.search(text)
    return f"U+{ord(match[0]):04X}" if match else None


def check_encodable(text: str) -> None:
    """Raise ValueError if a text holds half a character, as texts do that were cut at a number of UTF-16 units."""
    if surrogate := lone_surrogate(text):
        raise ValueError(f"the text holds half a character (the lone surrogate {surrogate}); repair the text where it was cut")
