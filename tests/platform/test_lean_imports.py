# SPDX-License-Identifier: Apache-2.0
"""A start imports no compiler on CPUs, and leaves garbage collection and torch.compile as they were."""

from __future__ import annotations

import subprocess
import sys

from megatron_bagel.platform import has_gpu

_START = """
import gc, sys, torch
compiler = torch.compile
from megatron_bagel import platform
platform.install()
import megatron_bagel.checkpoint.convert
assert gc.isenabled() and gc.get_freeze_count() > 10_000 and torch.compile is compiler
from megatron.core.fusions.fused_bias_swiglu import swiglu
x = torch.arange(8.0).view(2, 4) - 4
assert torch.equal(swiglu(x), torch.nn.functional.silu(x[:, :2]) * x[:, 2:])
print("compiler" if "torch._inductor" in sys.modules else "lean")
"""


def test_a_start_imports_no_compiler_on_cpus() -> None:
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", _START], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == ("compiler" if has_gpu() else "lean")


def test_collection_that_was_off_stays_off() -> None:
    code = "import gc; gc.disable()\nfrom megatron_bagel import platform; platform.install(); platform.install()\nassert not gc.isenabled()"
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)
