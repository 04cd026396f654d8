# SPDX-License-Identifier: Apache-2.0
"""A real Ray on this machine builds the index: workers are killed at random moments, and the bytes are those of one process."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from megatron_bagel.data.index.build import BuildOptions, build_index
from megatron_bagel.data.index.plan import ImageChecks
from megatron_bagel.data.sources.dataset_config import load_groups
from megatron_bagel.platform.launch.ray_cluster import attempt
from tests.data.index_files import SIZES, files_of, write_t2i
from tests.data.interleaved_rows import picture
from tests.ray_kills import ROOT, WORKERS_IN_TURN, run_and_kill
from tests.waiting import eventually

SHARDS, ROWS, KILLS = 80, 50, 10


def source(root: Path) -> Path:
    """Parquet files of one shard each, large pictures that take a while to decode. The last file has a row that cannot be used."""
    pictures = [picture(512, 512, colour) for colour in ("red", "green", "blue")]
    for number in range(SHARDS):
        rows = [(pictures[(number + row) % 3], json.dumps({"a": f"picture {number * ROWS + row}"})) for row in range(ROWS)]
        write_t2i(root / "t2i", rows if number < SHARDS - 1 else [*rows, (b"none", "{}")], f"{number:04d}.parquet")
    keys = {"dataset_names": ["t2i"], "weight": 1, "data_dir": ["t2i"], "image_transform_args": SIZES}
    (root / "data.yaml").write_text(yaml.safe_dump({"t2i_pretrain": keys}))
    return root / "data.yaml"


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def test_an_attempt_appears_whole(tmp_path: Path) -> None:
    """Files of an attempt move to their places at its end, those that mark a shard as complete last; a failed one leaves nothing."""
    with attempt(tmp_path) as folder:
        (folder / "state").mkdir()
        (folder / "state/0.json").write_text("done")
        (folder / "0.bin").write_bytes(b"data")
        assert not (tmp_path / "0.bin").exists()
    assert (tmp_path / "0.bin").read_bytes() == b"data" and (tmp_path / "state/0.json").read_text() == "done"
    with pytest.raises(RuntimeError, match="lost"), attempt(tmp_path) as folder:
        (folder / "1.bin").write_bytes(b"torn")
        raise RuntimeError("lost")
    assert not (tmp_path / "1.bin").exists() and not list((tmp_path / "attempts").iterdir())


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return source(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def expected(config: Path, goldens: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Files of the index that one process makes."""
    output = tmp_path_factory.mktemp("alone") / "index"
    options = BuildOptions(rows_per_shard=ROWS, checks=ImageChecks("decode"), progress=False)
    build_index(load_groups(config), goldens / "hf", output, options)
    return files_of(output)


def command(config: Path, goldens: Path, output: Path, *engine: str) -> list[str]:
    return [
        "-m", "megatron_bagel", "data", "build", "--dataset_config_file", str(config), "--tokenizer", str(goldens / "hf"),
        "--output", str(output), "--rows_per_shard", str(ROWS), "--check_images", "decode", "--engine", "ray", *engine,
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_killed_workers_change_no_byte(config: Path, expected: dict[str, str], goldens: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    assert run_and_kill(command(config, goldens, tmp_path / "ray", "--workers", "2"), "ray::_write", KILLS) == KILLS
    assert files_of(tmp_path / "ray") == expected


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_a_cluster_that_loses_a_machine(
    config: Path, expected: dict[str, str], goldens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two Ray nodes of a processor each, reached by their ``ray://`` address, one of which goes away in the middle."""
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    for name, value in {**WORKERS_IN_TURN, "PYTHONPATH": str(ROOT)}.items():
        monkeypatch.setenv(name, value)
    port = free_port()
    settings = {"num_cpus": 1, "object_store_memory": 100 << 20}
    driver = None
    cluster = Cluster(initialize_head=True, head_node_args={**settings, "ray_client_server_port": port})
    try:
        lost = cluster.add_node(**settings)
        words = command(config, goldens, tmp_path / "ray", "--ray_address", f"ray://127.0.0.1:{port}")
        driver = subprocess.Popen([sys.executable, *words], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        states = tmp_path / "ray.building/state"
        eventually(lambda: driver.poll() is not None or len(list(states.rglob("*.json"))) >= SHARDS // 8, 900)
        assert driver.poll() is None, driver.communicate()[0]
        cluster.remove_node(lost, allow_graceful=False)
        output = driver.communicate(timeout=1200)[0]
        assert driver.returncode == 0, output
    finally:
        if driver is not None:
            driver.kill()
        cluster.shutdown()
    assert files_of(tmp_path / "ray") == expected
