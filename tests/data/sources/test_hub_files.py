# SPDX-License-Identifier: Apache-2.0
"""Datasets on a hub by name: the hub's real client downloads them from a server on loopback."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from megatron_bagel.data.index.format import read_manifest
from megatron_bagel.data.index.reader import IndexedSamples
from megatron_bagel.data.sources.dataset_config import parse_groups
from tests.data.index_files import SIZES, noise_png
from tests.hub_server import Repository, running_hub

ROOT = Path(__file__).resolve().parents[3]
#: Builds an index per YAML, in one process, and prints a line for each.
BUILDS = """
import sys
from megatron_bagel.cli.data.build import main
tokenizer, *yamls = sys.argv[1:]
for path in yamls:
    print("STATUS", main(["--dataset_config_file", path, "--tokenizer", tokenizer, "--output", path.removesuffix(".yaml")]))
"""


def parquet(first: int, rows: int) -> bytes:
    """A file as ``datasets`` writes it, with its own names of columns."""
    images = [{"bytes": noise_png(first + row), "path": f"{row}.png"} for row in range(rows)]
    buffer = io.BytesIO()
    pq.write_table(pa.table({"img": images, "text": pa.array([f"picture {first + row}" for row in range(rows)])}), buffer)
    return buffer.getvalue()


def group(**keys: Any) -> dict[str, Any]:
    settings = {"dataset_names": ["mine"], "weight": 1, "columns": {"image": "img", "caption": "text"}, "image_transform_args": SIZES}
    return {"t2i_pretrain": {**settings, **keys}}


def test_a_dataset_by_name(goldens: Path, tmp_path: Path) -> None:
    """The training split by default, another one by its files, an older commit by its name; and what is not there, in one sentence."""
    with running_hub() as hub:
        repository = hub.datasets.setdefault("owner/pictures", Repository())
        old = repository.commit({"data/train-00000-of-00001.parquet": parquet(0, 2), "README.md": b"words"})
        files = {f"data/train-0000{n}-of-00002.parquet": parquet(10 * n, 3) for n in range(2)}
        repository.commit({**files, "data/test-00000-of-00001.parquet": parquet(50, 4), "README.md": b"words"})
        configs = {
            "train": group(hub="owner/pictures"),
            "test": group(hub=["owner/pictures@main"], hub_files=["data/test-*"]),
            "old": {**group(), "dataset_info": {"t2i_pretrain": {"mine": {"hub": f"owner/pictures@{old}"}}}},
            "none": group(hub="owner/pictures", hub_files="val/*"),
            "gone": group(hub="owner/elsewhere"),
        }
        for name, content in configs.items():
            (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(content))
        command = [sys.executable, "-c", BUILDS, str(goldens / "hf"), *(str(tmp_path / f"{name}.yaml") for name in configs)]
        done = subprocess.run(command, cwd=ROOT, env=hub.environment(tmp_path / "home"), capture_output=True, text=True, check=False)
        assert [line.split()[1] for line in done.stdout.splitlines() if line.startswith("STATUS")] == ["0", "0", "0", "2", "2"], done.stderr
        downloads = [request for request in hub.requests if request.startswith("GET") and "/resolve/" in request]
    captions = {name: IndexedSamples.open(tmp_path / name).datasets["t2i_pretrain/mine"] for name in ("train", "test", "old")}
    assert [len(captions[name]) for name in captions] == [6, 4, 2]
    assert captions["train"].image_bytes(3, 0) == noise_png(10) and captions["test"].image_bytes(0, 0) == noise_png(50)
    assert "no parquet or tar file of owner/pictures on the hub is called val/*" in done.stderr
    assert "dataset t2i_pretrain/mine: the dataset owner/elsewhere cannot be downloaded from the hub" in done.stderr
    assert len(downloads) == len(set(downloads)) == 4 and not any("README" in request for request in downloads)
    assert f"/snapshots/{old}/data/" in json.dumps([source.path for source in read_manifest(tmp_path / "old").datasets[0].sources])


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"hub_files": "data/*"}, "hub_files belongs to a dataset on the hub"),
        ({"hub": "pictures"}, "hub must be owner/name or owner/name@revision, got 'pictures'"),
        ({"hub": "owner/pictures", "data_dir": "here"}, "it is on the hub, so data_dir must go"),
        ({"hub": ["owner/pictures", "owner/others"]}, "hub needs one entry per dataset name"),
    ],
)
def test_keys_that_do_not_fit(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_groups(group(**keys), "x.yaml", "/")
