# SPDX-License-Identifier: Apache-2.0
"""Jobs on many machines make the index that one job makes; a killed build loses and doubles nothing; a full disk is told."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import signal
import sys
import time
from multiprocessing import get_context
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_bagel.cli.data import build as build_command
from megatron_bagel.cli.data import merge as merge_command
from megatron_bagel.data.index.build import BuildOptions, build_index
from megatron_bagel.data.index.publish import build_folder, locked, merge_jobs
from megatron_bagel.data.index.reader import IndexedSamples
from megatron_bagel.data.index.verify import shard_problems
from tests.data.index_files import DATASETS, SIZES, files_of, groups_of, noise_png, write_lines, write_t2i


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """17 picture rows in 4 files and 40 lines of text, a few of them bad."""
    root = tmp_path_factory.mktemp("sources")
    for n in range(4):
        rows = [(noise_png(10 * n + i) if i != 2 else b"junk", '{"a": "red"}') for i in range(n + 3)]
        write_t2i(root / "t2i", rows, f"{n:04d}.parquet")
    write_lines(root / "text/plain.jsonl", [{"text": f"number {i}"} if i % 7 else "{broken" for i in range(40)])
    config = {name: {"dataset_names": [DATASETS[name]], "weight": 1, "image_transform_args": SIZES} for name in ("t2i_pretrain", "text")}
    (root / "data.yaml").write_text(yaml.safe_dump(config))
    return root


@pytest.fixture(scope="module")
def whole(sources: Path, goldens: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The index of one uninterrupted job."""
    index = tmp_path_factory.mktemp("whole") / "index"
    build_index(groups_of(sources, "t2i_pretrain", "text"), goldens / "hf", index, BuildOptions(rows_per_shard=4, progress=False))
    return index


def command(sources: Path, goldens: Path, output: Path) -> list[str]:
    return [
        "--dataset_config_file", str(sources / "data.yaml"), "--data_root", str(sources), "--tokenizer", str(goldens / "hf"),
        "--output", str(output), "--rows-per-shard", "4",
    ]  # fmt: skip


@settings(max_examples=4, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(jobs=st.integers(2, 15), data=st.data())
def test_any_number_of_jobs_in_any_order_gives_the_same_bytes(jobs: int, data: st.DataObject, sources, goldens, whole, tmp_path) -> None:
    output = tmp_path / "index"
    shutil.rmtree(output, ignore_errors=True)
    groups = groups_of(sources, "t2i_pretrain", "text")
    for job in data.draw(st.permutations(range(jobs))):
        options = BuildOptions(rows_per_shard=4, progress=False, num_jobs=jobs, job_index=job)
        assert build_index(groups, goldens / "hf", output, options) is None
    merge_jobs(output, [build_folder(output, job, jobs) for job in range(jobs)])
    assert files_of(output) == files_of(whole)
    assert [path.name for path in tmp_path.iterdir()] == ["index"]


def test_the_commands_name_what_is_missing_and_merge_the_rest(sources, goldens, whole, tmp_path, capsys) -> None:
    arguments = command(sources, goldens, tmp_path / "index")
    merge = ["--output", str(tmp_path / "index")]
    assert merge_command.main(merge) == 2 and "nothing to merge" in capsys.readouterr().err
    assert build_command.main([*arguments, "--num-jobs", "3", "--job-index", "3"]) == 2 and "--job-index" in capsys.readouterr().err
    for job in ("0", "2"):
        assert build_command.main([*arguments, "--num-jobs", "3", "--job-index", job]) == 0
        assert "when all are: megatron-bagel data merge --output" in capsys.readouterr().out
    assert merge_command.main(merge) == 2
    assert "shards are not finished, the first one t2i_pretrain/t2i/00001" in capsys.readouterr().err
    other = [*arguments, "--max-image-pixels", "1000000", "--num-jobs", "3", "--job-index", "1"]
    assert build_command.main(other) == 0 and merge_command.main(merge) == 2
    assert "other sources, settings or another tokenizer" in capsys.readouterr().err
    assert build_command.main([*arguments, "--num-jobs", "3", "--job-index", "1"]) == 0
    assert merge_command.main(merge) == 0
    assert "skipped 6: not JSON" in capsys.readouterr().out
    assert files_of(tmp_path / "index") == files_of(whole)


def test_a_second_build_of_the_same_index_waits_outside(sources, goldens, tmp_path) -> None:
    output = tmp_path / "index"
    with locked(build_folder(output)), pytest.raises(ValueError, match="another process is building"):
        build_index(groups_of(sources, "text"), goldens / "hf", output, BuildOptions(progress=False))


def killed_build(arguments: list[str], seconds: float) -> None:
    """Start a build and kill it -9, with all its workers, after ``seconds``."""

    def build() -> None:
        os.setsid()
        build_command.main([*arguments, "--workers", "2"])

    process = get_context("fork").Process(target=build)
    process.start()
    time.sleep(seconds)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.join()


def check_after_kills(sources: Path, goldens: Path, whole: Path, output: Path, moments: list[float]) -> None:
    arguments = command(sources, goldens, output)
    for moment in moments:
        killed_build(arguments, moment)
        if output.exists():  # whole, or not there
            assert files_of(output) == files_of(whole)
            shutil.rmtree(output)
    assert build_command.main(arguments) == 0
    assert files_of(output) == files_of(whole)
    assert [path.name for path in output.parent.iterdir()] == ["index"]


@pytest.mark.distributed
def test_a_build_killed_at_any_moment_is_whole_or_not_there(sources, goldens, whole, tmp_path) -> None:
    check_after_kills(sources, goldens, whole, tmp_path / "index", [0.1, 0.2, 0.3, 0.5])


@pytest.mark.slow
@pytest.mark.distributed
def test_twenty_kills(sources, goldens, whole, tmp_path) -> None:
    check_after_kills(sources, goldens, whole, tmp_path / "index", [0.03 * n for n in range(1, 21)])


def test_kills_between_the_renames_of_publishing(sources, goldens, whole, tmp_path, monkeypatch) -> None:
    """Publishing over an old index takes several renames and removals; a stop before any of them is made good by the same command."""
    output, arguments = tmp_path / "index", command(sources, goldens, tmp_path / "index")
    for stop in range(1, 8):
        shutil.rmtree(output, ignore_errors=True)
        build_index(groups_of(sources, "text"), goldens / "hf", output, BuildOptions(progress=False))
        steps = []

        def counted(action, steps=steps, stop=stop):
            def act(*args, **kwargs):
                steps.append(action)
                if len(steps) == stop:
                    raise KeyboardInterrupt
                return action(*args, **kwargs)

            return act

        with monkeypatch.context() as patch:
            patch.setattr("megatron_bagel.data.index.publish.shutil.rmtree", counted(shutil.rmtree))
            patch.setattr(Path, "rename", counted(Path.rename))
            try:
                build_command.main([*arguments, "--overwrite"])
            except KeyboardInterrupt:
                assert not output.exists() or files_of(output) == files_of(whole) or len(IndexedSamples.open(output).datasets) == 1
        assert build_command.main([*arguments, "--overwrite"]) == 0
        assert files_of(output) == files_of(whole)
        assert [path.name for path in tmp_path.iterdir()] == ["index"]


def build_on_small_disk(arguments: list[str], disk: Path, kept: Path) -> None:
    """In a forked process: mount 52 KB at ``disk``, for this process alone, build there, and copy what is left to ``kept``."""
    libc = ctypes.CDLL(None, use_errno=True)
    user, group = os.getuid(), os.getgid()
    if libc.unshare(0x10020000):  # CLONE_NEWUSER | CLONE_NEWNS
        sys.exit(77)
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"0 {user} 1")
    Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    if libc.mount(b"none", str(disk).encode(), b"tmpfs", 0, b"size=52k"):
        sys.exit(77)
    with open(kept.with_suffix(".log"), "w") as log, contextlib.redirect_stderr(log):
        status = build_command.main(arguments)
    shutil.copytree(disk, kept)
    sys.exit(status)


def test_a_full_disk_is_told_and_the_build_goes_on_later(sources, goldens, whole, tmp_path) -> None:
    """On a real file system of 52 KB, in a name space of its own."""
    small, kept = tmp_path / "small", tmp_path / "kept"
    small.mkdir()
    arguments = (command(sources, goldens, small / "index"), small, kept)
    process = get_context("fork").Process(target=build_on_small_disk, args=arguments)
    process.start()
    process.join()
    if process.exitcode == 77:
        pytest.skip("this system does not let a user mount a file system")
    told = kept.with_suffix(".log").read_text()
    assert process.exitcode == 2 and "No space left on device" in told and "finished shards are kept" in told
    assert not (kept / "index").exists() and list(kept.glob("index.building/state/*/*/*.json"))
    (kept / "index.building").rename(tmp_path / "index.building")
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "index.building/index").glob("t2i_pretrain/t2i/00000.*")}
    assert build_command.main(command(sources, goldens, tmp_path / "index")) == 0
    assert files_of(tmp_path / "index") == files_of(whole)
    assert written == {tmp_path / "index.building/index" / path.relative_to(tmp_path / "index"): path.stat().st_mtime_ns
                       for path in (tmp_path / "index").glob("t2i_pretrain/t2i/00000.*")}  # fmt: skip


def test_a_verified_index_has_no_problem_and_a_damaged_one_names_the_row(whole: Path, sources: Path, tmp_path: Path) -> None:
    index = tmp_path / "index"
    shutil.copytree(whole, index)
    opened = IndexedSamples.open(index)

    def problems(decode: bool = True) -> list[str]:
        manifest = opened.manifest
        return [p for d in manifest.datasets for s in d.shards for p in shard_problems(index, manifest, d, s, decode)]

    assert problems() == []
    reader = opened.datasets["t2i_pretrain/t2i"]
    damaged, picture = index / "t2i_pretrain/t2i/00000.bin", reader.image_bytes(1, 0)
    data = bytearray(damaged.read_bytes())
    data[data.index(picture) + 60] ^= 0xFF
    damaged.write_bytes(data)
    found = problems()
    assert len(found) == 2 and "00000.bin does not have the checksum" in found[0]
    assert f"sample 1 ({sources}/t2i/0000.parquet, row 1): image 0" in found[1]
    assert len(problems(decode=False)) == 1
    damaged.write_bytes(data[:-1])
    assert any("should have" in problem for problem in problems())
    (index / "manifest.json").write_text(json.dumps({}))
    with pytest.raises(ValueError, match="not a manifest"):
        IndexedSamples.open(index)
