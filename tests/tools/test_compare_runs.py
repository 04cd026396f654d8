# SPDX-License-Identifier: Apache-2.0
"""compare_runs sees every kind of difference, says where it is, and calls equal only what is equal."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import shutil
import subprocess
import sys
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from benchmarks.step_record import step_record
from megatron_bagel.checkpoint.dist.unpickle_guard import read_common, read_contents
from megatron_bagel.costs.flops import StepWork
from megatron_bagel.training.observability.metrics import WindowRates
from megatron_bagel.training.observability.timers import PHASES
from tests.checkpoint.tiny_run import train_and_save
from tests.distributed import run_ranks
from tools import compare_runs, compare_tensors
from tools.checkpoint_convert import hf_to_megatron, megatron_to_hf
from tools.compare_files import WeightFile, is_timing
from tools.compare_values import Rule, Tally

HEAD = "language_model.lm_head.weight"


@pytest.fixture
def compare(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Runs the command; returns its exit status and everything it printed."""

    def run(a: Path, b: Path, *flags: str) -> tuple[int, str]:
        capsys.readouterr()
        status = compare_runs.main([str(a), str(b), *flags])
        output = capsys.readouterr()
        return status, output.out + output.err

    return run


def record(step: int, **values: Any) -> dict[str, Any]:
    return {"step": step, "loss": 2.0 + step, "grad_norm": 0.3, "consumed_samples": 1000000 + step, "step_time_s": 0.5} | values


def write_metrics(path: Path, records: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def two_metrics(folder: Path, **changed: Any) -> tuple[Path, Path]:
    """Two files of five steps; ``changed`` values are those of step 3 in the second."""
    left = write_metrics(folder / "a.jsonl", [record(step) for step in range(5)])
    return left, write_metrics(folder / "b.jsonl", [record(step, **(changed if step == 3 else {})) for step in range(5)])


def test_what_is_measured_is_left_out_and_said(tmp_path: Path, compare: Callable) -> None:
    status, text = compare(*two_metrics(tmp_path, step_time_s=9.0, **{"time/encode": 1.0, "memory/peak_bytes": 3}), "--bitwise")
    assert status == 0, text
    assert "20 values are equal to the last bit" in text and "Left out: what is measured (step_time_s," in text


def test_timings_are_the_measured_fields_and_no_others() -> None:
    observed = {f"{extreme}/{phase}" for extreme in ("time", "time_min") for phase in PHASES} | {"memory/resident_bytes"}
    measured = {field.name for field in dataclasses.fields(WindowRates)} | {"peak_mem_bytes"} | observed
    assert all(is_timing(name) for name in measured)
    logged = step_record(StepWork(tokens=300)).values().keys()
    computed = (logged - measured) | {"imbalance/cost", "task_tokens/text", "ce/text"}
    assert {"loss", "lr", "consumed_tokens"} <= computed and not [name for name in computed if is_timing(name)]


@pytest.mark.parametrize(
    ("changed", "flags", "expected"),
    [
        ({"grad_norm": 0.30000000000000004}, ["--bitwise"], "step 3, grad_norm: 0.3 and 0.30000000000000004"),
        ({"grad_norm": 0.30001}, [], "step 3, grad_norm: 0.3 and 0.30001, 3.33e-05 relative"),
        ({"grad_norm": 0.30001}, ["--tolerance", "1e-4"], None),
        ({"grad_norm": 0.3000001}, [], None),
        ({"consumed_samples": 1000004}, [], "step 3, consumed_samples: 1000003 and 1000004"),
        ({"loss": None}, [], "step 3, loss: 5.0 and None"),
        ({"loss": 5}, ["--bitwise"], "step 3, loss: 5.0 and 5"),
        ({"loss": 5}, [], None),
        ({"loss": -0.0, "grad_norm": 0.0}, ["--bitwise"], "2 of 20 values differ, first step 3, loss: 5.0 and -0.0"),
        ({"ce/new": 1.0}, [], "only in B: step 3, ce/new"),
    ],
)
def test_metrics(tmp_path: Path, compare: Callable, changed: Mapping[str, Any], flags: list[str], expected: str | None) -> None:
    status, text = compare(*two_metrics(tmp_path, **changed), *flags)
    assert status == (0 if expected is None else 1), text
    assert expected is None or expected in text


def test_the_sign_of_a_zero_is_a_bit(tmp_path: Path, compare: Callable) -> None:
    files = [write_metrics(tmp_path / f"{value}.jsonl", [record(0, loss=value)]) for value in (0.0, -0.0)]
    assert compare(*files, "--bitwise")[0] == 1 and compare(*files)[0] == 0


def test_the_first_and_the_largest_difference_of_metrics(tmp_path: Path, compare: Callable) -> None:
    left = write_metrics(tmp_path / "a.jsonl", [record(step) for step in range(5)])
    right = write_metrics(tmp_path / "b.jsonl", [record(step, grad_norm=0.3 + 0.1 * (step >= 2) + step) for step in range(1, 6)])
    status, text = compare(left, right)
    assert status == 1
    assert "first step 1, grad_norm: 0.3 and 1.3" in text and "at step 4, grad_norm" in text
    assert "only in A: step 0; only in B: step 5" in text


def weights(path: Path, **changed: torch.Tensor) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = {"layers.9.w": torch.arange(24.0).reshape(4, 6), "layers.10.w": torch.ones(5, dtype=torch.bfloat16), "n": torch.tensor(7)}
    save_file({**whole, **changed}, path)
    return path


def changed_matrix(row: int, column: int, value: float) -> torch.Tensor:
    matrix = torch.arange(24.0).reshape(4, 6)
    matrix[row, column] = value
    return matrix


@pytest.mark.parametrize("chunk", [5, 1 << 22])
@pytest.mark.parametrize(
    ("changed", "flags", "expected"),
    [
        ({}, ["--bitwise"], None),
        (
            {"layers.9.w": changed_matrix(3, 4, 22.5)}, [],
            "layers.9.w: element [3, 4] is 22.0 and 22.5; 1 of 24 elements differ, by 0.5 at most (0.0217 relative)",
        ),
        ({"layers.9.w": changed_matrix(3, 4, 22.00001)}, [], None),
        ({"layers.9.w": changed_matrix(3, 4, 22.00001)}, ["--bitwise"], "element [3, 4] is 22.0 and 22.000009536743164"),
        ({"layers.9.w": changed_matrix(0, 0, -0.0)}, ["--bitwise"], "element [0, 0] is 0.0 and -0.0; 1 of 24 elements differ, by 0 at"),
        ({"layers.9.w": changed_matrix(0, 0, -0.0)}, [], None),
        ({"layers.9.w": changed_matrix(2, 0, float("nan"))}, [], "element [2, 0] is 12.0 and nan; 1 of 24 elements differ, by inf"),
        ({"layers.9.w": changed_matrix(2, 0, float("inf"))}, [], "element [2, 0] is 12.0 and inf"),
        ({"layers.10.w": torch.ones(5)}, [], "layers.10.w: [5] bfloat16 and [5] float32"),
        ({"layers.10.w": torch.ones(1, 5, dtype=torch.bfloat16)}, [], "layers.10.w: [5] bfloat16 and [1, 5] bfloat16"),
        ({"n": torch.tensor(8)}, ["--tolerance", "0.9"], "n: element [] is 7 and 8"),
        ({"extra": torch.ones(1)}, [], "only in B: extra"),
        (
            {"layers.9.w": torch.zeros(4, 6), "layers.10.w": torch.zeros(5, dtype=torch.bfloat16)}, [],
            "2 of 3 tensors differ, first layers.9.w: element [0, 1]",
        ),
    ],
)  # fmt: skip
def test_tensors(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    compare: Callable,
    chunk: int,
    changed: Mapping[str, torch.Tensor],
    flags: list[str],
    expected: str | None,
) -> None:
    monkeypatch.setattr(compare_tensors, "CHUNK", chunk)
    status, text = compare(weights(tmp_path / "a.safetensors"), weights(tmp_path / "b.safetensors", **changed), *flags)
    assert status == (0 if expected is None else 1), text
    assert expected is None or expected in text, text


def test_nan_on_both_sides_is_equal(tmp_path: Path, compare: Callable) -> None:
    """Alone, and beside an element that differs by less than the tolerance."""
    ends = (1.0, 1.0, 1.0000001)
    files = [weights(tmp_path / f"{n}.safetensors", x=torch.tensor([float("nan"), float("-inf"), end])) for n, end in enumerate(ends)]
    assert compare(files[0], files[1], "--bitwise")[0] == 0 and compare(files[0], files[1])[0] == 0
    assert compare(files[0], files[2])[0] == 0 and compare(files[0], files[2], "--bitwise")[0] == 1


def test_key_biases_of_the_vision_tower_count_only_as_bits(tmp_path: Path, compare: Callable) -> None:
    """The decoder's key biases always count: a norm and rotary positions stand between them and softmax."""
    tower, decoder = "vit_model.vision_model.encoder.layers.0.self_attn.k_proj.bias", "language_model.model.layers.0.self_attn.k_proj.bias"
    for name, flags, expected in ((tower, [], 0), (tower, ["--bitwise"], 1), (decoder, [], 1)):
        files = [weights(tmp_path / f"{number}.safetensors", **{name: torch.full((3,), float(number))}) for number in range(2)]
        status, text = compare(*files, *flags)
        assert status == expected, text
        assert ("key biases of the vision tower" in text) == (not flags)


class WatchedFile(WeightFile):
    """Counts the tensors that somebody still holds."""

    alive: weakref.WeakSet[torch.Tensor]
    most = 0

    def read(self, key: str) -> torch.Tensor:
        tensor = super().read(key)
        self.alive.add(tensor)
        type(self).most = max(self.most, len(self.alive))
        return tensor


def test_one_pair_of_tensors_is_held_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {f"w{number}": torch.full((3,), float(number)) for number in range(9)}
    files = [weights(tmp_path / f"{name}.safetensors", **tensors) for name in "ab"]
    monkeypatch.setattr(WatchedFile, "alive", weakref.WeakSet(), raising=False)
    tally = Tally("", "tensors")
    compare_tensors.compare_tensors(WatchedFile(files[0]), WatchedFile(files[1]), tally, Rule())
    assert tally.compared == 12 and WatchedFile.most == 2


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder: metrics, the checkpoint after two steps, its export in fp32, and pictures."""
    folder = tmp_path_factory.mktemp("trained")
    run_ranks(train_and_save, 1, folder / "checkpoints", {}, 2, 0, parallel={})
    export = ["--checkpoint", str(folder / "checkpoints"), "--output", str(folder / "export"), "--dtype", "fp32"]
    assert megatron_to_hf.main(export) == 0
    write_metrics(folder / "metrics.jsonl", [record(step) for step in range(2)])
    (folder / "samples").mkdir()
    (folder / "samples/sheet.png").write_bytes(b"picture")
    return folder


@pytest.fixture
def copied(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "copied"))


@pytest.fixture
def light(trained: Path, tmp_path: Path) -> tuple[Path, Path]:
    """Two copies without the checkpoint, whose hundreds of tensors take the longest."""
    leave_out = shutil.ignore_patterns("checkpoints")
    return tuple(Path(shutil.copytree(trained, tmp_path / name, ignore=leave_out)) for name in ("first", "second"))


def change_weight(model: Path, name: str = HEAD) -> None:
    """Another value of the last element of one weight."""
    tensors = load_file(model / "ema.safetensors")
    tensors[name].view(-1)[-1] += 1.0
    save_file(tensors, model / "ema.safetensors")


def replace_text(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text and len(old) == len(new)  # sizes of a checkpoint's files are checked
    path.write_text(text.replace(old, new))


def test_equal_runs(trained: Path, copied: Path, compare: Callable) -> None:
    """Moved, and with flags of its own."""
    status, text = compare(trained, copied, "--bitwise")
    assert status == 0, text
    for part in ("checkpoints/0000002", "export", "metrics.jsonl", "samples"):
        assert f"\n{part}: " in f"\n{text}"
    assert text.rstrip().endswith("are equal to the last bit")


def test_the_state_of_a_checkpoint_is_compared(trained: Path, copied: Path, compare: Callable) -> None:
    replace_text(copied / "checkpoints/0000002/bagel_state.json", '"ratio": 0.1', '"ratio": 0.2')
    status, text = compare(trained, copied)
    assert status == 1 and "checkpoints/0000002: 1 of " in text and "first run.ratio: 0.1 and 0.2" in text
    assert "are different: checkpoints/0000002\n" in text


def test_settings_of_the_optimizer_are_compared(trained: Path, copied: Path, compare: Callable) -> None:
    common = copied / "checkpoints/0000002/common.pt"  # newer versions of Megatron-Core read this file too, and before their own object
    content = read_common(common.parent)
    content["optimizer"]["optimizer"]["param_groups"][0]["lr"] *= 2
    torch.save(content, common)
    (copied / "checkpoints/0000002/checksums.json").unlink()  # as an earlier version wrote it
    status, text = compare(trained / "checkpoints/0000002", copied / "checkpoints/0000002")
    assert status == 1 and "param_groups[0].lr: 0.01 and 0.02, 0.5 relative" in text, text


def test_objects_in_a_checkpoint_are_refused(trained: Path, copied: Path, compare: Callable) -> None:
    contents = copied / "checkpoints/0000002/.metadata"
    metadata = read_contents(contents.parent)
    metadata.state_dict_metadata["note"] = BytesStorageMetadata()
    contents.write_bytes(pickle.dumps(metadata))
    (contents.parent / "checksums.json").unlink()
    status, text = compare(trained, copied)
    assert status == 2 and "0000002 stores objects that are no tensors and cannot be compared: note" in text, text


def test_versions_ranks_and_flags_are_not_compared(trained: Path, copied: Path, compare: Callable) -> None:
    state = copied / "checkpoints/0000002/bagel_state.json"
    content = json.loads(state.read_text())
    content["run"]["config"] = {"training": {"results_dir": "elsewhere"}}
    content["world_size"], content["versions"]["torch"] = 8, "another"
    state.write_text(json.dumps(content))
    (state.parent / "checksums.json").unlink()
    assert compare(trained, copied, "--bitwise")[0] == 0


def test_a_weight_of_a_model_folder_and_of_a_checkpoint(light: tuple[Path, Path], tmp_path: Path, compare: Callable) -> None:
    change_weight(light[1] / "export")
    status, text = compare(*light)
    assert status == 1 and "first ema: language_model.lm_head.weight: element [39, 31] is " in text
    assert "1 of 1280 elements differ, by 1 at most" in text and "different: export\n" in text
    checkpoints = []
    for number, run in enumerate(light):
        output = tmp_path / str(number)
        assert hf_to_megatron.main(["--model", str(run / "export"), "--output", str(output)]) == 0
        checkpoints.append(output / "0000000")
    status, text = compare(*checkpoints)
    assert status == 1 and ": 1 of " in text and "first output_layer.weight: element [39, 31] is " in text


def test_a_model_folder_cut_into_parts_is_the_same_model(trained: Path, tmp_path: Path, compare: Callable) -> None:
    command = ["--checkpoint", str(trained / "checkpoints"), "--dtype", "fp32", "--output", str(tmp_path / "cut")]
    assert megatron_to_hf.main([*command, "--shard-size", "20KB"]) == 0
    assert len(list((tmp_path / "cut").glob("*.safetensors"))) > 2
    assert compare(trained / "export", tmp_path / "cut", "--bitwise")[0] == 0


def test_other_files_of_a_model_folder_are_compared(trained: Path, copied: Path, compare: Callable) -> None:
    replace_text(copied / "export/llm_config.json", "qwen2", "qwen9")
    (copied / "export/vocab.json").write_text("{}")
    status, text = compare(trained / "export", copied / "export")
    assert status == 1 and "first llm_config.json: bytes differ from offset" in text and "only in B: vocab.json" in text


def test_pictures_are_compared(light: tuple[Path, Path], compare: Callable) -> None:
    (light[1] / "samples/sheet.png").write_bytes(b"pictury")
    status, text = compare(*light)
    assert status == 1 and "samples: 1 of 1 files differ, first sheet.png: bytes differ from offset 6 on" in text


def test_parts_on_one_side_are_a_difference(light: tuple[Path, Path], compare: Callable) -> None:
    shutil.rmtree(light[1] / "export")
    write_metrics(light[1] / "validation.jsonl", [record(2)])
    (light[0] / "validation.jsonl").touch()  # a run without evaluations leaves an empty file
    status, text = compare(*light)
    assert status == 1 and "only in A: export; only in B: validation.jsonl" in text


def make_recording(folder: Path, world: str, binary: bytes = b"tokens", root: str = "/here") -> Path:
    write_metrics(folder / "one/metrics.jsonl", [record(0)])
    (folder / "recording.json").write_text(json.dumps({"world": world}))
    if world == "world":
        index = folder / "world/index"
        index.mkdir(parents=True)
        (index / "00000.bin").write_bytes(binary)
        manifest = {"build_key": root, "sources": [{"path": f"{root}/a.parquet", "rows": len(binary)}]}
        (index / "manifest.json").write_text(json.dumps(manifest))
        (index / "skipped.jsonl").write_text(json.dumps({"file": f"{root}/b.png", "reason": "torn"}) + "\n")
    return folder


def test_recordings(tmp_path: Path, compare: Callable) -> None:
    before = make_recording(tmp_path / "before", "world")
    moved = make_recording(tmp_path / "moved", "world", root="/there")
    continued = make_recording(tmp_path / "continued", "../before/world")
    for after in (moved, continued):
        status, text = compare(before, after, "--bitwise")
        assert status == 0 and "world/index: 3 files are equal" in text, text
    status, text = compare(before, make_recording(tmp_path / "other", "world", binary=b"tikens"))
    assert status == 1 and "world/index: 1 of 3 files differ, first 00000.bin: bytes differ from offset 1 on" in text
    status, text = compare(before, make_recording(tmp_path / "longer", "world", binary=b"longer index"))
    assert status == 1 and "2 of 3 files differ, first 00000.bin: 6 and 12 bytes" in text


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda run: shutil.rmtree(run), "second does not exist"),
        (lambda run: [shutil.rmtree(run), run.mkdir()], "second holds nothing to compare: no metrics.jsonl"),
        (lambda run: (run / "metrics.jsonl").write_text("torn\n{}\n"), "metrics.jsonl, line 1 is not valid JSON"),
        (lambda run: (run / "metrics.jsonl").write_text('{"step": 1'), "metrics.jsonl holds no complete record"),
        (lambda run: write_metrics(run / "metrics.jsonl", [record(1), record(1)]), "metrics.jsonl holds step 1 twice"),
        (lambda run: os.truncate(run / "export/ema.safetensors", 4000), "ema.safetensors is not a complete safetensors file"),
        (lambda run: (run / "recording.json").write_text("{}"), "recording.json does not say where the data is"),
        (lambda run: (run / "recording.json").write_text('{"world": "gone"}'), "second/gone, which does not exist"),
    ],
)
def test_bad_input_is_a_sentence_that_names_the_file(light: tuple[Path, Path], compare: Callable, damage: Callable, expected: str) -> None:
    damage(light[1])
    status, text = compare(*light)
    assert status == 2 and expected in text, text


@pytest.mark.parametrize("lost", [".metadata", "bagel_state.json", "common.pt"])
def test_a_checkpoint_that_is_not_whole_is_bad_input(trained: Path, copied: Path, compare: Callable, lost: str) -> None:
    if lost == "common.pt" and not (copied / "checkpoints/0000002" / lost).exists():
        pytest.skip("this version of Megatron-Core stores the common part among the tensors")
    (copied / "checkpoints/0000002" / lost).unlink()
    status, text = compare(trained, copied)
    assert status == 2 and "checkpoints/0000002" in text and lost in text, text


def test_things_of_two_kinds_are_not_compared(trained: Path, compare: Callable) -> None:
    status, text = compare(trained / "export", trained / "checkpoints/0000002")
    assert status == 2 and "export is a model folder and " in text and "0000002 a training checkpoint: compare two things" in text
    status, text = compare(trained, trained / "metrics.jsonl")
    assert status == 2 and "is a folder of several parts and " in text
    assert compare(trained / "export/config.json", trained / "export/config.json")[0] == 2


@pytest.mark.parametrize("flags", [["--bitwise", "--tolerance", "1e-3"], ["--tolerance", "2"], ["--tolerance", "nan"]])
def test_flags_that_cannot_be(trained: Path, flags: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        compare_runs.main([str(trained), str(trained), *flags])
    assert ended.value.code == 2


def test_it_runs_as_a_script_from_anywhere(light: tuple[Path, Path]) -> None:
    command = [sys.executable, compare_runs.__file__, str(light[0]), str(light[1])]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd="/")
    assert done.returncode == 0 and "are equal within 1e-05 relative" in done.stdout, done.stderr
