"""Source files wherever they lie: local paths, and URLs that pyarrow (s3, gs, hdfs) or fsspec (any other scheme) can open.

Places are plain strings, because a ``Path`` would fold the two slashes of a URL. Only sources can be remote; an index is
memory-mapped and therefore local.
"""

from __future__ import annotations

import io
import os
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO, TypeVar

import fsspec
import pyarrow as pa
from pyarrow import fs

_BUCKET_SCHEMES = ("s3", "gs", "gcs")  # what follows the scheme begins with the bucket, which is part of pyarrow's path
_ARROW_SCHEMES = (*_BUCKET_SCHEMES, "file", "hdfs", "viewfs")
_TRIES, _PAUSE = 4, 1.0  # for remote reads: attempts, and seconds before the second one (doubled each time)
T = TypeVar("T")


def is_remote(place: str) -> bool:
    """Whether ``place`` is a URL rather than a local path."""
    return "://" in place


def join(root: str, name: str) -> str:
    """``name`` below ``root``; an absolute path or a URL stays as it is."""
    if is_remote(name) or os.path.isabs(name):
        return name
    return f"{root.rstrip('/')}/{name}" if is_remote(root) else str(Path(root, name))


def absolute(place: str) -> str:
    """The place as any process finds it, whatever its working directory."""
    return place if is_remote(place) else str(Path(place).absolute())


def last_parts(place: str) -> tuple[str, ...]:
    """Folder and file name of a place: what stays the same when a data set moves."""
    return tuple(part for part in place.split("/") if part)[-2:]


def list_files(folder: str, ending: str) -> list[str]:
    """Files directly in ``folder`` whose names end in ``ending``, sorted. Raises ValueError when there is no such folder."""
    if not is_remote(folder):
        if not Path(folder).is_dir():
            raise ValueError(f"there is no folder {folder}")
        return sorted(str(path) for path in Path(folder).absolute().glob(f"*{ending}"))
    system, path = _file_system(folder)
    found = _patiently(lambda: system.get_file_info(fs.FileSelector(path, allow_not_found=True)))
    names = sorted(info.base_name for info in found if info.type == fs.FileType.File and info.base_name.endswith(ending))
    if not names and _info(folder).type != fs.FileType.Directory:
        raise ValueError(f"there is no folder {folder}")
    return [join(folder, name) for name in names]


def is_file(place: str) -> bool:
    """Whether there is a file at ``place``."""
    return _info(place).type == fs.FileType.File if is_remote(place) else Path(place).is_file()


def is_folder(place: str) -> bool:
    """Whether there is a folder at ``place``. Object stores know folders only by the files below them."""
    return _info(place).type == fs.FileType.Directory if is_remote(place) else Path(place).is_dir()


def size_and_time(place: str) -> tuple[int, int]:
    """Bytes of a file, and when it was last changed in nanoseconds (0 where the store does not say)."""
    if is_remote(place):
        info = _info(place)
        return info.size, info.mtime_ns or 0
    stat = os.stat(place)
    return stat.st_size, stat.st_mtime_ns


def open_raw(place: str) -> BinaryIO:
    """A file for reading, with ``seek``. Raises OSError when there is none."""
    if not is_remote(place):
        return open(place, "rb")
    system, path = _file_system(place)
    return io.BufferedReader(_patiently(lambda: system.open_input_file(path)), 1 << 20)


def read_raw(place: str) -> bytes:
    """All bytes of a file. Raises OSError when it cannot be read."""
    if not is_remote(place):
        return Path(place).read_bytes()
    system, path = _file_system(place)

    def read() -> bytes:
        with system.open_input_stream(path) as file:
            return file.read()

    return _patiently(read)


def _info(place: str) -> fs.FileInfo:
    system, path = _file_system(place)
    return _patiently(lambda: system.get_file_info(path))


def _file_system(place: str) -> tuple[fs.FileSystem, str]:
    """The file system of a URL and the path in it. Raises ValueError when its scheme is unknown or its package not installed."""
    scheme, rest = place.split("://", 1)
    if scheme not in _ARROW_SCHEMES:
        return _fsspec_system(scheme), rest
    host, _, path = rest.partition("/")
    try:
        system = _arrow_system(f"{scheme}://{host}" if scheme != "file" else "file:///")
        return system, rest if scheme in _BUCKET_SCHEMES else f"/{path}"
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
        raise ValueError(f"{place} cannot be opened: {error}") from error


@lru_cache(maxsize=16)
def _arrow_system(root: str) -> fs.FileSystem:
    return fs.FileSystem.from_uri(root)[0]


@lru_cache(maxsize=16)
def _fsspec_system(scheme: str) -> fs.FileSystem:
    try:
        return fs.PyFileSystem(fs.FSSpecHandler(fsspec.filesystem(scheme)))
    except (ImportError, ValueError) as error:
        raise ValueError(f"places that begin with {scheme}:// cannot be opened: {error}") from error


def _patiently(read: Callable[[], T]) -> T:
    """The result of a remote read, which may fail for a moment; a missing file is told at once."""
    for attempt in range(_TRIES - 1):
        try:
            return read()
        except FileNotFoundError:
            raise
        except OSError:
            time.sleep(_PAUSE * 2**attempt)
    return read()
