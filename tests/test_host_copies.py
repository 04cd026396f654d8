# SPDX-License-Identifier: Apache-2.0
"""What the host has made reaches the device through ``to_device`` wherever a training step goes: another copy makes the host wait."""

from __future__ import annotations

import ast
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent / "megatron_bagel"
#: The files of a step.
STEP = (
    *PACKAGE.glob("model/**/*.py"), *PACKAGE.glob("layout/*.py"), *PACKAGE.glob("parallel/*.py"), *PACKAGE.glob("encoders/*.py"),
    *PACKAGE.glob("training/*.py"), *PACKAGE.glob("training/optim/*.py"),
    *(PACKAGE / f"training/{name}.py" for name in ("observability/loss_table", "resilience/stop_agreement", "resilience/bad_steps")),
    *(PACKAGE / f"platform/{name}.py" for name in ("multi_tensor", "side_stream", "cuda_on_cpu/fused_adam")),
)  # fmt: skip
#: Calls that wait, and why they may: "file: function".
ALLOWED = {
    "model/sparse_mlp.py: most_rows": "sparse layers wait for their routing anyway",
    "model/rope.py: _frequencies": "made once",
    "training/optim/optimizer.py: build_optimizer": "before the first step",
}
_MAKERS = {"from_numpy", "tensor", "as_tensor", "arange", "linspace"}


def _waits(call: ast.Call) -> bool:
    """Whether a call copies a value of the host: ``torch.tensor(..., device=...)``, or ``.to(device)`` of what was just made there."""
    function = call.func
    if not isinstance(function, ast.Attribute):
        return False
    if function.attr in {"tensor", "as_tensor"}:
        return any(keyword.arg == "device" for keyword in call.keywords)
    if function.attr not in {"to", "cuda"}:
        return False
    targets = [*call.args, *(keyword.value for keyword in call.keywords)]
    to_a_device = function.attr == "cuda" or any("device" in ast.unparse(target) for target in targets)
    makers = {node.func.attr for node in ast.walk(function.value) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)}
    return to_a_device and bool(makers & _MAKERS or isinstance(function.value, ast.BinOp))


def waiting_functions(source: str) -> list[str]:
    """The functions with such a call."""
    tree = ast.parse(source)
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    calls = [(node.lineno, node) for node in ast.walk(tree) if isinstance(node, ast.Call) and _waits(node)]
    found = []
    for line, _ in calls:
        around = [function for function in functions if function.lineno <= line <= (function.end_lineno or line)]
        found.append(max(around, key=lambda function: function.lineno).name if around else "<module>")
    return found


def test_copies_go_through_to_device() -> None:
    found = {f"{path.relative_to(PACKAGE)}: {name}" for path in STEP for name in waiting_functions(path.read_text())}
    assert found - set(ALLOWED) == set()
    assert set(ALLOWED) - found == set(), "no longer there"


def test_such_calls_are_found() -> None:
    waiting = ["torch.tensor([1], device=x.device)", "torch.from_numpy(a).to(device)", "torch.from_numpy(a).long().to(x.device)",
               "(1.0 / torch.arange(3)).to(device)", "torch.as_tensor(a, device='cuda')", "torch.from_numpy(a).cuda()"]  # fmt: skip
    queued = ["to_device(torch.from_numpy(a), device)", "torch.full((), 2.0, device=x.device)", "x.to(torch.bfloat16)", "torch.tensor([1])"]
    assert all(waiting_functions(f"def f():\n    return {call}") == ["f"] for call in waiting)
    assert not any(waiting_functions(f"def f():\n    return {call}") for call in queued)
