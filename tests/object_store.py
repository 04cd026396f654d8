# SPDX-License-Identifier: Apache-2.0
"""An S3 server on loopback (moto), which the real clients of pyarrow and of s3fs talk to."""

from __future__ import annotations

import logging
import os
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest

from megatron_bagel.data.sources import files

BUCKET = "s3://bucket"


@contextmanager
def running_store() -> Iterator[str]:
    """Serve an empty bucket while the block runs; the environment names the server and its keys. Yields the URL of the bucket."""
    pytest.importorskip("s3fs")
    server_module = pytest.importorskip("moto.server")
    import s3fs

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    keys = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1", "no_proxy": "127.0.0.1"}
    files._arrow_system.cache_clear()  # clients of an earlier server
    try:
        with mock.patch.dict(os.environ, {**keys, "AWS_ENDPOINT_URL": f"http://{host}:{port}"}):
            # Moto's servers share their buckets within a process: an earlier one's go first.
            urllib.request.urlopen(urllib.request.Request(f"http://{host}:{port}/moto-api/reset", method="POST")).close()
            s3fs.S3FileSystem.clear_instance_cache()
            s3fs.S3FileSystem().mkdir(BUCKET)
            yield BUCKET
    finally:
        s3fs.S3FileSystem.clear_instance_cache()
        server.stop()


def upload(folder: Path, url: str) -> None:
    """Copy the files of a folder to a URL."""
    import s3fs

    system = s3fs.S3FileSystem()
    for file in folder.rglob("*"):
        if file.is_file():
            system.pipe_file(f"{url}/{file.relative_to(folder).as_posix()}", file.read_bytes())
