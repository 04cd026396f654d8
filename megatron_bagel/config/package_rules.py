# SPDX-License-Identifier: Apache-2.0
"""Whether this machine has the optional packages that flags ask for. A run needs them at start-up; a plan for other machines never does.

``kernel_rules.py``, ``magi_rules.py`` and ``offload_rules.py`` have the same kind of check for their own flags.
"""

from __future__ import annotations

from importlib.util import find_spec

from megatron_bagel.config.megatron_arguments import MegatronArguments
from megatron_bagel.config.parser import Config


def check_packages(config: Config) -> None:
    """Check that a run, unlike a plan, finds the packages that its flags ask for. Raises ValueError with the flag and what to do.

    Nothing is imported here. An in-process restart imports its package before the ranks meet, so this check comes earlier still.
    """
    check_layer_packages(config.megatron)
    if config.megatron.attention_backend == "flex_flash" and not _has_flash_attention_4():
        raise ValueError("--attention_backend flex_flash needs the package flash-attn-4 (flash_attn.cute); install it, or use flex")
    resilience = config.resilience
    if resilience.ft_heartbeats:
        _need_resiliency_package("--ft_heartbeats True", "and start with its ft_launcher in place of torchrun")
    if resilience.local_checkpoint_dir is not None:
        _need_resiliency_package("--local_checkpoint_dir", "on every node")
    if resilience.inprocess_restarts:
        _need_resiliency_package("--inprocess_restarts", "on every node")


def check_layer_packages(megatron: MegatronArguments) -> None:
    """Check that the package is there from which layers are built, which a dry run does too. Raises ValueError without it."""
    if find_spec("transformer_engine") is not None:
        return
    if megatron.moe_grouped_gemm:
        raise ValueError(
            "--moe_grouped_gemm True needs the package transformer-engine, whose grouped products need a GPU; leave it out, and "
            "experts are computed one after the other"
        )
    if megatron.transformer_impl == "transformer_engine":
        raise ValueError("--transformer_impl transformer_engine needs the package transformer-engine, which needs a GPU; use local")


def _has_flash_attention_4() -> bool:
    return find_spec("flash_attn") is not None and find_spec("flash_attn.cute") is not None


def _need_resiliency_package(flag: str, advice: str) -> None:
    if find_spec("nvidia_resiliency_ext") is None:
        raise ValueError(
            f"{flag} needs the package nvidia-resiliency-ext, which is not installed: pip install 'megatron-bagel[resiliency]' (Linux, "
            f"Python 3.10 to 3.12) {advice}; or leave the flag out"
        )
