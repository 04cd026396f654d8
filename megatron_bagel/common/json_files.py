"""JSON objects and JSON lines read from files; every error names the file, and the line where there is one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_bagel.common.json_text import parse_json


def read_json(path: Path, what: str) -> dict[str, Any]:
    """Return the object in a JSON file.

    Args:
        path: The file.
        what: The flag or thing the file belongs to; error messages begin with it.

    Raises:
        ValueError: The file is absent, no JSON, or holds something else than an object.
    """
    if not path.is_file():
        raise ValueError(f"{what}: there is no file {path}")
    try:
        content = parse_json(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{what}: {path} is not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{what}: {path} holds a {type(content).__name__}, expected an object of settings")
    return content


def whole_lines(path: Path, remedy: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number, object) of a file of JSON lines that a killed process may have left with a torn last line.

    The torn line is dropped. ``remedy`` ends the message of the ValueError for a broken line elsewhere.
    """
    lines = path.read_bytes().split(b"\n")
    if not lines[-1]:
        lines.pop()
    for number, line in enumerate(lines, start=1):
        try:
            record = parse_json(line)
        except ValueError as error:
            if number == len(lines):
                return
            raise ValueError(f"{path}, line {number} is not JSON ({error}); {remedy}") from error
        if not isinstance(record, dict):
            raise ValueError(f"{path}, line {number} holds a {type(record).__name__}, expected an object; {remedy}")
        yield number, record
