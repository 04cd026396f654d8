# SPDX-License-Identifier: Apache-2.0
"""Imports Megatron-Core in less than half the time, which every process of every command waits for."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from megatron_bagel.platform.device import has_gpu


@contextmanager
def lean_imports() -> Iterator[None]:
    """Import within this block without looking for garbage, and on CPUs without torch's compiler.

    Megatron-Core decorates small functions with ``torch.compile`` as it is imported, which imports the whole compiler. On CPUs they stay
    as they are: no kernel is compiled there. Megatron-Core's own switch, ``disable_jit_fuser``, can be called only after that import.
    """
    if "megatron.core" in sys.modules:
        yield
        return
    collects, compiler = gc.isenabled(), torch.compile
    gc.disable()
    if not has_gpu():
        torch.compile = _uncompiled  # type: ignore[assignment]
    try:
        yield
        gc.freeze()  # modules are no garbage: later collections need not look at them either
    finally:
        torch.compile = compiler
        if collects:
            gc.enable()


def _uncompiled(function: Callable[..., Any] | None = None, **_options: Any) -> Any:
    """Return the function as it is, as a decorator with options or without."""
    return function if function is not None else lambda decorated: decorated
