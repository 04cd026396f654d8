# SPDX-License-Identifier: Apache-2.0
"""Compiled kernels are refused where they cannot be compiled, with what is missing; eager ones never are."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import pytest

from megatron_bagel.config.arguments import TrainingArguments
from megatron_bagel.config.kernel_rules import check_compiled_kernels
from megatron_bagel.config.megatron_arguments import MegatronArguments
from megatron_bagel.config.parser import Config
from megatron_bagel.config.validate import validate_settings
from tests.runs import make_world, resolved, run_config

COMPILED = MegatronArguments(fused_kernels="compiled")


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only folder with programs, still empty, on a machine with Python's headers and no choice of a compiler."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "Python.h").touch()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    for variable in ("CC", "CXX"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setattr("megatron_bagel.config.kernel_rules.find_spec", lambda name: object())
    return tmp_path / "bin"


def install(tools: Path, *programs: str) -> None:
    for program in programs:
        (tools / program).touch(mode=0o755)


@pytest.mark.parametrize(("has_gpu", "program"), [(False, "g++"), (True, "gcc"), (True, "clang")])
def test_accepted_with_a_compiler(tools: Path, has_gpu: bool, program: str) -> None:
    check_compiled_kernels(MegatronArguments(), TrainingArguments(), has_gpu)
    install(tools, program)
    check_compiled_kernels(COMPILED, TrainingArguments(), has_gpu)


def test_refused_without_one(tools: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ValueError, match=r"needs a C\+\+ compiler, and there is no g\+\+: .*CXX on every node; or use --fused_kernels eager"
    ):
        check_compiled_kernels(COMPILED, TrainingArguments(), has_gpu=False)
    with pytest.raises(ValueError, match=r"needs a C compiler, and there is no gcc or clang"):
        check_compiled_kernels(COMPILED, TrainingArguments(), has_gpu=True)
    install(tools, "g++", "gcc", "cache", "own")
    monkeypatch.setenv("CXX", "absent --fast")
    with pytest.raises(ValueError, match=r"no absent: install one, or name it in the environment's CXX"):
        check_compiled_kernels(COMPILED, TrainingArguments(), has_gpu=False)
    monkeypatch.setenv("CXX", "own -O2")
    check_compiled_kernels(COMPILED, TrainingArguments(), has_gpu=False)


def test_refused_without_triton_or_headers(tools: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tools, "g++", "gcc")
    (tools.parent / "Python.h").unlink()
    with pytest.raises(ValueError, match=r"Python's headers, and there is no .*Python.h"):
        check_compiled_kernels(COMPILED, TrainingArguments(), has_gpu=False)
    monkeypatch.setattr("megatron_bagel.config.kernel_rules.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"the package triton"):
        check_compiled_kernels(COMPILED, TrainingArguments(), has_gpu=True)


def test_the_autoencoders_kernels_are_refused_with_their_own_flag(tools: Path) -> None:
    training = TrainingArguments(vae_kernels="compiled")
    with pytest.raises(ValueError, match=r"--vae_kernels compiled needs a C\+\+ compiler.* use --vae_kernels channels_last"):
        check_compiled_kernels(MegatronArguments(), training, has_gpu=False)
    install(tools, "g++")
    check_compiled_kernels(MegatronArguments(), training, has_gpu=False)


def test_a_plan_for_gpus_needs_no_compiler_here(tools: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_bagel.config.kernel_rules.find_spec", lambda name: None)
    config = Config.from_values({"fused_kernels": "compiled", "vae_kernels": "compiled"})
    validate_settings(config, 1, has_gpu=True)
    with pytest.raises(ValueError, match=r"the package triton"):
        check_compiled_kernels(config.megatron, config.training, has_gpu=True)


def test_a_run_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = run_config(make_world(tmp_path), tmp_path / "run", vae_kernels="compiled")
    monkeypatch.setattr("megatron_bagel.config.kernel_rules.missing_for_compiling", lambda has_gpu: "a compiler")
    with pytest.raises(ValueError, match="--vae_kernels compiled needs a compiler"):
        resolved(config)


def test_a_dry_run_compiles_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = {"fused_kernels": "compiled", "vae_kernels": "compiled", "dry_run": True}
    config = run_config(make_world(tmp_path), tmp_path / "run", **flags)
    monkeypatch.setattr("megatron_bagel.config.kernel_rules.missing_for_compiling", lambda has_gpu: "a compiler")
    planned = resolved(config)
    assert planned.megatron.fused_kernels == planned.build.vae_kernels == "compiled"
