# SPDX-License-Identifier: Apache-2.0
"""Compares one part with its counterpart: metrics by step and field, checkpoints and model folders by tensor, other folders by file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_bagel.checkpoint.dist.tensor_reader import CheckpointWeights
from megatron_bagel.checkpoint.dist.unpickle_guard import COMMON_OBJECT, read_common, read_contents, refuse_code
from megatron_bagel.checkpoint.hf.safetensors_io import SafetensorsReader
from megatron_bagel.common.wording import shorten
from megatron_bagel.config.architecture.weight_files import points_at_averages
from megatron_bagel.training.observability.metrics_file import read_history
from tools import compare_parts as parts
from tools.compare_bytes import compare_files, files_of
from tools.compare_tensors import compare_tensors
from tools.compare_values import Rule, Tally, leaves

#: Fields of metrics that are measured, not computed: two runs of one commit differ in them.
TIMINGS = ("step_time_s", "tokens_per_s", "tflops", "mfu", "work_tflops", "work_mfu", "peak_mem_bytes")
#: The field that names the run, which two runs of one commit do not share.
RUN = "run"
TIMING_PREFIXES = ("time/", "time_min/", "memory/", "seconds_")
#: What a checkpoint says of the run that wrote it: its flags, what identifies its data, and its identity.
ABOUT_THE_RUN = ("config", "fingerprint", "run_id")
#: The model card of a model folder. It states flags and losses of the run.
CARD = "README.md"
_INDEX_SUFFIX = ".safetensors.index.json"


def compare_part(name: str, left: Path, right: Path, rule: Rule) -> Tally:
    """Compare two parts of one kind.

    Raises:
        ValueError: They are of two kinds, or one of them is damaged; the text names the file.
    """
    kinds = parts.kind_of(left), parts.kind_of(right)
    if kinds[0] != kinds[1]:
        raise ValueError(f"{left} is a {kinds[0]} and {right} a {kinds[1]}: compare two things of one kind")
    compare, unit = _COMPARISONS[kinds[0] or parts.FILES]
    tally = Tally(name, unit)
    compare(left, right, tally, rule)
    return tally


def is_timing(field: str) -> bool:
    """Return whether a field of metrics is left out of a comparison."""
    return field == RUN or field in TIMINGS or field.startswith(TIMING_PREFIXES)


def compare_metrics(left: Path, right: Path, tally: Tally, rule: Rule) -> None:
    """Count every field of every step that both files hold, timings left out."""
    left_steps, right_steps = steps_of(left), steps_of(right)
    for side, steps, others in (("A", left_steps, right_steps), ("B", right_steps, left_steps)):
        tally.only[side] += [f"step {step}" for step in sorted(steps.keys() - others.keys())]
    for step in sorted(left_steps.keys() & right_steps.keys()):
        left_values, right_values = (
            {f"step {step}, {field}": value for field, value in steps[step].items()} for steps in (left_steps, right_steps)
        )
        tally.compare(left_values, right_values, rule)


def steps_of(path: Path) -> dict[int, dict[str, Any]]:
    """Return the records by step, without timings. Raises ValueError for a file without records, or with one step twice."""
    steps: dict[int, dict[str, Any]] = {}
    for record in read_history(path):
        if record["step"] in steps:
            raise ValueError(f"{path} holds step {record['step']} twice; is it two files in one?")
        steps[record["step"]] = {field: value for field, value in record.items() if not is_timing(field)}
    if not steps:
        raise ValueError(f"{path} holds no complete record, so there is nothing to compare")
    return steps


def compare_checkpoints(left: Path, right: Path, tally: Tally, rule: Rule) -> None:
    """Count every tensor, and every value of the state that is neither a version nor a flag.

    Raises:
        ValueError: A checkpoint is damaged, or stores objects that are no tensors: none that training writes does.
    """
    for path in (left, right):
        refuse_code(path)
        stored = read_contents(path).state_dict_metadata
        objects = [name for name, entry in stored.items() if not isinstance(entry, TensorStorageMetadata) and name != COMMON_OBJECT]
        if objects:
            raise ValueError(f"{path} stores objects that are no tensors and cannot be compared: {shorten(objects)}")
    left_source, right_source = CheckpointWeights(left), CheckpointWeights(right)
    compare_tensors(left_source, right_source, tally, rule)
    tally.compare(state_of(left_source), state_of(right_source), rule)


def state_of(checkpoint: CheckpointWeights) -> dict[str, Any]:
    """Return what a run continues with besides tensors: planner, schedule, counters, settings of the optimizer."""
    state = {name: value for name, value in checkpoint.state.items() if name not in ("versions", "world_size")}
    state["run"] = {name: value for name, value in state["run"].items() if name not in ABOUT_THE_RUN}
    state["common"] = read_common(checkpoint.folder)
    return {path: value.tolist() if isinstance(value, Tensor) else value for path, value in leaves(state)}


class WeightFile:
    """Offers the tensors of a weight file by the methods of ``CheckpointWeights``."""

    def __init__(self, path: Path, prefix: str = "") -> None:
        self._reader, self._prefix = SafetensorsReader(path, "none"), prefix

    def keys(self) -> list[str]:
        """Return the names with the prefix before them."""
        return [self._prefix + name for name in self._reader.keys()]  # noqa: SIM118

    def spec(self, key: str) -> tuple[tuple[int, ...], torch.dtype]:
        """Return shape and type of one tensor."""
        return self._reader.spec(key.removeprefix(self._prefix))

    def read(self, key: str) -> Tensor:
        """Read one tensor."""
        return self._reader.get(key.removeprefix(self._prefix))


def compare_weight_files(left: Path, right: Path, tally: Tally, rule: Rule) -> None:
    """Count every tensor; a sharded file is named by its index."""
    compare_tensors(WeightFile(left), WeightFile(right), tally, rule)


def compare_models(left: Path, right: Path, tally: Tally, rule: Rule) -> None:
    """Count every tensor of every weight file, however it is cut, and every other file but the model card, which lists flags."""
    left_files, right_files = weight_files(left), weight_files(right)
    tally.note_one_sided(left_files, right_files)
    for name in sorted(left_files.keys() & right_files.keys()):
        compare_tensors(WeightFile(left_files[name], f"{name}: "), WeightFile(right_files[name], f"{name}: "), tally, rule)
    left_others, right_others = (
        {name: path for name, path in files_of(folder).items() if ".safetensors" not in name and name != CARD} for folder in (left, right)
    )
    compare_files(left_others, right_others, tally)


def weight_files(folder: Path) -> dict[str, Path]:
    """Return the weight files by name ("ema", "model", "ae"). A file that is cut into parts is represented by its index.

    An index for servers names whole files, which are compared as themselves.
    """
    whole_files = {path.name for path in folder.glob("*.safetensors") if path.stem in ("ema", "model", "ae")}
    indexes = {
        path.name.removesuffix(_INDEX_SUFFIX): path
        for path in folder.glob(f"*{_INDEX_SUFFIX}")
        if not points_at_averages(path) and path.name.removesuffix(_INDEX_SUFFIX) + ".safetensors" not in whole_files
    }
    shards = {shard for path in indexes.values() for shard in json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()}
    single = {path.stem: path for path in folder.glob("*.safetensors") if path.name not in shards or path.name in whole_files}
    return {**single, **indexes}


def compare_folders(left: Path, right: Path, tally: Tally, rule: Rule) -> None:
    """Count every file."""
    del rule  # a file is not a number: nothing of it may differ
    compare_files(files_of(left), files_of(right), tally)


_COMPARISONS: dict[str, tuple[Callable[[Path, Path, Tally, Rule], None], str]] = {
    parts.METRICS: (compare_metrics, "values"),
    parts.CHECKPOINT: (compare_checkpoints, "tensors and state values"),
    parts.MODEL: (compare_models, "tensors and files"),
    parts.WEIGHTS: (compare_weight_files, "tensors"),
    parts.FILES: (compare_folders, "files"),
}
