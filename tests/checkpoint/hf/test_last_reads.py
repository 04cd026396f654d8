# SPDX-License-Identifier: Apache-2.0
"""Large pretrained folders do not stay in the page cache, and nothing leaves it that is still to be read.

A tensor that is in the cache when it is read again does not come from the disk a second time.
"""

from __future__ import annotations

import mmap
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from megatron_bagel.assembly.starting_weights import InitialSettings, WeightSource, load_first_weights
from megatron_bagel.checkpoint.hf import last_reads, safetensors_io
from megatron_bagel.checkpoint.hf.initial_weights import InitialWeights
from megatron_bagel.checkpoint.hf.last_reads import LastReads
from megatron_bagel.checkpoint.hf.load import LoadReport
from megatron_bagel.checkpoint.hf.pretrained import View
from megatron_bagel.checkpoint.hf.safetensors_io import SafetensorsReader, ShardedWriter
from megatron_bagel.checkpoint.hf.weight_map import WeightMap
from megatron_bagel.common import page_cache
from megatron_bagel.config.architecture import BagelArch, LLMArch
from tests.checkpoint.hf.test_large_shards import _disk_that_can_forget, cached_share, forget, residency  # noqa: F401 - the fixture that skips
from tests.checkpoint.parameter_tree import model_like
from tests.distributed import run_ranks
from tests.waiting import eventually

SPECS = {f"w{number:02d}": ((40, mmap.PAGESIZE // 4), torch.float32) for number in range(12)}
ARCH = BagelArch(LLMArch(256, 768, 2, 4, 2, 1000), max_latent_size=4)


def written(folder: Path, shard_bytes: int | None = 600_000) -> SafetensorsReader:
    """Twelve tensors in four files, none of them in the cache."""
    with ShardedWriter(folder / "model.safetensors", SPECS, shard_bytes=shard_bytes) as writer:
        for name, (shape, _) in SPECS.items():
            writer.write(name, torch.randn(shape))
    for file in folder.glob("*.safetensors"):
        forget(file)
    index = folder / "model.safetensors.index.json"
    return SafetensorsReader(index if index.exists() else folder / "model.safetensors")


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("shard_bytes", [None, 600_000])
def test_what_is_read_again_stays_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int, shard_bytes: int | None
) -> None:
    """Reads in any order, of each tensor up to three times by several names, or never."""
    dropped: list[tuple[Path, int, int]] = []

    def forget_part(path: Path, start: int, end: int | None = None) -> None:
        dropped.append((path, start, path.stat().st_size if end is None else end))
        page_cache.forget_part(path, start, end)

    monkeypatch.setattr(page_cache, "large_bytes", lambda: 1_000_000)
    monkeypatch.setattr(last_reads, "forget_part", forget_part)
    draws, reader, view = random.Random(seed), written(tmp_path, shard_bytes), View(tmp_path)
    plan = [(f"{name}.{number}", name) for name in SPECS for number in range(draws.choice([0, 1, 1, 2, 3]))]
    draws.shuffle(plan)
    for name, stored_name in plan:
        view.add(name, reader, stored_name)
    reads, left = LastReads(view, view.keys()), Counter(stored_name for _, stored_name in plan)
    files = reader.extents()
    for name, stored_name in plan:
        view.get(name)
        left[stored_name] -= 1
        dropped.clear()
        reads.done([name])
        for file, start, end in dropped:
            reached = [other for other, (first, last) in files[file].items() if first < end and start < last]
            assert stored_name in reached and not any(left[other] for other in reached)
        assert bool(dropped) == (not left[stored_name])
        whole = [file for file, extents in files.items() if stored_name in extents and not any(left[other] for other in extents)]
        assert not whole or (whole[0], 0, whole[0].stat().st_size) in dropped


def test_small_files_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_cache, "large_bytes", lambda: 10_000_000)
    for module in (last_reads, safetensors_io):
        monkeypatch.setattr(module, "forget_part", lambda *_: pytest.fail("a small file is dropped"))
    reader = written(tmp_path)
    reads = LastReads(reader, SPECS)
    for name in SPECS:
        reader.get(name)
        reads.done([name])
    reader.forget_files()


def pretrained_decoder(folder: Path) -> Path:
    """A decoder of 9 MB, as transformers holds it, that is not in the cache. Both experts of a run start from it."""
    plain = WeightMap(replace(ARCH, llm=replace(ARCH.llm, layer_module="Qwen2DecoderLayer", qk_norm=False)))
    names = {name.removeprefix("language_model."): shape for name, shape in plain.hf_shapes().items() if name.startswith("language_model.")}
    save_file({name: torch.randn(shape) for name, shape in names.items()}, folder / "model.safetensors")
    forget(folder / "model.safetensors")
    return folder / "model.safetensors"


def cached_pages(file: Path, start: int, end: int) -> float:
    """The share of the pages of a part of a file that the system holds in memory."""
    pages = residency(file)[start // mmap.PAGESIZE : -(-end // mmap.PAGESIZE)]
    return sum(pages) / len(pages)


def _start(file: Path) -> list[tuple[str, float]]:
    """Fill a model as a run does, on the second rank after the first is done reading.

    Returns the tensors in the order of their reading, with the share that was in memory then, and "dropped" where the file was dropped.
    """
    import torch.distributed as dist

    page_cache.large_bytes = lambda: 1_000_000
    first_done, fill, read_into, events = file.with_suffix(".read"), InitialWeights.fill, SafetensorsReader.read_into, []

    def in_turn(self: InitialWeights, modules: list[torch.nn.Module], forgets: bool = False) -> LoadReport:
        if dist.get_rank():
            eventually(first_done.exists)
        report = fill(self, modules, forgets)
        first_done.touch()
        return report

    def looked_at(self: SafetensorsReader, name: str, out: torch.Tensor) -> None:
        events.append((name, cached_pages(file, *self.extents()[file][name])))
        read_into(self, name, out)

    def forget_part(path: Path, start: int, end: int | None = None) -> None:
        if (start, end) == (0, None):
            events.append(("dropped", 0.0))
        page_cache.forget_part(path, start, end)

    InitialWeights.fill, SafetensorsReader.read_into = in_turn, looked_at
    last_reads.forget_part = safetensors_io.forget_part = forget_part
    initial = InitialSettings(1, str(file.parent), None)
    modules = SimpleNamespace(named=dict(zip(("decoder", "tower"), model_like(WeightMap(ARCH)), strict=True)))
    load_first_weights(initial, WeightSource(), modules, ARCH)
    return events


@pytest.mark.distributed
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_start_reads_the_folder_once_and_drops_it(tmp_path: Path, ranks: int) -> None:
    """Although each weight of a layer is wanted by two experts, and by every rank."""
    first, *others = run_ranks(_start, ranks, pretrained_decoder(tmp_path))
    counts = Counter(name for name, _ in first)
    assert max(counts.values()) == 2 and len(first) > 1.5 * len(counts)
    seen: set[str] = set()
    for name, share in first:
        assert share == 1 or name not in seen, f"{name} was dropped before its second reading"
        seen.add(name)
    assert all(share == 1 for events in others for _, share in events[:-1])
    for events in (first, *others):
        assert [name for name, _ in events].index("dropped") == len(events) - 1, "dropped once, after the last reading"


def test_dropped_parts_leave_memory(tmp_path: Path) -> None:
    """The pages of a part, and no others."""
    file, half = tmp_path / "file", 64 * mmap.PAGESIZE
    file.write_bytes(bytes(2 * half))
    forget(file)
    file.read_bytes()
    # Kept in pieces, of which only whole ones are dropped.
    page_cache.forget_part(file, half)
    assert cached_pages(file, 0, half) == 1
    file.read_bytes()
    page_cache.forget_part(file, 0)
    assert cached_share(file) == 0
