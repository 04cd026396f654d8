# SPDX-License-Identifier: Apache-2.0
"""An index in an object store, opened through a folder of this machine that holds the files which were used last.

    FOLDER/<key of the URL>/manifest.json, <group>/<dataset>/00000.arrow ...    as in the index (format.py)

Planning files are fetched when a shard is planned and stay. A ``.bin`` is fetched when a sample of its shard is first read. The least
recently used ones are removed when space is needed. All processes of a machine share the folder without knowing of each other: a file
appears whole, by a rename, and a reader that finds one removed fetches it again. Nothing maps a ``.bin``, so a removed one takes no space.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeVar

import fsspec
from filelock import FileLock, Timeout

from megatron_bagel.common.files import write_whole
from megatron_bagel.data.index.format import MANIFEST, Manifest, ShardInfo, read_manifest

_DATA = "bin"
_PARTIAL = ".partial"
_SPACE_LOCK = "space.lock"  # held while files are counted and removed
_MAX_ATTEMPTS, _FIRST_PAUSE = 4, 1.0  # of a fetch; seconds before the second attempt, doubled for each further one
_WAIT = 0.1  # seconds between two looks whether other processes have left enough space
_CHUNK = 8 << 20
_Result = TypeVar("_Result")


class IndexUnreachableError(RuntimeError):
    """A file of the index that cannot be fetched. It ends a run: the sample is not at fault, so none takes its place."""


@dataclass(frozen=True)
class IndexCache:
    """An index at a URL and the folder that keeps what was fetched of it. It can be pickled and forked.

    Attributes:
        url: Where the index is (``--index_dir``), in any store that fsspec opens.
        root: ``--index_cache_dir``.
        max_bytes: Limit of the bytes that this index takes in the folder (``--index_cache_bytes``); None for no limit.
    """

    url: str
    root: Path
    max_bytes: int | None = None

    @property
    def folder(self) -> Path:
        """Return the folder that looks like the index, with the files that were fetched."""
        return self.root / hashlib.sha256(self.url.rstrip("/").encode()).hexdigest()[:16]

    def fetch_manifest(self) -> Manifest:
        """Fetch the manifest and return it. Shards that an earlier run with a higher limit left are removed down to the limit.

        Raises:
            ValueError: There is no index at the URL, the folder holds files of an earlier index of this URL, or the limit is too small.
        """
        content = self._read(MANIFEST)
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / MANIFEST
        with FileLock(f"{path}.lock"):
            if path.is_file() and path.read_bytes() != content:
                raise ValueError(
                    f"--index_cache_dir: {self.folder} holds files of another index that was at {self.url} before; remove this folder, or "
                    "give another --index_cache_dir"
                )
            if not path.is_file():
                write_whole(path, content)
        manifest = read_manifest(self.folder)
        limit = self._data_limit(manifest)
        if limit is not None:
            with FileLock(self.folder / _SPACE_LOCK):
                self._make_space(limit)
        return manifest

    def fetch_planning_files(self, stem: Path, info: ShardInfo) -> None:
        """Fetch the small files of the shard at ``stem`` (inside ``folder``) that are not here."""
        stem.parent.mkdir(parents=True, exist_ok=True)
        for ending, (size, sha256) in info.files.items():
            path = Path(f"{stem}.{ending}")
            if ending != _DATA and not path.is_file():
                with FileLock(f"{path}.lock"):
                    if not path.is_file():
                        self._download(path, size, sha256).close()

    def open_data(self, stem: Path, info: ShardInfo) -> BinaryIO:
        """Open the ``.bin`` of a shard; fetch it, and make space for it, if it is not here."""
        path, (size, sha256) = Path(f"{stem}.{_DATA}"), info.files[_DATA]
        try:
            return self._opened(path)
        except FileNotFoundError:
            path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):  # one process of the machine fetches it
            try:
                return self._opened(path)
            except FileNotFoundError:
                self._reserve(path, size)
                return self._download(path, size, sha256)

    def _opened(self, path: Path) -> BinaryIO:
        file = path.open("rb")
        os.utime(path)  # the time of the last use; access times are off on many machines
        return file

    def _data_limit(self, manifest: Manifest) -> int | None:
        """Return the bytes that remain for ``.bin`` files. Raises ValueError if not even the largest fits."""
        if self.max_bytes is None:
            return None
        sizes = [(ending, size) for dataset in manifest.datasets for shard in dataset.shards for ending, (size, _) in shard.files.items()]
        planning = (self.folder / MANIFEST).stat().st_size + sum(size for ending, size in sizes if ending != _DATA)
        largest = max((size for ending, size in sizes if ending == _DATA), default=0)
        if self.max_bytes < planning + largest:
            raise ValueError(
                f"--index_cache_bytes {self.max_bytes} is too small for {self.url}: its planning files, which stay, have {planning} bytes, "
                f"and its largest shard {largest}; give at least {planning + largest}"
            )
        return self.max_bytes - planning

    def _reserve(self, path: Path, size: int) -> None:
        """Make a partial file of the full size, when there is space for it, by removing shards that were not used for longest."""
        limit = self._data_limit(read_manifest(self.folder))
        Path(f"{path}{_PARTIAL}").unlink(missing_ok=True)  # of a process that was killed
        while True:
            with FileLock(self.folder / _SPACE_LOCK):
                if limit is None or self._make_space(limit - size):
                    with open(f"{path}{_PARTIAL}", "wb") as file:
                        file.truncate(size)
                    return
            time.sleep(_WAIT)  # other processes are fetching into the space that is left

    def _make_space(self, limit: int) -> bool:
        """Remove shards until all together have ``limit`` bytes at most. Return whether that was possible."""
        for partial in self.folder.glob(f"*/*/*.{_DATA}{_PARTIAL}"):
            _remove_if_abandoned(partial)
        # Partial files first: one that becomes a shard meanwhile is counted twice, and not never.
        used = sum(_size(partial) for partial in self.folder.glob(f"*/*/*.{_DATA}{_PARTIAL}"))
        shards = {path: path.stat() for path in self.folder.glob(f"*/*/*.{_DATA}")}
        used += sum(stat.st_size for stat in shards.values())
        for path in sorted(shards, key=lambda path: shards[path].st_mtime_ns):
            if used <= limit:
                break
            path.unlink()
            used -= shards[path].st_size
        return used <= limit

    def _download(self, path: Path, size: int, sha256: str) -> BinaryIO:
        """Fetch a file, and return it open, so that its removal by another process cannot come first."""
        name, partial = path.relative_to(self.folder).as_posix(), Path(f"{path}{_PARTIAL}")

        def fetch() -> None:
            digest, written = hashlib.sha256(), 0
            system, root = fsspec.core.url_to_fs(self.url)
            with system.open(f"{root.rstrip('/')}/{name}", "rb", block_size=_CHUNK) as source, partial.open("r+b") as target:
                while chunk := source.read(_CHUNK):
                    digest.update(chunk)
                    written += target.write(chunk)
            if (written, digest.hexdigest()) != (size, sha256):
                raise OSError(f"{written} bytes arrived, and not those of the manifest ({size} bytes); copy the index again")

        partial.touch()
        try:
            _with_retries(fetch)
        except Exception as error:  # the client of an object store may raise anything
            partial.unlink(missing_ok=True)
            raise IndexUnreachableError(f"--index_dir: {self.url.rstrip('/')}/{name} cannot be fetched to {path} ({error})") from error
        file = partial.open("rb")
        partial.replace(path)
        return file

    def _read(self, name: str) -> bytes:
        """Return the content of a small file of the index. Raises ValueError if it cannot be read."""
        location = f"{self.url.rstrip('/')}/{name}"

        def read() -> bytes:
            system, root = fsspec.core.url_to_fs(self.url)
            content: bytes = system.cat_file(f"{root.rstrip('/')}/{name}")
            return content

        try:
            return _with_retries(read)
        except FileNotFoundError as error:
            raise ValueError(f"--index_dir: there is no {location}; copy an index written by data_tools/build_index.py there") from error
        except Exception as error:  # the client of an object store may raise anything
            raise ValueError(f"--index_dir: {location} cannot be read ({error})") from error


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:  # it has just become a shard
        return 0


def _remove_if_abandoned(partial: Path) -> None:
    """Remove a partial file whose writer was killed: its lock is free."""
    try:
        with FileLock(f"{str(partial).removesuffix(_PARTIAL)}.lock", timeout=0):
            partial.unlink(missing_ok=True)
    except Timeout:
        return


def _with_retries(fetch: Callable[[], _Result]) -> _Result:
    """Return the result of a remote read, repeated after failures; what is missing or forbidden fails at once."""
    for attempt in range(_MAX_ATTEMPTS - 1):
        try:
            return fetch()
        except (FileNotFoundError, PermissionError, ImportError, ValueError, MemoryError):
            raise
        except Exception:  # the client of an object store may raise anything
            time.sleep(_FIRST_PAUSE * 2**attempt)
    return fetch()
