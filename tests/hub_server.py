# SPDX-License-Identifier: Apache-2.0
"""A small server on loopback that speaks the protocol of the Hugging Face hub to its real client: models, files, uploads and errors.

The client reads ``HF_ENDPOINT`` when it is imported, so it runs in a process of its own with ``HubServer.environment``.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_token_of_the_tests"
LARGE = 1 << 14  # files from this size on are uploaded as LFS objects


@dataclass
class Repository:
    """A model: ``commits`` holds the files of every commit by name, ``refs`` the commit of every branch and tag."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    gated: bool = False

    def commit(self, files: Mapping[str, bytes], branch: str = "main") -> str:
        """Add a commit with these files to a branch. Returns its name."""
        digest = hashlib.sha1(repr((len(self.commits), sorted(files))).encode()).hexdigest()
        self.commits[digest] = dict(files)
        self.refs[branch] = digest
        return digest

    def find(self, revision: str) -> str | None:
        """Return the commit that a branch, tag or commit names."""
        return self.refs.get(revision) or (revision if revision in self.commits else None)


@dataclass
class Hub:
    """All models and datasets by name. ``requests`` lists what was asked, ``delay`` holds back every download by seconds."""

    models: dict[str, Repository] = field(default_factory=dict)
    datasets: dict[str, Repository] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    objects: dict[str, bytes] = field(default_factory=dict)
    delay: float = 0.0
    url: str = ""

    def add(self, name: str, folder: Path) -> str:
        """Add a folder's files as a model. Returns the commit."""
        files = {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}
        return self.models.setdefault(name, Repository()).commit(files)

    def downloads(self) -> list[str]:
        """Return the names of the files that were downloaded, in order."""
        return [request.rsplit("/", 1)[1] for request in self.requests if request.startswith("GET") and "/resolve/" in request]

    def environment(self, cache: Path, **more: str) -> dict[str, str]:
        """Return the environment of a process that uses this hub, with an empty home of its own."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGINGFACE_"))}
        hub = {"HF_ENDPOINT": self.url, "HF_HOME": str(cache), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        return {**kept, **hub, "HF_HUB_DISABLE_PROGRESS_BARS": "1", "no_proxy": "127.0.0.1", **more}


@contextmanager
def running_hub() -> Iterator[Hub]:
    """Serve a hub on a free port of loopback while the block runs."""
    hub = Hub()

    class Handler(_Handler):
        pass

    Handler.hub = hub
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *arguments: Any) -> None:
        """Nothing is printed."""

    def _answer(self, status: int, content: Any = b"", headers: Mapping[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _fail(self, status: int, code: str) -> None:
        self._answer(status, {"error": code}, {"X-Error-Code": code, "X-Error-Message": code})

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline().strip(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", "0")))

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        if match := re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(revision|tree)/(.+))?", path):
            self._repository(self._kind(match[1]), match[2], match[3], match[4] or "main")
        elif match := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._file(self._kind(match[1] or ""), match[2], match[3], match[4])
        else:
            self._fail(404, "EntryNotFound")

    def _kind(self, word: str) -> dict[str, Repository]:
        return self.hub.datasets if word.startswith("datasets") else self.hub.models

    def _repository(self, repositories: dict[str, Repository], name: str, part: str | None, revision: str) -> None:
        repository = repositories.get(name)
        commit = repository.find(revision) if repository is not None else None
        if repository is None or commit is None:
            self._fail(404, "RepoNotFound" if repository is None else "RevisionNotFound")
            return
        files = repository.commits[commit]
        if part == "tree":
            self._answer(200, [{"type": "file", "path": file, "size": len(data), "oid": _etag(data)} for file, data in files.items()])
            return
        siblings = [{"rfilename": file, "size": len(data)} for file, data in files.items()]
        self._answer(200, {"id": name, "modelId": name, "sha": commit, "siblings": siblings, "private": False, "tags": []})

    def _file(self, repositories: dict[str, Repository], name: str, revision: str, file: str) -> None:
        repository = repositories.get(name)
        commit = repository.find(revision) if repository is not None else None
        if repository is None or commit is None:
            self._fail(404, "RepoNotFound" if repository is None else "RevisionNotFound")
        elif repository.gated and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._fail(403, "GatedRepo")
        elif file not in repository.commits[commit]:
            self._fail(404, "EntryNotFound")
        else:
            data = repository.commits[commit][file]
            if self.command == "GET":
                time.sleep(self.hub.delay)
            self._answer(200, data, {"ETag": f'"{_etag(data)}"', "X-Repo-Commit": commit, "Accept-Ranges": "none"})

    def do_POST(self) -> None:
        split = urlsplit(self.path)
        path, body = unquote(split.path), self._body()
        self.hub.requests.append(f"POST {path}")
        if path == "/api/validate-yaml":
            self._answer(200, {"errors": [], "warnings": []})
        elif self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._fail(401, "Unauthorized")
        elif path == "/api/repos/create":
            content = json.loads(body)
            name = f"{content.get('organization') or 'someone'}/{content['name']}"
            status = 409 if name in self.hub.models else 200
            if status == 200:
                self.hub.models[name] = Repository()
                self.hub.models[name].commit({})
            self._answer(status, {"url": f"{self.hub.url}/{name}", "error": "exists"})
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/(.+)", path):
            files = [{"path": file["path"], "uploadMode": "lfs" if file["size"] >= LARGE else "regular", "shouldIgnore": False}
                     for file in json.loads(body)["files"]]  # fmt: skip
            self._answer(200, {"files": files})
        elif re.fullmatch(r"/[^/]+/[^/]+\.git/info/lfs/objects/batch", path):
            wanted = json.loads(body)["objects"]
            objects = [{**entry, "actions": {"upload": {"href": f"{self.hub.url}/lfs/{entry['oid']}"}}} for entry in wanted]
            self._answer(200, {"transfer": "basic", "objects": objects})
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/(.+)", path):
            self._commit(match[1], match[2], body)
        else:
            self._answer(404, {"error": parse_qs(split.query)})

    def _commit(self, name: str, branch: str, body: bytes) -> None:
        repository = self.hub.models[name]
        files = dict(repository.commits[repository.refs["main"]])
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
        commit = repository.commit(files, branch)
        self._answer(200, {"commitUrl": f"{self.hub.url}/{name}/commit/{commit}", "commitOid": commit, "pullRequestUrl": None})

    def do_PUT(self) -> None:
        self.hub.objects[self.path.rsplit("/", 1)[1]] = self._body()
        self._answer(200)


def _etag(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:40]
