# SPDX-License-Identifier: Apache-2.0
"""Opens source files from local paths, and from URLs that pyarrow (s3, gs, hdfs) or fsspec (any other scheme) supports.

Locations are plain strings, because a ``Path`` would merge the two slashes of a URL. index/index_cache.py opens an index at a URL.
"""

from __future__ import annotations

import io
import os
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO, TypeVar
from urllib.parse import unquote

import fsspec
import pyarrow as pa
from pyarrow import fs

from megatron_bagel.common.files import is_stray

_BUCKET_SCHEMES = ("s3", "gs", "gcs")  # the bucket follows the scheme and is part of pyarrow's path
_ARROW_SCHEMES = (*_BUCKET_SCHEMES, "file", "hdfs", "viewfs")
_MAX_ATTEMPTS, _FIRST_PAUSE = 4, 1.0  # of remote reads; seconds before the second attempt, doubled for each further one
T = TypeVar("T")


def is_remote(location: str) -> bool:
    """Return whether ``location`` is a URL instead of a local path."""
    return "://" in location


def join(root: str, name: str) -> str:
    """Return ``name`` below ``root``; an absolute path or a URL is returned unchanged."""
    if is_remote(name) or os.path.isabs(name):
        return name
    return f"{root.rstrip('/')}/{name}" if is_remote(root) else str(Path(root, name))


def is_below(root: str, name: str) -> bool:
    """Return whether ``name`` stays below ``root``: it may not climb out by ``..``, as an absolute path or as a URL of another place."""
    location = join(root, name)
    if not is_remote(location):
        base = os.path.normpath(root)
        return f"{os.path.normpath(location)}/".startswith(base if base.endswith("/") else f"{base}/")
    base = f"{root.rstrip('/')}/"
    return location.startswith(base) and ".." not in unquote(location[len(base) :]).split("/")


def absolute(location: str) -> str:
    """Return the location in a form that does not depend on a process's working directory."""
    return location if is_remote(location) else str(Path(location).absolute())


def last_parts(location: str) -> tuple[str, ...]:
    """Return the folder and file name of a location, which stay the same when a dataset moves."""
    return tuple(part for part in location.split("/") if part)[-2:]


def list_files(folder: str, ending: str, with_strays: bool = False) -> list[str]:
    """Return the files directly in ``folder`` whose names end in ``ending``, sorted.

    Stray files of other programs are left out unless ``with_strays``. Raises ValueError if the folder does not exist.
    """
    if not is_remote(folder):
        if not Path(folder).is_dir():
            raise ValueError(f"there is no folder {folder}")
        return sorted(str(path) for path in Path(folder).absolute().glob(f"*{ending}") if with_strays or not is_stray(path.name))
    system, path = _file_system(folder)
    infos = _with_retries(lambda: system.get_file_info(fs.FileSelector(path, allow_not_found=True)))
    names = [info.base_name for info in infos if info.type == fs.FileType.File and info.base_name.endswith(ending)]
    names = sorted(name for name in names if with_strays or not is_stray(name))
    if not names and _info(folder).type != fs.FileType.Directory:
        raise ValueError(f"there is no folder {folder}")
    return [join(folder, name) for name in names]


def is_file(location: str) -> bool:
    """Return whether there is a file at ``location``."""
    return _info(location).type == fs.FileType.File if is_remote(location) else Path(location).is_file()


def is_folder(location: str) -> bool:
    """Return whether there is a folder at ``location``. Object stores know folders only by the files below them."""
    return _info(location).type == fs.FileType.Directory if is_remote(location) else Path(location).is_dir()


def size_and_time(location: str) -> tuple[int, int]:
    """Return the bytes of a file and its modification time in nanoseconds (0 if the store does not report it)."""
    if is_remote(location):
        info = _info(location)
        return info.size, info.mtime_ns or 0
    stat = os.stat(location)
    return stat.st_size, stat.st_mtime_ns


def open_raw(location: str) -> BinaryIO:
    """Open a seekable file for reading. Raises OSError if it does not exist."""
    if not is_remote(location):
        return open(location, "rb")
    system, path = _file_system(location)
    return io.BufferedReader(_with_retries(lambda: system.open_input_file(path)), 1 << 20)


def read_raw(location: str) -> bytes:
    """Return all bytes of a file. Raises OSError if it cannot be read."""
    if not is_remote(location):
        return Path(location).read_bytes()
    system, path = _file_system(location)

    def read() -> bytes:
        with system.open_input_stream(path) as file:
            return file.read()

    return _with_retries(read)


def _info(location: str) -> fs.FileInfo:
    system, path = _file_system(location)
    return _with_retries(lambda: system.get_file_info(path))


def _file_system(location: str) -> tuple[fs.FileSystem, str]:
    """Return the file system of a URL and the path in it. Raises ValueError for an unknown scheme or a missing package."""
    scheme, path_with_host = location.split("://", 1)
    if scheme not in _ARROW_SCHEMES:
        return _fsspec_system(scheme), path_with_host
    host, _, path = path_with_host.partition("/")
    try:
        system = _arrow_system(f"{scheme}://{host}" if scheme != "file" else "file:///")
        return system, path_with_host if scheme in _BUCKET_SCHEMES else f"/{path}"
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
        raise ValueError(f"{location} cannot be opened: {error}") from error


@lru_cache(maxsize=16)
def _arrow_system(root: str) -> fs.FileSystem:
    return fs.FileSystem.from_uri(root)[0]


@lru_cache(maxsize=16)
def _fsspec_system(scheme: str) -> fs.FileSystem:
    try:
        return fs.PyFileSystem(fs.FSSpecHandler(fsspec.filesystem(scheme)))
    except (ImportError, ValueError) as error:
        raise ValueError(f"locations that begin with {scheme}:// cannot be opened: {error}") from error


def _with_retries(read: Callable[[], T]) -> T:
    """Return the result of a remote read, repeated after temporary failures; a missing file fails at once."""
    for attempt in range(_MAX_ATTEMPTS - 1):
        try:
            return read()
        except FileNotFoundError:
            raise
        except OSError:
            time.sleep(_FIRST_PAUSE * 2**attempt)
    return read()
