# SPDX-License-Identifier: Apache-2.0
"""Threads that decode change how fast pictures come, and nothing else."""

from __future__ import annotations

import os
import pickle
import threading
from pathlib import Path

import pytest
import torch

from megatron_bagel.data.index.sequences import open_indexed
from megatron_bagel.data.loading import pack_reader
from megatron_bagel.data.loading.decode_threads import DecodeThreads
from megatron_bagel.data.loading.loaded_pack import LoadedPack
from megatron_bagel.data.loading.loader import PackLoader
from megatron_bagel.data.loading.pack_reader import PackReader
from megatron_bagel.data.planner.group_source import open_sources
from megatron_bagel.data.planner.planner import Planner, PlannerConfig
from megatron_bagel.data.planner.sample_plan import PlanSettings
from megatron_bagel.data.tokenizer import load_tokenizer
from megatron_bagel.layout.pack import LayoutSpec
from tests.data.golden_index import build_golden_index, golden_groups


@pytest.mark.parametrize("threads", [0, 1, 2, 5])
def test_results_come_in_the_order_of_the_jobs(threads: int) -> None:
    pool = DecodeThreads(threads)
    assert pool.map(lambda job: job * job, range(40)) == [job * job for job in range(40)]
    assert pickle.loads(pickle.dumps(pool)).map(str, [1, 2]) == ["1", "2"]


def test_jobs_run_side_by_side_and_their_errors_arrive() -> None:
    together = threading.Barrier(3, timeout=240)
    DecodeThreads(3).map(lambda _: together.wait(), range(3))  # would end in a broken barrier, one after the other
    with pytest.raises(ZeroDivisionError):
        DecodeThreads(2).map(lambda job: 1 // job, [1, 0])


def test_a_forked_process_has_threads_of_its_own() -> None:
    pool = DecodeThreads(2)
    assert len(pool.map(str, range(4))) == 4
    child = os.fork()
    if not child:
        os._exit(0 if pool.map(str, range(4)) == ["0", "1", "2", "3"] else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_negative_number_is_refused() -> None:
    with pytest.raises(ValueError, match="decode_threads"):
        DecodeThreads(-1)


@pytest.mark.parametrize("workers", [0, 1])
def test_threads_change_no_pixel(goldens: Path, tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every picture of several packs, with one shard open at a time, so that threads take the files from one another."""
    monkeypatch.setattr(pack_reader, "_MIN_THREADED_PIXELS", 0)
    index = build_golden_index(goldens, tmp_path / "index")
    words = load_tokenizer(goldens / "hf")
    spec = LayoutSpec(words.bos, words.eos, words.start_of_image, words.end_of_image, vit_max_side=16, max_latent_size=16)
    groups = open_sources(golden_groups(goldens), index, PlanSettings(seed=3, layout=spec))
    config = PlannerConfig(400, 300, 200, 20, seed=3, global_batch_size=2)

    def packs(threads: int) -> list[LoadedPack]:
        reading = PackLoader(Planner(groups, config), PackReader(groups, spec, seed=5, decode_threads=threads), num_workers=workers)
        loaded = [pack for _ in range(6) for pack in next(reading).packs]
        reading.close()
        return loaded

    monkeypatch.setattr("megatron_bagel.data.index.sequences.open_indexed", _one_at_a_time)
    for one, other in zip(packs(0), packs(4), strict=True):
        assert torch.equal(one.vit_patches, other.vit_patches)
        assert torch.equal(one.vae_buffer, other.vae_buffer)


def _one_at_a_time(*stem: object) -> object:
    open_indexed.cache_clear()
    return open_indexed(*stem)
