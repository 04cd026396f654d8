# SPDX-License-Identifier: Apache-2.0
"""Models on a hub, taken by huggingface_hub's real client from a server on loopback: needed files only, offline mode, and clear errors."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_bagel.checkpoint.hf.folder import HFFolder
from megatron_bagel.common.folder_files import SMALL_FILES
from tests.checkpoint.hf.exported import export
from tests.hub_server import TOKEN, Hub, Repository, running_hub

#: Answers a list of [name, attributes of HubRequest] with the folder's files, or with the error.
DRIVER = """
import json, sys
from megatron_bagel.checkpoint.hf.hub import HubRequest, commit_of, download
from megatron_bagel.common.hub_names import parse_hub_name

answers = []
for name, attributes in json.loads(sys.argv[1]):
    request = HubRequest("--model", parse_hub_name(name), **{key: tuple(v) if isinstance(v, list) else v for key, v in attributes.items()})
    try:
        commit = commit_of(request)
        folder = download(request, commit)
        answers.append([commit, sorted(path.name for path in folder.iterdir() if path.exists()), str(folder)])
    except ValueError as error:
        answers.append(str(error))
print(json.dumps(answers))
assert "torch" not in sys.modules, "a command that looks for names on the hub must not wait for torch"
"""
NAME = "owner/bagel"
WEIGHTS = {"weights": ["ema", "model"], "first_only": True, "autoencoder": "wanted"}


def ask(environment: dict[str, str], *requests: tuple[str, dict[str, Any]]) -> list[Any]:
    command = [sys.executable, "-c", DRIVER, json.dumps(requests)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    return list(json.loads(done.stdout.splitlines()[-1]))


@pytest.fixture
def hub(goldens: Path, tmp_path: Path) -> Iterator[Hub]:
    folder = Path(shutil.copytree(goldens / "hf", tmp_path / "hf"))
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02not taken")
    (folder / "teaser.png").write_bytes(b"not taken")
    with running_hub() as hub:
        hub.add(NAME, folder)
        yield hub


def test_only_needed_files_are_taken_and_offline_mode_finds_them(hub: Hub, goldens: Path, tmp_path: Path) -> None:
    repository = hub.models[NAME]
    first = repository.refs["main"]
    repository.refs["v1"] = first
    files = {**repository.commits[first], "model.safetensors": repository.commits[first]["ema.safetensors"]}
    second = repository.commit(files)
    environment = hub.environment(tmp_path / "cache")
    requests = [(f"{NAME}@v1", {}), (f"{NAME}@v1", WEIGHTS), (NAME, {**WEIGHTS, "first_only": False}), (f"{NAME}@{first}", WEIGHTS)]
    configs, whole, newest, pinned = ask(environment, *requests)
    small = {file.name for file in (goldens / "hf").iterdir()} & set(SMALL_FILES)
    assert configs[0] == first and set(configs[1]) == small
    assert set(whole[1]) == small | {"ema.safetensors", "ae.safetensors"} and pinned == whole
    assert (Path(whole[2]) / "ema.safetensors").read_bytes() == (goldens / "hf/ema.safetensors").read_bytes()
    assert newest[0] == second and set(newest[1]) == small | {"ema.safetensors", "model.safetensors", "ae.safetensors"}
    taken = hub.downloads()
    assert not {"pytorch_model.bin", "teaser.png"} & set(taken)
    hub.requests.clear()
    offline = hub.environment(tmp_path / "cache", HF_HUB_OFFLINE="1")
    assert ask(offline, (f"{NAME}@v1", WEIGHTS), (NAME, WEIGHTS), (f"{NAME}@{first}", {})) == [whole, newest, whole]
    [lacking, other, absent] = ask(offline, (f"{NAME}@v1", {"weights": ["model"]}), (f"{NAME}@v2", {}), ("owner/other", {}))
    assert "has no model weights in safetensors; it has ae.safetensors, ema.safetensors" in lacking and "start once with a conn" in lacking
    for error in (other, absent):
        assert "does not hold owner/" in error and "HF_HUB_OFFLINE is set" in error
    assert hub.requests == [], "offline mode asks nobody"


def test_each_error_says_what_to_do(hub: Hub, tmp_path: Path) -> None:
    hub.models["owner/gated"] = Repository(gated=True)
    hub.models["owner/gated"].commit(hub.models[NAME].commits[hub.models[NAME].refs["main"]])
    hub.models["owner/pickles"] = Repository()
    hub.models["owner/pickles"].commit({"config.json": b"{}", "pytorch_model.bin": b"\x80\x02"})
    hub.models["owner/torn"] = Repository()
    index = json.dumps({"weight_map": {"a": "ema-00001-of-00002.safetensors", "b": "ema-00002-of-00002.safetensors"}}).encode()
    hub.models["owner/torn"].commit({"ema.safetensors.index.json": index, "ema-00001-of-00002.safetensors": b"x"})
    names = ("owner/bagle", f"{NAME}@v9", "owner/gated", "owner/pickles", "owner/torn")
    typo, revision, gated, pickles, torn = ask(hub.environment(tmp_path / "cache"), *((name, WEIGHTS) for name in names))
    assert f"there is no folder owner/bagle here, and {hub.url} has no model owner/bagle: check the spelling" in typo
    assert "owner/bagel has no revision v9: give a branch, a tag or a commit" in revision
    assert f"owner/gated is gated: accept its terms at {hub.url}/owner/gated, then log in with hf auth login or set HF_TOKEN" in gated
    assert "owner/pickles has no ema or model weights in safetensors; it has pytorch_model.bin" in pickles
    assert "ema.safetensors.index.json of owner/torn names files that the model does not have: ema-00002-of-00002.safetensors" in torn
    [allowed] = ask(hub.environment(tmp_path / "cache", HF_TOKEN=TOKEN), ("owner/gated", WEIGHTS))
    assert "ema.safetensors" in allowed[1]


def test_without_a_network_the_cache_serves_or_the_error_says_so(goldens: Path, tmp_path: Path) -> None:
    with running_hub() as hub:
        hub.add(NAME, goldens / "hf")
        [whole] = ask(hub.environment(tmp_path / "cache"), (NAME, WEIGHTS))
    cached, absent = ask(hub.environment(tmp_path / "cache"), (NAME, WEIGHTS), ("owner/other", {}))
    assert cached == whole
    assert f"there is no folder owner/other here, and {hub.url} cannot be reached (" in absent and "HF_ENDPOINT" in absent


#: Runs `megatron-bagel convert push` with every list of words, each with a token or without; prints the exit codes.
PUSH = """
import json, os, sys
from megatron_bagel.cli.convert.push import main

codes = []
for token, words in json.loads(sys.argv[1]):
    os.environ["HF_TOKEN"] = token
    codes.append(main(words))
print(codes)
"""


def push(hub: Hub, cache: Path, *calls: tuple[str, list[str]]) -> tuple[list[int], list[str], list[str]]:
    """Exit codes, and the lines that were printed and the errors."""
    command = [sys.executable, "-c", PUSH, json.dumps(calls)]
    done = subprocess.run(command, env=hub.environment(cache), capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("megatron-bagel convert push: ")]
    return json.loads(done.stdout.splitlines()[-1]), done.stdout.splitlines()[:-1], errors


def test_an_export_is_pushed_with_its_card_and_comes_back_equal(goldens: Path, tmp_path: Path) -> None:
    out, torn = export(goldens, tmp_path / "out", shard_bytes=600_000), export(goldens, tmp_path / "torn")
    (torn / "ema.safetensors").write_bytes((torn / "ema.safetensors").read_bytes()[:-1])
    card = (out / "README.md").read_text()
    (out / "notes.txt").write_text("stays here")
    to = ["--to", "someone/small", "--license"]
    with running_hub() as hub:
        refused = (TOKEN, [str(out), *to, "other"]), ("", [str(out), *to, "mit"]), (TOKEN, [str(torn), *to, "mit"])
        pushes = (*refused, (TOKEN, [str(out), *to, "apache-2.0", "--private"]))
        codes, printed, errors = push(hub, tmp_path / "cache", *pushes)
        assert codes == [2, 2, 2, 0]
        reasons = ("--license-name and --license-link", "set HF_TOKEN", "not a complete safetensors file")
        assert all(reason in error for error, reason in zip(errors, reasons, strict=True))
        assert [request for request in hub.requests if "commit" in request or "create" in request] == [
            "POST /api/repos/create", "POST /api/models/someone/small/commit/main",
        ], "what is refused sends nothing"  # fmt: skip
        commit = hub.models["someone/small"].refs["main"]
        assert printed[-1] == f"{hub.url}/someone/small/commit/{commit}"
        pushed = hub.models["someone/small"].commits[commit]
        assert set(pushed) == {file.name for file in out.iterdir()} - {"notes.txt"}
        assert all(pushed[file.name] == file.read_bytes() for file in out.iterdir() if file.name not in ("notes.txt", "README.md"))
        assert pushed["README.md"].startswith(b"---\nlicense: apache-2.0\nlibrary_name") and (out / "README.md").read_text() == card
        [whole] = ask(hub.environment(tmp_path / "cache"), ("someone/small", WEIGHTS))
        reader, source = HFFolder(whole[2]).weights(), HFFolder(goldens / "hf").weights()
        names = source.keys()
        assert set(reader.keys()) == set(names) and all(torch.equal(reader.get(name), source.get(name)) for name in names)
