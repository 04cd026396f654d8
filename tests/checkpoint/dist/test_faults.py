# SPDX-License-Identifier: Apache-2.0
"""What disks and people do to checkpoints, on real files: a run never loads a torn one, and says what is wrong with which file."""

from __future__ import annotations

import json
import logging
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from megatron_bagel.checkpoint.dist import checksums, step_folders
from megatron_bagel.checkpoint.dist.load import load_checkpoint
from megatron_bagel.checkpoint.dist.saver import Saver, SaveSettings
from megatron_bagel.checkpoint.dist.tensor_reader import CheckpointWeights
from megatron_bagel.checkpoint.dist.unpickle_guard import refuse_code
from megatron_bagel.cli.convert import hf_to_megatron, inspect_checkpoint, megatron_to_hf
from tests.checkpoint.tiny_run import tiny_run, train_and_save, train_step
from tests.distributed import fork, run_ranks


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real checkpoint of two ranks."""
    folder = tmp_path_factory.mktemp("saved")
    run_ranks(train_and_save, 2, folder, {}, 2, 0, parallel={})
    return folder / "0000002"


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    shutil.copytree(saved, tmp_path / saved.name)
    return tmp_path / saved.name


#: Kills beyond those asked for, if none of them fell into a save: how much of the time that is depends on the machine.
MORE_KILLS = 20


def _save_until_killed(directory: Path, background: bool) -> None:
    def work() -> None:
        trained = tiny_run()
        saver = Saver(directory, SaveSettings(background, keep_last=3))
        for step in range(1, 10_000):
            train_step(trained, step)
            saver.save(step, trained, {"seen": step})

    os.setsid()
    run_ranks(work, 1, parallel={}, timeout=600)


@pytest.mark.parametrize(
    ("background", "kills"),
    [
        pytest.param(False, 2, id="waiting"),
        pytest.param(True, 3, id="background"),
        pytest.param(True, 30, id="background-30", marks=pytest.mark.slow),
        pytest.param(False, 30, id="waiting-30", marks=pytest.mark.slow),
    ],
)
@pytest.mark.timeout(900)
def test_a_kill_at_any_moment_leaves_the_step_before(
    tmp_path: Path, background: bool, kills: int, caplog: pytest.LogCaptureFixture
) -> None:
    moments, torn = random.Random(kills), 0
    for number in range(kills + MORE_KILLS):
        if number >= kills and torn:
            break
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        process = fork(_save_until_killed, tmp_path / "run", background)
        deadline = time.monotonic() + 120
        while step_folders.latest_checkpoint(tmp_path / "run") is None and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(moments.uniform(0.0, 1.0))
        os.killpg(process.pid, signal.SIGKILL)
        process.join()
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            found = step_folders.latest_checkpoint(tmp_path / "run")
        assert found is not None
        left = list((tmp_path / "run").glob(".saving-*"))
        torn += len(left)
        assert all(f"ignoring {folder}: a save that did not finish" in caplog.text for folder in left)
        assert checksums.damaged(found) == []
        checkpoint = CheckpointWeights(found)
        assert checkpoint.state["run"] == {"seen": checkpoint.step}
        for key in checkpoint.keys()[::20]:  # noqa: SIM118
            checkpoint.read(key)
    assert torn, "no kill fell into a save"


def _cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def _flip(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 4]))


def test_any_damage_to_any_file_is_found_by_name(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = [path.name for path in saved.iterdir()]
    assert len(names) >= 6 and checksums.damaged(saved) == []
    for harm in (Path.unlink, _cut, _flip):
        for name in names:
            if name == checksums.CHECKSUM_FILE and harm is Path.unlink:
                continue  # an older checkpoint has none: read unchecked, with a warning
            copy = tmp_path / saved.name
            shutil.copytree(saved, copy)
            harm(copy / name)
            # Cut or gone is seen before anything is read; a flipped bit by the checksums, in the shares of all ranks together.
            at_once = step_folders.latest_checkpoint(tmp_path) is None
            later = [line for part in range(3) for line in checksums.damaged(copy, part, 3)]
            assert (at_once or harm is _flip) and later, f"{harm} of {name}"
            assert name == checksums.CHECKSUM_FILE or any(name in line for line in later)
            assert inspect_checkpoint.main(["verify", str(copy)]) == 1, f"{harm} of {name}"
            assert capsys.readouterr().err.startswith("megatron-bagel convert inspect: ")
            shutil.rmtree(copy)
    assert inspect_checkpoint.main(["verify", str(saved)]) == 0


def _mounted(folder: Path, size: str) -> bool:
    folder.mkdir()
    return subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True).returncode == 0


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for one checkpoint of the tiny run and a half."""
    folder = tmp_path / "disk"
    if os.getuid() or shutil.which("mount") is None or not _mounted(folder, "3m"):
        pytest.skip("this user may not mount a small file system; the limit on file sizes is tried instead")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def _two_saves(directory: Path, background: bool, between: Callable[[], None]) -> str:
    """The error of the second save, after `between`."""
    trained = tiny_run()
    train_step(trained, 0)
    saver = Saver(directory, SaveSettings(background))
    saver.save(1, trained, {})
    saver.finish()
    between()
    try:
        saver.save(2, trained, {})
        saver.finish()
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("background", [False, True], ids=["waiting", "background"])
def test_a_full_disk_stops_the_run_and_the_step_before_is_whole(small_disk: Path, background: bool) -> None:
    [message] = run_ranks(_two_saves, 1, small_disk, background, int, parallel={})
    assert "could not be written" in message and " MB free" in message
    assert f"continues from {small_disk / '0000001'}" in message
    assert step_folders.latest_checkpoint(small_disk) == small_disk / "0000001"
    assert checksums.damaged(small_disk / "0000001") == []


def _limit_files() -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))


@pytest.mark.parametrize("background", [False, True], ids=["waiting", "background"])
def test_a_write_that_fails_in_the_middle_leaves_the_step_before(tmp_path: Path, background: bool) -> None:
    [message] = run_ranks(_two_saves, 1, tmp_path, background, _limit_files, parallel={})
    # Not every release of torch passes the system's reason on.
    assert "could not be written" in message and f"continues from {tmp_path / '0000001'}" in message
    assert checksums.damaged(step_folders.latest_checkpoint(tmp_path)) == []


def test_a_target_that_cannot_be_written_is_named_on_all_ranks(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    messages = run_ranks(_refused_target, 2, tmp_path / "file" / "checkpoints", parallel={})
    assert all("cannot write a checkpoint into" in message and "Not a directory" in message for message in messages)


def _refused_target(directory: Path) -> str:
    try:
        Saver(directory).save(1, tiny_run(), {})
    except ValueError as error:
        return str(error)
    return ""


def test_a_read_only_target_is_named(small_disk: Path, saved: Path, goldens: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By a run, and by the commands of both directions."""
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    [message] = run_ranks(_refused_target, 1, small_disk / "run", parallel={})
    assert "Read-only file system" in message and str(small_disk) in message
    for command in (
        lambda out: megatron_to_hf.main(["--checkpoint", str(saved), "--output", out]),
        lambda out: hf_to_megatron.main(["--model", str(goldens / "hf"), "--output", out]),
    ):
        assert command(str(small_disk / "converted")) == 2
        assert (
            f"--output {small_disk / 'converted'} cannot be written (Read-only file system, found in {small_disk})"
            in capsys.readouterr().err
        )


class _Attack:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


def _load(folder: Path) -> str:
    try:
        load_checkpoint(folder, tiny_run())
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("where", [".metadata", "common.pt"])
def test_nothing_in_a_foreign_checkpoint_runs(copy: Path, tmp_path: Path, where: str) -> None:
    (copy / checksums.CHECKSUM_FILE).unlink()
    attack = _Attack(tmp_path / "ran")
    if where == ".metadata":
        (copy / where).write_bytes(pickle.dumps(attack))
    else:
        torch.save({"x": attack}, copy / where)
    [message] = run_ranks(_load, 1, copy, parallel={})
    assert "not loaded" in message and where in message and "mkdir" in message
    assert not (tmp_path / "ran").exists()
    with pytest.raises(ValueError, match="not loaded"):
        refuse_code(copy)
    if where == ".metadata":
        assert megatron_to_hf.main(["--checkpoint", str(copy), "--output", str(tmp_path / "out")]) == 2
        assert not (tmp_path / "ran").exists()


def test_nothing_in_a_stored_object_runs(copy: Path, tmp_path: Path) -> None:
    """Objects beside tensors are pickles too: one replaced by another of its length."""
    from megatron_bagel.checkpoint.dist import unpickle_guard

    contents = unpickle_guard.read_contents(copy)
    index, place = next(iter(contents.storage_data.items()))
    contents.state_dict_metadata[index.fqn] = torch.distributed.checkpoint.metadata.BytesStorageMetadata()
    (copy / ".metadata").write_bytes(pickle.dumps(contents))
    with (copy / place.relative_path).open("r+b") as file:
        file.seek(place.offset)
        file.write(pickle.dumps(_Attack(tmp_path / "ran"), protocol=2))
    with pytest.raises(ValueError, match="does not load as data"):
        refuse_code(copy)
    assert not (tmp_path / "ran").exists()


def test_pickled_weights_of_a_model_folder_are_never_opened(goldens: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Neither where safetensors are missing, nor under their name."""
    folder, attack = tmp_path / "hf", _Attack(tmp_path / "ran")
    shutil.copytree(goldens / "hf", folder)
    command = ["--model", str(folder), "--output", str(tmp_path / "checkpoint")]
    for name, message in (("pytorch_model.bin", "has no ema.safetensors"), ("ema.safetensors", "is a PyTorch pickle")):
        (folder / "ema.safetensors").unlink(missing_ok=True)
        torch.save({"language_model.lm_head.weight": attack}, folder / name)
        assert hf_to_megatron.main(command) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "ran").exists() and not (tmp_path / "checkpoint").exists()


def test_a_checkpoint_of_a_newer_version_is_refused(copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = json.loads((copy / step_folders.STATE_FILE).read_text())
    (copy / step_folders.STATE_FILE).write_text(json.dumps({**state, "format_version": step_folders.FORMAT_VERSION + 1}))
    expected = (
        f"has checkpoint format {step_folders.FORMAT_VERSION + 1}, this version of megatron_bagel reads up to {step_folders.FORMAT_VERSION}"
    )
    [message] = run_ranks(_load, 1, copy, parallel={})
    assert expected in message and "update megatron_bagel" in message
    assert megatron_to_hf.main(["--checkpoint", str(copy), "--output", str(tmp_path / "out")]) == 2
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("num_hidden_layers", 3, "tensors that this model does not have: language_model.model.layers.3."),
        ("num_hidden_layers", 5, "lacks 28 tensors this model needs: language_model.model.layers.4."),
        ("layer_module", "Qwen2DecoderLayer", "does not have"),
    ],
)
def test_weights_of_another_model_than_the_folder_says_are_refused(
    goldens: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], setting: str, value: int | str, message: str
) -> None:
    folder = tmp_path / "hf"
    shutil.copytree(goldens / "hf", folder, ignore=shutil.ignore_patterns("config.json"))
    llm = json.loads((folder / "llm_config.json").read_text())
    (folder / "llm_config.json").write_text(json.dumps({**llm, setting: value}))
    assert hf_to_megatron.main(["--model", str(folder), "--output", str(tmp_path / "out"), "--max-latent-size", "16"]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_folders_of_another_kind_are_refused_in_a_sentence(
    copy: Path, goldens: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    to_hf = megatron_to_hf.main
    assert to_hf(["--checkpoint", str(goldens / "hf"), "--output", str(tmp_path / "out")]) == 2
    assert "lacks bagel_state.json" in capsys.readouterr().err
    (copy / step_folders.STATE_FILE).unlink()  # a torch_dist checkpoint of another program
    assert to_hf(["--checkpoint", str(copy), "--output", str(tmp_path / "out")]) == 2
    assert "lacks bagel_state.json" in capsys.readouterr().err
    plain = tmp_path / "qwen"
    plain.mkdir()
    (plain / "config.json").write_text('{"model_type": "qwen2"}')
    assert hf_to_megatron.main(["--model", str(plain), "--output", str(tmp_path / "x")]) == 2
    assert "llm_config.json" in capsys.readouterr().err
