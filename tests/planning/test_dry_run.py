# SPDX-License-Identifier: Apache-2.0
"""A dry run's packs, layout, buffers and checkpoint share are those of a real run's ranks, and its size does not depend on the world's."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_bagel.cli.train import main
from megatron_bagel.config.parser import Config
from megatron_bagel.config.resolve import architecture
from megatron_bagel.config.validate import validate_settings
from tests.costs.test_memory import held
from tests.distributed import fork, run_ranks
from tests.runs import open_run, run_config
from tests.training.equal_runs import CP, EP, ETP, PP, SP_TP2, SPARSE, TP, VPP, cases, world_of


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return world_of(tmp_path_factory.mktemp("world"), num_attention_heads=4, num_key_value_heads=2, vocab_size=447)


def summary(plans: list, packs: list) -> list[tuple]:
    """Which samples make which packs, and every integer of their layout."""
    arrays = [[value.tolist() for value in vars(pack).values() if isinstance(value, np.ndarray)] for pack in packs]
    return [(plan.number, plan.samples, plan.tokens, layout) for plan, layout in zip(plans, arrays, strict=True)]


def real(config: Config) -> tuple[list, list[int], dict[str, int], dict[str, tuple[int, int]]]:
    """A real rank's first packs, its slots by kind, what it holds after a step, and what it would store."""
    from megatron.core import parallel_state

    from megatron_bagel.planning.dry_run import checkpoint_share
    from megatron_bagel.training.step import microbatches

    run = open_run(config)
    batch = next(run.loader)
    shards = microbatches(batch.packs, run.trainable.image_encoder, run.settings)
    slots = [number for shard in shards for number in (shard.length, shard.n_text, shard.n_vit, shard.n_vae, len(shard.labels))]
    share = checkpoint_share(run.trained)
    run.loader.close()
    parallel_state.destroy_model_parallel()
    return summary([loaded.plan for loaded in batch.packs], [loaded.pack for loaded in batch.packs]), slots, share


def dry_run_results(config: Config, ranks: int, results: Any) -> None:
    """Dry runs of all ranks of a world, in a process of its own."""
    from megatron_bagel import platform
    from megatron_bagel.cli.resolve_run import resolve_run
    from megatron_bagel.planning.dry_run import dry_run

    platform.install()
    found, planned = [], resolve_run(config, architecture(config), ranks, has_gpu=True)
    for rank in range(ranks):
        run = dry_run(planned, rank)
        slots = [number for held in run.tokens for number in (held.slots, held.text, held.vit, held.gen, held.ce)]
        found.append((summary(run.plans, run.packs), slots, run.checkpoint, run.built))
    torch.save(found, results)


def dry_runs(config: Config, ranks: int, folder: Path) -> list[tuple]:
    process = fork(dry_run_results, config, ranks, folder / "dry_runs.pt")
    process.join(240)
    assert process.exitcode == 0
    return torch.load(folder / "dry_runs.pt", weights_only=False)


LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "dp2": (2, {}),
    "tp2-sp": (2, SP_TP2),
    "tp4": (4, {TP: 4}),
    "pp2-vpp2": (2, {PP: 2, VPP: 2}),
    "cp2-dp2": (4, {CP: 2}),
    "tp2-sp-pp2-dp2": (8, {**SP_TP2, PP: 2}),
    "dp2-whole-optimizer": (2, {"use_distributed_optimizer": False}),
    "freeze-und": (2, {TP: 2, "freeze_und": True}),
    "first-stage": (4, {TP: 2, PP: 2, "encoder_placement": "first_stage"}),
    "experts-ep2": (2, {**SPARSE, EP: 2}),
    "experts-tp2-sp-pp2-ep2": (4, {**SPARSE, **SP_TP2, PP: 2, EP: 2, ETP: 1}),
}


@pytest.mark.distributed
@pytest.mark.parametrize(("ranks", "flags"), cases(LAYOUTS, "tp2-sp"))
def test_a_dry_run_is_the_run(world: Path, tmp_path: Path, ranks: int, flags: dict) -> None:
    config = run_config(world, tmp_path, ranks, **{"global_batch_size": 4, "bf16": True, **flags})
    reports = dry_runs(config, ranks, tmp_path)
    memories = run_ranks(held, ranks, config)
    for found, (packs, slots, share), (_, memory) in zip(reports, run_ranks(real, ranks, config), memories, strict=True):
        assert found[0] == packs and found[1] == slots
        assert found[2] == share
        assert {name: found[3][name] for name in found[3]} == {name: memory[name] for name in found[3]}


def words_of(world: Path, folder: Path, rank: int, ranks: int, **flags: Any) -> list[str]:
    """Flags of a dry run."""
    values = vars_of(run_config(world, folder, 1)) | {"global_batch_size": None, **flags}
    words = [f"--{name}={value}" for name, value in values.items() if value is not None]
    return [*words, "--dry_run", "--fake_world_size", str(ranks), "--fake_rank", str(rank)]


def vars_of(config: Config) -> dict[str, Any]:
    """The settings that were given, by name."""
    sections = [part for part in config.to_dict().values() if isinstance(part, dict)]
    return {name: value for part in sections for name, value in part.items() if name in config.given}


def test_one_command_builds_a_rank_of_thousands(world: Path, tmp_path: Path) -> None:
    words = words_of(world, tmp_path / "none", 1234, 4096, **{TP: 4, PP: 2, "sequence_parallel": True})
    line = [sys.executable, "-W", "ignore", "-m", "megatron_bagel.train", *words]
    done = subprocess.run(line, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "rank 1234 of 4096: tensor 2, context 0, data 308, pipeline 0" in done.stdout
    assert "largest resident memory" in done.stdout
    assert not (tmp_path / "none").exists()  # a dry run writes nothing


@pytest.mark.parametrize(
    ("rank", "ranks", "flags", "complaint"),
    [
        (64, 64, {}, "--fake_rank 64 is not a rank of --fake_world_size 64"),
        (0, 64, {TP: 3}, "do not divide the 64 ranks"),
        (0, 64, {"index_dir": "nowhere"}, "there is no folder nowhere"),
    ],
)
def test_impossible_dry_runs_are_refused(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture, rank: int, ranks: int, flags: dict, complaint: str
) -> None:
    assert main(words_of(world, tmp_path, rank, ranks, **flags)) == 2
    assert complaint in capsys.readouterr().err


def test_a_dry_run_builds_no_index(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(words_of(world, tmp_path / "none", 0, 64, index_dir=None)) == 2
    assert "build one with data_tools/build_index.py" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_a_rank_without_a_dry_run_is_refused() -> None:
    with pytest.raises(ValueError, match="add --dry_run, or drop them"):
        validate_settings(Config.from_values({"fake_rank": 3}), 8, has_gpu=False)
