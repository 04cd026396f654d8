# SPDX-License-Identifier: Apache-2.0
"""The only reader of JSON files and of files of JSON lines. Every error names the file, and the line where there is one."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from megatron_bagel.common.files import read_bytes, read_text
from megatron_bagel.common.json_text import HEAD_BYTES, MAX_JSON_DEPTH, parse_json, wrong_container
from megatron_bagel.common.text_limits import TextLimits

T = TypeVar("T")


def as_stored(value: Any) -> Any:
    """Return ``value`` as it is after a round trip through JSON: tuples become lists, and keys become strings."""
    return json.loads(json.dumps(value))


def read_json_value(path: Path, what: str, max_depth: int = MAX_JSON_DEPTH) -> Any:
    """Return the value in a JSON file, of any type.

    Args:
        path: The file.
        what: The flag or thing the file belongs to; error messages begin with it.
        max_depth: How deep objects and lists may be nested.

    Raises:
        ValueError: The file is absent, unreadable, a Git LFS pointer, or no JSON.
    """
    return parse_json(read_text(path, what), f"{what}: {path}", max_depth)


def read_json(path: Path, what: str) -> dict[str, Any]:
    """Return the object in a JSON file.

    Args:
        path: The file.
        what: The flag or thing the file belongs to; error messages begin with it.

    Raises:
        ValueError: The file is absent, unreadable, a Git LFS pointer, no JSON, or holds something else than an object.
    """
    content = read_json_value(path, what)
    if not isinstance(content, dict):
        raise ValueError(f"{what}: {path} holds a {type(content).__name__}, expected an object of settings")
    return content


def read_json_as(make: Callable[[dict[str, Any]], T], path: Path, what: str) -> T:
    """Return what ``make`` builds of the object in a JSON file.

    Args:
        make: Builds a value of the object. Its errors for wrong values and types become a ValueError that names the file.
        path: The file.
        what: The flag or thing the file belongs to; error messages begin with it.

    Raises:
        ValueError: As ``read_json`` does, or the object is not what ``make`` takes.
    """
    content = read_json(path, what)
    try:
        return make(content)
    except ValueError as error:
        raise ValueError(f"{what}: {path}: {error}") from error
    except (TypeError, AttributeError, KeyError) as error:
        raise ValueError(f"{what}: {path} holds a value of a wrong type ({type(error).__name__}: {error})") from error


def json_lines(path: Path, what: str, limits: TextLimits | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (label, object) of every line of a file of JSON lines that is not blank. The label names file and line.

    Args:
        path: The file.
        what: The flag or thing the file belongs to; error messages begin with it.
        limits: Of a line; None for a file that the package wrote itself.

    Raises:
        ValueError: The file cannot be read (as ``read_bytes`` says), is of another kind, or a line is no JSON object or beyond a limit.
    """
    max_depth = MAX_JSON_DEPTH if limits is None else limits.max_json_depth
    content = read_bytes(path, what)
    if problem := wrong_container(content[:HEAD_BYTES]):
        raise ValueError(f"{what}: {path} {problem}")
    for number, line in enumerate(content.split(b"\n"), start=1):
        if line.strip():
            label = f"{path}, line {number}"
            if limits is not None and (problem := limits.too_long(len(line))):
                raise ValueError(f"{label}: the line has {problem}")
            yield label, _object(parse_json(line, label, max_depth), label)


def whole_lines(path: Path, remedy: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number, object) of a file of JSON lines that a killed process may have left with a torn last line.

    The torn line is dropped. ``remedy`` ends the message of the ValueError for a broken line elsewhere.
    """
    lines = path.read_bytes().split(b"\n")
    if not lines[-1]:
        lines.pop()
    for number, line in enumerate(lines, start=1):
        label = f"{path}, line {number}"
        try:
            record = parse_json(line, label)
        except ValueError as error:
            if number == len(lines):
                return
            raise ValueError(f"{error}; {remedy}") from error
        if not isinstance(record, dict):
            raise ValueError(f"{label} holds a {type(record).__name__}, expected an object; {remedy}")
        yield number, record


def _object(value: Any, label: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{label}: expected an object, found {type(value).__name__}")
    return value
