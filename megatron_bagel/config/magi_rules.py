# SPDX-License-Identifier: Apache-2.0
"""The rules of ``--attention_backend magi``: what MagiAttention's kernel can run on, read from its source at version 1.1.1."""

from __future__ import annotations

from importlib.util import find_spec

from megatron_bagel.config.architecture import LLMArch
from megatron_bagel.config.megatron_arguments import MegatronArguments

#: Sizes of heads that its build compiles ahead, with the tiles of its own tests.
HEAD_DIMS = (64, 128)
#: Its own kernel is compiled for this compute capability alone. On other GPUs the package hands over to a fork of FlashAttention-4.
HOPPER = (9, 0)


def check_magi_settings(megatron: MegatronArguments, has_gpu: bool) -> None:
    """Check what the kernel needs besides a GPU that has it. Raises ValueError with the flag, the reason and what to do."""
    if megatron.attention_backend != "magi":
        return
    if not has_gpu:
        raise ValueError("--attention_backend magi needs a GPU: MagiAttention's kernel does not exist on CPU; use auto or sdpa")
    if megatron.bf16 is False:
        raise ValueError("--attention_backend magi needs --bf16: MagiAttention's kernel takes 16-bit queries and keys; or use flex")


def check_magi_sizes(megatron: MegatronArguments, llm: LLMArch) -> None:
    """Check that the kernel takes the model's heads. Raises ValueError with the sizes that it takes."""
    if megatron.attention_backend == "magi" and llm.head_dim not in HEAD_DIMS:
        raise ValueError(
            f"--attention_backend magi: the heads of this model have {llm.head_dim} channels, and MagiAttention's kernel is built for "
            "64 or 128; use flex"
        )


def check_magi_machine(megatron: MegatronArguments, capability: tuple[int, int] | None, device: str) -> None:
    """Check that a run, unlike a plan, has the GPU and the package. ``capability`` is None without a GPU, in a dry run."""
    if megatron.attention_backend != "magi" or capability is None:
        return
    if capability != HOPPER:
        raise ValueError(
            f"--attention_backend magi needs a Hopper GPU (compute capability 9.0); {device} has {capability[0]}.{capability[1]}. "
            "Use flex, or flex_flash on Blackwell"
        )
    if find_spec("magi_attention") is None:
        raise ValueError(
            "--attention_backend magi needs the package magi_attention, which is installed from its source "
            "(https://github.com/SandAI-org/MagiAttention); install it, or use flex"
        )
