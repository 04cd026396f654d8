# SPDX-License-Identifier: Apache-2.0
"""Training from stored posteriors gives the losses of encoding, needs no autoencoder, and refuses a cache of something else."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from megatron_bagel.cli.data.latents import main
from megatron_bagel.cli.data.verify import main as verify
from megatron_bagel.common.files import replacing, write_whole
from megatron_bagel.data.index.build import BuildOptions, build_index
from megatron_bagel.data.index.format import read_manifest
from megatron_bagel.data.index.latent_cache import LatentCache
from megatron_bagel.data.index.reader import IndexedSamples
from megatron_bagel.data.loading.loaded_pack import LoadedPack
from megatron_bagel.data.loading.pack_reader import PackReader
from megatron_bagel.data.planner.assign import PackPlan
from megatron_bagel.data.planner.group_source import GroupSource, open_sources
from megatron_bagel.data.planner.sample_plan import PlanSettings
from megatron_bagel.data.sources.dataset_config import load_groups
from megatron_bagel.data.transforms import decode_rgb, image_tensor
from megatron_bagel.encoders import latent_writer
from megatron_bagel.encoders.autoencoder_io import load_autoencoder
from megatron_bagel.encoders.latent_writer import CacheOptions, write_latent_cache
from megatron_bagel.layout.pack import LayoutSpec
from megatron_bagel.training.observability.metrics_file import read_history
from tests import runs
from tests.data.index_files import groups_of, noise_png, write_t2i
from tests.distributed import fork


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.make_world(tmp_path_factory.mktemp("world"))


def command(world: Path, output: Path, *more: str) -> list[str]:
    config = ["--dataset_config_file", str(world / "data/dataset.yaml"), "--vae", str(world / "ae.safetensors")]
    return [str(world / "index"), *config, "--output", str(output), *more]


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def open_cache(world: Path, cache: Path, change: Callable[[dict], None] = lambda _: None) -> LatentCache:
    content = yaml.safe_load((world / "data/dataset.yaml").read_text())
    change(content)
    (world / "data/changed.yaml").write_text(yaml.safe_dump(content))
    return LatentCache(cache, read_manifest(world / "index"), load_groups(world / "data/changed.yaml"))


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("ranks", "layout"),
    [(1, {}), pytest.param(2, {"pipeline_model_parallel_size": 2, "num_workers": 1}, marks=pytest.mark.slow)],
)
def test_the_same_losses_without_a_vae(world: Path, tmp_path: Path, ranks: int, layout: dict) -> None:
    assert main(command(world, tmp_path / "latents")) == 0
    encoded = runs.run(runs.run_config(world, tmp_path / "encoded", total_steps=3))
    absent = {"vae_path": str(tmp_path / "none.safetensors"), "latent_cache": str(tmp_path / "latents"), **layout}
    cached = runs.run(runs.run_config(world, tmp_path / "cached", ranks, total_steps=3, **absent), ranks)
    for name in ("ce", "mse", "grad_norm"):
        assert [record[name] for record in cached] == pytest.approx([record[name] for record in encoded], rel=1e-5)
    assert all(record["mse"] > 0 for record in encoded)


@pytest.mark.slow
@pytest.mark.distributed
def test_evaluated_as_a_run_that_encodes(world: Path, tmp_path: Path) -> None:
    assert main(command(world, tmp_path / "latents")) == 0
    flags = {"total_steps": 1, "split": "75,25", "eval_every": 1, "eval_samples": 3, "eval_pictures": 1, "eval_timesteps": 3}
    cache = {"latent_cache": str(tmp_path / "latents")}
    found = {}
    for name, more in (("encoded", {}), ("cached", cache), ("no vae", {**cache, "vae_path": str(tmp_path / "none.safetensors")})):
        runs.run(runs.run_config(world, tmp_path / name, **flags, **more))
        (line,) = read_history(tmp_path / name / "validation.jsonl")
        sheets = {path.name: np.asarray(Image.open(path)).astype(int) for path in (tmp_path / name / "samples").glob("*.png")}
        found[name] = {key: value for key, value in line.items() if key.startswith(("model/", "ema/"))}, sheets
    losses, sheets = found["encoded"]
    assert any("mse/" in key for key in losses) and len(sheets) == 2
    assert found["cached"][0] == pytest.approx(losses, rel=1e-5) and found["no vae"] == (found["cached"][0], {})
    for name, sheet in sheets.items():
        # Rounding to whole grey values is all that may differ.
        assert np.abs(found["cached"][1][name] - sheet).max() <= 1


def killed_while_writing(path: Path) -> None:
    """Leave what a process leaves that is killed while it writes ``path``."""

    def write() -> None:
        with replacing(path) as unfinished:
            unfinished.write_bytes(b"{")
            os.kill(os.getpid(), signal.SIGKILL)

    process = fork(write)
    process.join()
    assert process.exitcode == -signal.SIGKILL


def test_jobs_make_the_same_cache_and_a_stopped_one_goes_on(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(world, tmp_path / "whole")) == 0
    parts = tmp_path / "parts"
    parts.mkdir()
    killed_while_writing(parts / "key.json")
    assert main(command(world, parts, "--num-jobs", "2", "--job-index", "1")) == 0 and "others are not" in capsys.readouterr().out
    with pytest.raises(ValueError, match="is not complete"):
        open_cache(world, parts)
    assert main(command(world, parts, "--num-jobs", "2", "--job-index", "0")) == 0
    assert tree(parts) == tree(tmp_path / "whole")
    (parts / "latents.json").unlink()
    marker = next(parts.rglob("00000.json"))
    marker.unlink()
    killed_while_writing(marker)
    assert main(command(world, parts)) == 0 and tree(parts) == tree(tmp_path / "whole")


@pytest.mark.parametrize("remembered", [0, 1 << 20])
def test_equal_pictures_are_encoded_once_and_stored_for_every_row(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, remembered: int
) -> None:
    """Pictures come back within a batch and after it; each row's posterior is that of its picture."""
    monkeypatch.setattr(latent_writer, "_BATCH", 3)
    monkeypatch.setattr(latent_writer, "_REMEMBERED_BYTES", remembered)
    encoded = []
    autoencoder = load_autoencoder(world / "ae.safetensors")
    encode_many = autoencoder.encode_many
    autoencoder.encode_many = lambda images: encoded.extend(images) or encode_many(images)
    folder, pictures = tmp_path / "t2i", [noise_png(number) for number in (0, 1, 0, 2, 3, 0, 3, 1)]
    write_t2i(folder, [(picture, '{"a": "red"}') for picture in pictures])
    groups = groups_of(tmp_path, "t2i_pretrain")
    build_index(groups, world / "data/tokenizer", tmp_path / "index", BuildOptions(progress=False))
    index = IndexedSamples.open(tmp_path / "index")
    assert write_latent_cache(index, groups, world / "ae.safetensors", autoencoder, tmp_path / "latents", CacheOptions())
    assert len(encoded) == (4 if remembered else 6)
    cache, reader = LatentCache(tmp_path / "latents", index.manifest, groups), index.datasets["t2i_pretrain/t2i"]
    for row, picture in enumerate(pictures):
        pixels = image_tensor(decode_rgb(picture), groups[0].image_transform, 32, 32)
        mean, logvar = encode_many([pixels])[0]
        torch.testing.assert_close(cache.posterior(reader, row, 0, (4, 4)), torch.cat([mean, logvar]).detach())


def test_a_cache_of_something_else_is_refused(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache = tmp_path / "latents"
    assert main(command(world, cache, "--dtype", "bfloat16")) == 0
    open_cache(world, cache)
    with pytest.raises(ValueError, match="image_transform_args of group t2i_pretrain"):
        open_cache(world, cache, lambda content: content["t2i_pretrain"]["image_transform_args"].update(max_image_size=80))
    stored = json.loads((cache / "latents.json").read_text())
    for name, value in (("index", "other"), ("contents", {})):
        (cache / "latents.json").write_text(json.dumps({**stored, name: value}))
        open_cache(world, cache)  # the other of the two still says which index it is
    (cache / "latents.json").write_text(json.dumps({**stored, "index": "other", "contents": {}}))
    with pytest.raises(ValueError, match="another index"):
        open_cache(world, cache)
    assert main(command(world, cache)) == 2 and "remove it or give another --output" in capsys.readouterr().err
    assert main(command(world, cache, "--overwrite")) == 0
    assert main(command(world, world)) == 2 and "is not a latent cache" in capsys.readouterr().err
    data = next(cache.rglob("*.bin"))
    data.write_bytes(data.read_bytes()[:-4])
    name = f"{data.parent.parent.name}/{data.parent.name}"
    with pytest.raises(ValueError, match="should have"):
        open_cache(world, cache).posterior(IndexedSamples.open(world / "index").datasets[name], 0, 0, (2, 2))


@pytest.mark.parametrize("flag", ["vae_encode_padded", "vae_encode_bf16"])
def test_ways_to_encode_are_refused_with_a_cache(world: Path, tmp_path: Path, flag: str) -> None:
    (tmp_path / "latents").mkdir()
    with pytest.raises(ValueError, match=f"--{flag}"):
        runs.run_config(world, tmp_path / "results", latent_cache=str(tmp_path / "latents"), **{flag: True})


def _write_often(path: Path) -> None:
    for number in range(200):
        write_whole(path, json.dumps({"number": number}))


def test_jobs_that_start_at_the_same_moment_do_not_disturb_each_other(world: Path, tmp_path: Path) -> None:
    """They write the same key, and one may see the other's before it has its name."""
    writers = [fork(_write_often, tmp_path / "key.json") for _ in range(3)]
    for writer in writers:
        writer.join(60)
    assert [writer.exitcode for writer in writers] == [0, 0, 0]
    assert json.loads((tmp_path / "key.json").read_text()) == {"number": 199} and len(list(tmp_path.iterdir())) == 1
    cache = tmp_path / "latents"
    cache.mkdir()
    (cache / ".0123abcd-elsewhere-1.key.json").write_text("{")
    assert main(command(world, cache, "--num-jobs", "1")) == 0
    open_cache(world, cache)


def damaged_file(cache: Path, ending: str, offset: int) -> Path:
    """Flip a bit of one file of the T2I group."""
    (path,) = cache.glob(f"t2i_pretrain/*/00000.{ending}")
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)
    return path


def t2i_source(world: Path, cache: Path, check_all: bool = False) -> GroupSource:
    groups, index = load_groups(world / "data/dataset.yaml"), IndexedSamples.open(world / "index")
    latents = LatentCache(cache, index.manifest, groups, check_all)
    spec = LayoutSpec(0, 1, 2, 3, vae_downsample=4, max_latent_size=64, vit_max_side=70)
    sources = open_sources(groups, index, PlanSettings(0, spec), latents=latents)
    return next(source for source in sources if source.name == "t2i_pretrain")


def read_first(source: GroupSource) -> LoadedPack:
    measures = source.measure(np.arange(1), 0)
    plan = PackPlan(0, ((0, 0, 0),), int(measures.tokens[0]), 0.0)
    return PackReader([source], source.settings.layout, 0, source.latents.arch)[plan]


@pytest.fixture(scope="module")
def whole_cache(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    cache = tmp_path_factory.mktemp("whole") / "latents"
    assert main(command(world, cache)) == 0
    return cache


@pytest.fixture
def cache(whole_cache: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole_cache, tmp_path / "latents"))


def test_damage_is_found_before_a_latent_is_trained_on(world: Path, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(read_first(t2i_source(world, cache, check_all=True)).vae_images()) == 1
    assert verify([str(cache)]) == 0 and "all as they should be" in capsys.readouterr().out
    path = damaged_file(cache, "idx", 40)
    with pytest.raises(ValueError, match=r"image 0 of t2i_pretrain/.* sample 0 \(.*\) cannot be read: .*00000\.idx"):
        read_first(t2i_source(world, cache))
    assert verify([str(cache)]) == 1 and path.name in capsys.readouterr().out


def test_a_table_of_before_is_checked_too(world: Path, cache: Path) -> None:
    """An earlier version recorded sizes alone."""
    manifest = json.loads((cache / "latents.json").read_text())
    files = {name: {ending: sizes[ending] for ending in ("bin", "idx")} for name, sizes in manifest["files"].items()}
    del manifest["contents"]
    (cache / "latents.json").write_text(json.dumps({**manifest, "files": files}))
    assert len(read_first(t2i_source(world, cache)).vae_images()) == 1 and verify([str(cache)]) == 0
    damaged_file(cache, "idx", 40)
    with pytest.raises(ValueError, match=r"00000\.idx is damaged"):
        read_first(t2i_source(world, cache))


def test_a_flipped_bit_of_a_latent_is_found_on_request(world: Path, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damaged_file(cache, "bin", 0)
    with pytest.raises(ValueError, match=r"sample 0 .*checksum"):
        read_first(t2i_source(world, cache, check_all=True))
    assert verify([str(cache)]) == 1 and "image 0: its bytes in" in capsys.readouterr().out


def test_a_latent_that_is_not_finite_is_named(world: Path, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = json.loads((cache / "latents.json").read_text())
    (path,) = cache.glob("t2i_pretrain/*/00000.bin")
    data = np.fromfile(path, dtype=np.float32)
    data[1] = np.nan
    data.tofile(path)
    for sizes in manifest["files"].values():  # no checksums: the autoencoder itself gave this
        del sizes["crc"], sizes["crc32"]
    (cache / "latents.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"image 0 of t2i_pretrain/.* sample 0 \(.*\) cannot be read: .*NaN or infinite"):
        read_first(t2i_source(world, cache))
    assert verify([str(cache)]) == 1 and "image 0: its posterior holds NaN" in capsys.readouterr().out


@pytest.mark.parametrize(("content", "reason"), [("{", "not valid JSON"), ("{}", "is damaged"), ("[" * 200_000, "nested deeper than")])
def test_a_damaged_manifest_is_named(world: Path, cache: Path, content: str, reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    (cache / "latents.json").write_text(content)
    with pytest.raises(ValueError, match=rf"latents\.json.*{reason}"):
        open_cache(world, cache)
    assert verify([str(cache)]) == 2 and "latents.json" in capsys.readouterr().err


def test_an_autoencoder_that_gives_nan_is_refused_with_the_image(world: Path, tmp_path: Path) -> None:
    folder = tmp_path / "t2i"
    write_t2i(folder, [(noise_png(0), '{"a": "red"}')])
    groups = groups_of(tmp_path, "t2i_pretrain")
    build_index(groups, world / "data/tokenizer", tmp_path / "index", BuildOptions(progress=False))
    autoencoder = load_autoencoder(world / "ae.safetensors")
    autoencoder.encoder.conv_in.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"NaN or infinite values for image 0 of t2i_pretrain/t2i sample 0 \(.*0000\.parquet, row 0\)"):
        write_latent_cache(
            IndexedSamples.open(tmp_path / "index"), groups, world / "ae.safetensors", autoencoder, tmp_path / "latents", CacheOptions()
        )
