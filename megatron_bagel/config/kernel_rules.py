# SPDX-License-Identifier: Apache-2.0
"""Whether this machine has what torch.compile needs to make kernels (``--fused_kernels compiled``, ``--vae_kernels compiled``)."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path

from megatron_bagel.config.arguments import TrainingArguments
from megatron_bagel.config.megatron_arguments import MegatronArguments


def check_compiled_kernels(megatron: MegatronArguments, training: TrainingArguments, has_gpu: bool) -> None:
    """Check that a run, unlike a plan, can compile the kernels that it asks for. Raises ValueError with what is missing."""
    for flag, value, other in (("fused_kernels", megatron.fused_kernels, "eager"), ("vae_kernels", training.vae_kernels, "channels_last")):
        missing = missing_for_compiling(has_gpu) if value == "compiled" else None
        if missing is not None:
            raise ValueError(f"--{flag} compiled needs {missing} on every node; or use --{flag} {other}")


def missing_for_compiling(has_gpu: bool) -> str | None:
    """Return what torch.compile lacks on this machine, or None. Both Triton and the kernels of a CPU are built by a compiler."""
    if has_gpu and find_spec("triton") is None:
        return "the package triton, which comes with torch for CUDA: install it"
    if has_gpu:
        variable, language, compilers = "CC", "C", ["gcc", "clang"]
    else:
        variable, language, compilers = "CXX", "C++", ["clang++" if sys.platform == "darwin" else "g++"]
    if chosen := shlex.split(os.environ.get(variable, "")):
        compilers = chosen[:1]
    if not any(shutil.which(compiler) for compiler in compilers):
        return f"a {language} compiler, and there is no {' or '.join(compilers)}: install one, or name it in the environment's {variable}"
    headers = Path(sysconfig.get_path("include"))
    if not (headers / "Python.h").is_file():
        return f"Python's headers, and there is no {headers / 'Python.h'}: install them (python3-dev)"
    return None
