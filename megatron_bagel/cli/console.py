"""A quiet console: known warnings of other packages that say nothing a user can act on are filtered, each by its message.

Imported before torch and Megatron-Core, whose imports print the first of them. A warning that is not in this list is shown.
"""

from __future__ import annotations

import warnings

#: (beginning of the message as a regular expression, category, what it is about).
_KNOWN = (
    (r"The pynvml package is deprecated", FutureWarning),  # torch, where nvidia-resiliency-ext brought the old name along
    (r"Transformer Engine and Apex are not installed", UserWarning),  # Megatron-Core, one per module; absent_speedups() says it once
    (r"Apex is not installed\. Falling back to Torch Norm", UserWarning),
    (r"full scope is deprecated\. Use empty cuda_graph_scope", UserWarning),  # Megatron-Core 0.16 about its own default
    (r"`torch\.distributed\.(all_gather_into_tensor|reduce_scatter_tensor)` is deprecated", FutureWarning),  # no other name before 2.13
    # Megatron-Core's optimizer reads .grad of its fp32 shards, which are views. It wants None, and gets it.
    (r"The \.grad attribute of a Tensor that is not a leaf Tensor is being accessed", UserWarning),
    # Converters and generation read and write checkpoints in one process, which is what the warning assumes.
    (r"torch\.distributed is disabled, unavailable or uninitialized, assuming the intent is to (save|load)", UserWarning),
)


def quiet() -> None:
    """Filter the known warnings in this process. Processes that it forks inherit the filters."""
    for message, category in _KNOWN:
        warnings.filterwarnings("ignore", message=message, category=category)


def absent_speedups() -> str | None:
    """Return one sentence that names the optional packages which would make a GPU run faster, or None when all are installed."""
    from importlib.util import find_spec

    names = {"transformer_engine": "transformer-engine", "apex": "apex"}
    absent = [name for module, name in names.items() if find_spec(module) is None]
    return f"optional speed-ups for GPUs not installed: {', '.join(absent)}" if absent else None
