# SPDX-License-Identifier: Apache-2.0
"""Which models can replay their passes as CUDA graphs."""

from __future__ import annotations

from megatron.core import parallel_state

from megatron_bagel.inference.core.engine import Engine

#: Passes before a capture, in which kernels are chosen and memory is reserved.
WARM_UP = 2


def launched_because(engine: Engine) -> str | None:
    """Return why the host must launch every operation of ``engine``'s passes, or None if a GPU can replay them as a graph.

    Inference builds local layers only (``assembly/whole_modules.py``), so Transformer Engine's modules are no case here.
    """
    if engine.device.type != "cuda":
        return "only a GPU replays graphs"
    if engine.arch.llm.sparse is not None:
        return "the tokens of each sparse expert are counted on the host, and a graph has fixed shapes"
    if parallel_state.get_tensor_model_parallel_world_size() > 1:
        return "passes of tensor-parallel ranks communicate, and graphs with collectives were never tried"
    return None
