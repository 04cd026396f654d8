# SPDX-License-Identifier: Apache-2.0
"""A message that names a flag names one that the command has which prints it, or says whose flag it is."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path

import pytest

from megatron_bagel.cli import evaluate
from megatron_bagel.config.plan_arguments import PlanArguments, PrintArguments
from megatron_bagel.config.sections import ALIASES, SECTIONS

PACKAGE = Path(__file__).resolve().parent.parent / "megatron_bagel"
#: What runs in training, or in a plan of one. Rooms are folders.
TRAINING = ("config", "costs", "data", "encoders", "layout", "model", "parallel", "planning", "platform", "training")
INFERENCE = ("inference", "assembly/opened_model.py")
#: Modules of these rooms that commands of data alone reach.
DATA_COMMANDS = (
    "data/inspect", "data/index/publish.py", "data/index/clean_copy.py", "encoders/latent_writer.py", "encoders/latent_ray.py",
    "platform/launch/ray_cluster.py",
)  # fmt: skip
#: Flags of Docker and of torchrun, and what is no setting.
FOREIGN = {"__ipc", "__shm_size", "__nproc_per_node", "__help", "__no_", "__config", "__x_y"}
#: What a build inside of training, whose options are defaults, never meets.
BUILDS = {"data/index/build.py": {"__rows_per_shard", "__job_index", "__num_jobs", "__overwrite", "__output", "__workers"},
          "data/index/plan.py": {"__check_images", "__max_image_pixels", "__exif"}, "data/index/latent_key.py": {"__dtype"}}  # fmt: skip


def training_flags() -> set[str]:
    names = {setting.name for section in (*SECTIONS.values(), PlanArguments, PrintArguments) for setting in fields(section)}
    return {f"__{name}" for name in (*names, *ALIASES)}


def inference_flags() -> set[str]:
    return {word.replace("-", "_") for word in evaluate.build_parser()._option_string_actions}  # they include those of generate


def modules(rooms: tuple[str, ...]) -> list[str]:
    paths = sorted(str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py"))
    return [path for path in paths if path.startswith(rooms) and not path.startswith(DATA_COMMANDS)]


def texts(source: str) -> Iterator[tuple[int, str]]:
    """Yield the texts of a module that a user may read, each whole: no docstrings, and f-strings with braces for their values."""
    tree = ast.parse(source)
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)}
    inside = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield node.lineno, "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings | inside:
            yield node.lineno, node.value


def strangers(source: str, known: set[str]) -> list[str]:
    """Return the flags that a module's texts name without their command and that are not ``known``."""
    found = []
    for line, text in texts(source):
        if "megatron-bagel " in text or " of {}" in text:  # it names the command
            continue
        named = {match.replace("-", "_") for match in re.findall(r"(?<![\w-])--[a-z][\w-]*", text)}
        found += [f"line {line}: {name}" for name in sorted(named - known)]
    return found


@pytest.mark.parametrize(("rooms", "flags"), [(TRAINING, training_flags), (INFERENCE, inference_flags)], ids=["training", "inference"])
def test_messages_name_flags_of_their_command(rooms: tuple[str, ...], flags: Callable[[], set[str]]) -> None:
    known = flags() | FOREIGN
    found = {path: strangers((PACKAGE / path).read_text(encoding="utf-8"), known | BUILDS.get(path, set())) for path in modules(rooms)}
    assert {path: lines for path, lines in found.items() if lines} == {}


def test_a_stranger_is_found() -> None:
    source = '"""Of --docs."""\nraise ValueError(f"row {1}: use fewer --workers" + "; --lr is fine, and --x of megatron-bagel data build")'
    assert strangers(source, {"__lr"}) == ["line 2: __workers"]
