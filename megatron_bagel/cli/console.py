# SPDX-License-Identifier: Apache-2.0
"""A quiet console: filters for known warnings of other packages on which a user cannot act, each by its message.

This module is imported before torch and Megatron-Core, whose imports print the first of them. Any other warning is shown.
"""

from __future__ import annotations

import warnings

#: (beginning of the message as a regular expression, category).
_KNOWN = (
    (r"The pynvml package is deprecated", FutureWarning),  # torch, if nvidia-resiliency-ext installed the old package
    (r"Transformer Engine and Apex are not installed", UserWarning),  # Megatron-Core, once per module; absent_speedups() says it once
    (r"Apex is not installed\. Falling back to Torch Norm", UserWarning),
    (r"full scope is deprecated\. Use empty cuda_graph_scope", UserWarning),  # Megatron-Core 0.16 about its own default
    (r"`torch\.distributed\.(all_gather_into_tensor|reduce_scatter_tensor)` is deprecated", FutureWarning),  # no other name before 2.13
    # Megatron-Core's optimizer reads .grad of its fp32 shards, which are views. It wants None, and gets it.
    (r"The \.grad attribute of a Tensor that is not a leaf Tensor is being accessed", UserWarning),
    # Converters and generation read and write checkpoints in one process, as the warning assumes.
    (r"torch\.distributed is disabled, unavailable or uninitialized, assuming the intent is to (save|load)", UserWarning),
)


def quiet() -> None:
    """Filter the known warnings in this process and in those that it forks."""
    for message, category in _KNOWN:
        warnings.filterwarnings("ignore", message=message, category=category)


def absent_speedups() -> str | None:
    """Return a line for the start-up log with the optional packages that would speed up a GPU run, or None if all are installed."""
    from importlib.util import find_spec

    packages = {"transformer_engine": "transformer-engine", "apex": "apex"}
    absent_packages = [package for module, package in packages.items() if find_spec(module) is None]
    return f"optional speed-ups for GPUs not installed: {', '.join(absent_packages)}" if absent_packages else None
