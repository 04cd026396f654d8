# SPDX-License-Identifier: Apache-2.0
"""Opening and planning a very large index, on a synthetic sidecar: the planning columns of T2I samples, without any text or image.

`benchmarks/data.py` prints these numbers (``--part open`` and ``--part plan``). Each is taken in a fresh process bound to one core.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa

from benchmarks.data_mixes import CAPACITY, EXPECTED, Lengths, greedy_packs
from megatron_bagel.data.index.format import (
    MANIFEST,
    PLANNING_SCHEMA,
    SCHEMA_VERSION,
    SHARD_FILES,
    DatasetInfo,
    Manifest,
    ShardInfo,
    SourceInfo,
    dataset_folder,
)
from megatron_bagel.data.index.plan import ROWS_PER_SHARD
from megatron_bagel.data.index.reader import IndexedSamples
from megatron_bagel.data.planner.group_source import GroupSource, open_sources
from megatron_bagel.data.planner.planner import Planner, PlannerConfig
from megatron_bagel.data.planner.sample_plan import PlanSettings
from megatron_bagel.data.sources.dataset_config import GroupConfig, parse_groups
from megatron_bagel.layout.pack import LayoutSpec

GROUP, NAME = "t2i_pretrain", "synthetic"
_DISTINCT = 16  # shards of different contents; the others are further names of these files, which costs no disk


def write_sidecar(folder: Path, samples: int) -> None:
    """An index of ``samples`` rows in shards of the usual size: a caption (log-normal, median 55 tokens) and a picture each."""
    place = dataset_folder(folder, GROUP, NAME)
    place.mkdir(parents=True)
    shards = []
    for number, first in enumerate(range(0, samples, ROWS_PER_SHARD)):
        stem, rows = place / f"{number:05d}", min(ROWS_PER_SHARD, samples - first)
        if number < _DISTINCT or rows < ROWS_PER_SHARD:
            _write_columns(Path(f"{stem}.arrow"), rows, number)
            for ending in ("bin", "idx", "crc"):  # planning opens neither
                Path(f"{stem}.{ending}").write_bytes(b"\0")
        else:
            for ending in SHARD_FILES:
                os.link(place / f"{number % _DISTINCT:05d}.{ending}", f"{stem}.{ending}")
        files = {ending: (Path(f"{stem}.{ending}").stat().st_size, "") for ending in SHARD_FILES}
        shards.append(ShardInfo(stem.name, rows, rows, rows, 0, {}, files, {"0": rows}))
    dataset = DatasetInfo(GROUP, NAME, [SourceInfo("synthetic.parquet", samples, samples)], shards, {})
    (folder / MANIFEST).write_text(Manifest(SCHEMA_VERSION, "", "", "", 1, [dataset]).to_json())


def _write_columns(path: Path, rows: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    tokens = np.exp(4 + generator.standard_normal(rows)).clip(2, 4000).astype(np.int32)
    one, none = (pa.array(np.arange(rows + 1, dtype=np.int32) * each) for each in (1, 0))
    sides = [generator.integers(256, 1025, rows).astype(np.int32) for _ in range(2)]
    values = [tokens, np.empty(0, np.int32), *sides]
    columns = [pa.ListArray.from_arrays(none if len(v) == 0 else one, pa.array(v, pa.int32())) for v in values]
    columns += [pa.array(np.zeros(rows, np.int32)), pa.array(np.arange(rows))]
    table = pa.RecordBatch.from_arrays([c.cast(f.type) for c, f in zip(columns, PLANNING_SCHEMA, strict=True)], schema=PLANNING_SCHEMA)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, PLANNING_SCHEMA) as writer:
        writer.write_batch(table)


def _groups() -> list[GroupConfig]:
    transform = {"image_stride": 16, "max_image_size": 1024, "min_image_size": 256}
    return parse_groups({GROUP: {"dataset_names": [NAME], "weight": 1, "image_transform_args": transform}}, "benchmark", ".", ".")


def _open(folder: Path) -> list[GroupSource]:
    settings = PlanSettings(seed=1, layout=LayoutSpec(0, 1, 2, 3))
    return open_sources(_groups(), IndexedSamples.open(folder), settings)


def _resident() -> float:
    """Megabytes of this process now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1e6


def _measured(work: Callable[[], dict[str, float]]) -> dict[str, float]:
    """``work``'s figures, with the megabytes that came on top of what this process (its imports) held before."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    before = _resident()
    figures = work()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    return {**figures, "resident_megabytes": peak, "of_them_imports": before, "beyond_imports": peak - before}


def opening(folder: Path) -> dict[str, float]:
    """Seconds until the index is open and its first row was looked at."""

    def work() -> dict[str, float]:
        began = time.perf_counter()
        sources = _open(folder)
        opened = time.perf_counter()
        sources[0].measure(np.arange(1), 0)
        return {"samples": len(sources[0]), "open_s": opened - began, "first_row_s": time.perf_counter() - began}

    return _measured(work)


def planning(folder: Path) -> dict[str, float]:
    """Seconds to the first pack, and to the packs of a whole epoch; a plan of a pack is dropped when the next one is made."""

    def work() -> dict[str, float]:
        began, used = time.perf_counter(), time.process_time()
        planner = Planner(_open(folder), PlannerConfig(CAPACITY, EXPECTED, CAPACITY, 50, seed=1, global_batch_size=64))
        planner.packs(0, 1)
        tokens, samples, step = 0, 0, 0
        first, size = time.perf_counter() - began, len(planner.stream.sources[0])
        while samples < size:
            packs = planner.batch(step)
            samples += sum(len(pack.samples) for pack in packs)
            tokens += sum(pack.tokens for pack in packs)
            step += 1
        return {
            "samples": samples, "packs": 64 * step, "first_pack_s": first, "total_s": time.perf_counter() - began,
            "total_cpu_s": time.process_time() - used, "fill": tokens / (64 * step * CAPACITY),
        }  # fmt: skip

    return _measured(work)


def plain_lines(path: Path) -> dict[str, float]:
    """The plain reader opens a list of rows by reading all of it, as the original does."""

    def work() -> dict[str, float]:
        began = time.perf_counter()
        with open(path, encoding="utf-8") as file:
            lines = file.readlines()
        json.loads(lines[0])
        return {"samples": len(lines), "open_s": time.perf_counter() - began}

    return _measured(work)


def plain_packing(samples: int) -> dict[str, float]:
    """The plain reader packs one sample after the other; lengths are given to it, where the real one decodes to know them."""

    def work() -> dict[str, float]:
        source, began = Lengths("images"), time.perf_counter()
        packs = max(1, samples // 14)
        greedy_packs(source, 0, 1, packs)
        seconds = time.perf_counter() - began
        return {"packs": packs, "total_s": seconds, "microseconds_per_sample": seconds / (14 * packs) * 1e6}

    return _measured(work)


def _in_fresh_process(work: Callable[..., dict[str, float]], *arguments: object) -> dict[str, float]:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()


def measure_opening(samples: int) -> dict[str, object]:
    """Ours at ``samples`` rows, the plain reader at a hundredth of them (it holds every row)."""
    with tempfile.TemporaryDirectory() as folder:
        write_sidecar(Path(folder) / "index", samples)
        turns = [{"from": "human", "value": "<image> what?"}, {"from": "gpt", "value": "a red circle"}]
        line = json.dumps({"image": "0000000.jpg", "conversations": turns})
        lines = Path(folder) / "lines.jsonl"
        with open(lines, "w", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for _ in range(max(1, samples // 100)))
        return {"index": _in_fresh_process(opening, Path(folder) / "index"), "plain": _in_fresh_process(plain_lines, lines)}


def measure_planning(samples: int) -> dict[str, object]:
    """Ours over a whole epoch of ``samples`` rows, the plain packing of a hundredth of them."""
    with tempfile.TemporaryDirectory() as folder:
        write_sidecar(Path(folder) / "index", samples)
        return {"planner": _in_fresh_process(planning, Path(folder) / "index"), "plain": _in_fresh_process(plain_packing, samples // 100)}
