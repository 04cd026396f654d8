# SPDX-License-Identifier: Apache-2.0
"""From flags to batches: the index is made when none is given, groups follow the flags, what cannot work is refused at the start."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from megatron_bagel.cli.data_settings import data_settings
from megatron_bagel.config.architecture import BagelArch
from megatron_bagel.config.parser import Config
from megatron_bagel.data.loading.build import ensure_index, open_loader, training_groups, training_sources
from megatron_bagel.data.loading.settings import DataSettings
from megatron_bagel.data.planner.assign import assign_packs
from megatron_bagel.data.tokenizer import Tokenizer, load_tokenizer
from tests.data import golden_index


@pytest.fixture(scope="module")
def words(goldens: Path) -> Tokenizer:
    return load_tokenizer(goldens / "hf")


@pytest.fixture(scope="module")
def arch(goldens: Path) -> BagelArch:
    return BagelArch.from_hf_folder(goldens / "hf", max_latent_size=16, vit_max_num_patch_per_side=16)


def config(goldens: Path, folder: Path, **values: object) -> DataSettings:
    (folder / "data.yaml").write_text(yaml.safe_dump(golden_index.CONFIG))
    flags = {
        "dataset_config_file": str(folder / "data.yaml"),
        "data_root": str(goldens / "raw_data"),
        "results_dir": str(folder / "results"),
        "num_workers": 0,
        "max_num_tokens": 400,
        "expected_num_tokens": 300,
        "max_num_tokens_per_sample": 200,
    }
    return data_settings(Config.from_values({**flags, **values}))


def test_batches_from_flags_alone(goldens: Path, tmp_path: Path, words: Tokenizer, arch: BagelArch) -> None:
    run = config(goldens, tmp_path)
    assert ensure_index(run, words) == tmp_path / "results" / "index"
    stamp = (tmp_path / "results/index/manifest.json").stat().st_mtime_ns
    ensure_index(run, words)
    assert (tmp_path / "results/index/manifest.json").stat().st_mtime_ns == stamp  # kept, not made again
    step = next(open_loader(run, arch, words, 2))
    assert len(step.packs) == 2 and all(pack.pack.sequence_length <= 400 for pack in step.packs)
    two = open_loader(run, arch, words, 2, replica=1, replicas=2)
    share = next(two)
    assert [pack.plan for pack in share.packs] == assign_packs([pack.plan for pack in step.packs], 2)[1] and share.totals == step.totals


def test_groups_follow_the_modalities(goldens: Path, tmp_path: Path, words: Tokenizer, arch: BagelArch) -> None:
    ensure_index(config(goldens, tmp_path), words)
    for flag, kind in (("visual_gen", "vae"), ("visual_und", "vit")):
        run = config(goldens, tmp_path, **{flag: False})
        ensure_index(run, words)  # the index is the same whatever part of it is trained on
        assert len(training_groups(run)) < 3
        loader = open_loader(run, arch, words, 2)
        packs = [pack.pack for _ in range(4) for pack in next(loader).packs]
        assert packs and not any(pack.images_of(kind) for pack in packs)


def test_missing_index_is_refused(goldens: Path, tmp_path: Path, words: Tokenizer, arch: BagelArch) -> None:
    run = config(goldens, tmp_path, index_dir=str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="--index_dir .*build_index.py"):
        ensure_index(run, words)


def test_images_larger_than_the_model_are_refused(goldens: Path, tmp_path: Path, words: Tokenizer, arch: BagelArch) -> None:
    ensure_index(config(goldens, tmp_path), words)
    small = BagelArch.from_hf_folder(goldens / "hf", max_latent_size=2, vit_max_num_patch_per_side=16)
    with pytest.raises(ValueError, match="--max_latent_size"):
        open_loader(config(goldens, tmp_path), small, words, 2)


def test_held_out_samples_are_not_trained_on(goldens: Path, tmp_path: Path, words: Tokenizer, arch: BagelArch) -> None:
    run = config(goldens, tmp_path, split="3,1")
    ensure_index(run, words)
    parts = [training_sources(run, arch, words, part) for part in ("train", "validation")]
    for train, held_out in zip(*parts, strict=True):
        names = [{(s.dataset, s.index) for s in (source.sample(i, 0) for i in range(len(source)))} for source in (train, held_out)]
        whole = training_sources(config(goldens, tmp_path), arch, words)
        assert len(names[0]) + len(names[1]) == len(next(source for source in whole if source.name == train.name))
        assert names[0] and names[1] and not names[0] & names[1]
        assert all(not item.dropped for i in range(len(held_out)) for item in held_out.sample(i, 0).items)
    loader = open_loader(run, arch, words, 2)
    trained = {(s.dataset, s.index) for _ in range(12) for pack in next(loader).packs for s in pack.pack.samples}
    held_out = {(s.dataset, s.index) for source in parts[1] for s in (source.sample(i, 0) for i in range(len(source)))}
    assert not trained & held_out
    with pytest.raises(ValueError, match="--split"):
        training_sources(config(goldens, tmp_path), arch, words, "validation")
