# SPDX-License-Identifier: Apache-2.0
"""A plan answers for packages that this machine lacks, and a run that lacks them is refused at start-up with the flag and the fix."""

from __future__ import annotations

import importlib.machinery
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from megatron_bagel.cli import plan, train
from megatron_bagel.config.flag import choices_of
from megatron_bagel.config.package_rules import check_layer_packages, check_packages
from megatron_bagel.config.parser import Config
from megatron_bagel.config.sections import SECTION_OF, SECTIONS, SETTINGS
from megatron_bagel.config.validate import validate_settings
from tests.runs import make_world, run_config

OPTIONAL = (
    "transformer_engine", "flash_attn", "flash_attn.cute", "magi_attention", "nvidia_resiliency_ext", "triton", "apex", "wandb", "mlflow",
    "trackio",
)  # fmt: skip
RESILIENCY = r"needs the package nvidia-resiliency-ext, which is not installed: pip install 'megatron-bagel\[resiliency\]'"
#: The flags that ask for a package, and the refusal of a run without it.
ASKING: dict[str, tuple[dict[str, Any], str]] = {
    "grouped experts": (
        {"num_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 32, "moe_grouped_gemm": True},
        "--moe_grouped_gemm True needs the package transformer-engine, whose grouped products need a GPU; leave it out",
    ),
    "layers": ({"transformer_impl": "transformer_engine"}, "needs the package transformer-engine, which needs a GPU; use local"),
    "fp8": ({"transformer_impl": "transformer_engine", "fp8": "hybrid"}, "needs the package transformer-engine"),
    "attention": ({"attention_backend": "flex_flash"}, r"needs the package flash-attn-4 \(flash_attn.cute\); install it, or use flex"),
    "heartbeats": ({"ft_heartbeats": True}, f"--ft_heartbeats True {RESILIENCY}"),
    "local checkpoints": ({"local_checkpoint_dir": "/tmp/local", "save_local_every": 5}, f"--local_checkpoint_dir {RESILIENCY}"),
    "restarts": ({"inprocess_restarts": 1, "auto_resume": True}, f"--inprocess_restarts {RESILIENCY}"),
}
cases = pytest.mark.parametrize(("flags", "message"), ASKING.values(), ids=ASKING)


def hide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the packages absent for imports and for who asks whether they could be imported."""
    for name in OPTIONAL:
        monkeypatch.setitem(sys.modules, name, None)


def show(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in OPTIONAL:
        module = types.ModuleType(name)
        module.__spec__, module.__path__ = importlib.machinery.ModuleSpec(name, None, is_package=True), []
        monkeypatch.setitem(sys.modules, name, module)


def words(flags: dict[str, Any]) -> list[str]:
    return [word for name, value in flags.items() for word in (f"--{name}", str(value))]


@cases
def test_a_plan_answers_without_the_package(
    flags: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hide(monkeypatch)
    status = plan.main(["--model", "bagel-7b-mot", "--gpus", "8", *words(flags)])
    output = capsys.readouterr()
    assert (status, output.err) == (0, "") and "GiB" in output.out
    assert plan.main(["--model", "bagel-7b-mot", "--gpus", "8", "--print_config", *words(flags)]) == 0


@cases
def test_a_run_is_refused_where_it_is_absent(flags: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = Config.from_values(flags)
    hide(monkeypatch)
    with pytest.raises(ValueError, match=message):
        check_packages(config)
    show(monkeypatch)
    check_packages(config)


def test_the_command_refuses_before_ranks_meet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Also a restart in the process, which would import the package before anything else asks for it."""
    config = run_config(make_world(tmp_path), tmp_path / "run", inprocess_restarts=1, auto_resume=True)
    config.save(tmp_path / "run.yaml")
    hide(monkeypatch)
    assert train.main(["--config", str(tmp_path / "run.yaml")]) == 2
    assert "error: --inprocess_restarts needs the package nvidia-resiliency-ext" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["grouped experts", "layers"])
def test_a_dry_run_needs_what_layers_are_built_from(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    flags, message = ASKING[name]
    hide(monkeypatch)
    with pytest.raises(ValueError, match=message):
        check_layer_packages(Config.from_values(flags).megatron)


def every_flag() -> Iterator[dict[str, Any]]:
    """Each word that a flag can say, by itself and with the flags of each case above."""
    hints = {section: get_type_hints(arguments) for section, arguments in SECTIONS.items()}
    for name, setting in SETTINGS.items():
        hint = hints[SECTION_OF[name]][name]
        values: list[Any] = [True, False] if hint in (bool, bool | None) else list(choices_of(setting, hint))
        for value in values:
            for flags, _ in [({}, ""), *ASKING.values()]:
                yield {**flags, name: value}


def answer(flags: dict[str, Any]) -> str:
    """What the check of a plan says, or nothing."""
    try:
        validate_settings(Config.from_values(flags), 8, has_gpu=True)
    except ValueError as error:
        return str(error)
    return ""


def test_no_answer_of_a_plan_depends_on_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packages, compilers and GPUs come and go, and every refusal stays the same. So does every setting that is accepted."""

    def answers(prepare: Callable[[pytest.MonkeyPatch], None], gpu: bool) -> list[str]:
        with monkeypatch.context() as machine:
            prepare(machine)
            machine.setenv("PATH", str(tmp_path))
            machine.setattr("torch.cuda.is_available", lambda: gpu)
            machine.setattr("torch.cuda.get_device_capability", lambda *_: (12, 0))
            return [answer(flags) for flags in every_flag()]

    bare, equipped = answers(hide, gpu=False), answers(show, gpu=True)
    assert bare == equipped
    assert "" in bare and any(bare)
