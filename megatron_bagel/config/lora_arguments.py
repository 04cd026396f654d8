# SPDX-License-Identifier: Apache-2.0
"""Flags of fine-tuning by adapters (LoRA)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_bagel.config.flag import FREE, MUST_MATCH, SAID, flag


@dataclass
class LoraArguments:
    """Flags of adapters. ``lora_rank`` turns them on; the weights that the run starts from then stay as they are."""

    lora_rank: int | None = flag(
        None, "Train adapters of this rank instead of the weights themselves. Default: no adapters.", minimum=1, on_resume=MUST_MATCH
    )
    lora_alpha: float | None = flag(
        None, "Adapters are scaled by lora_alpha / lora_rank. Default: lora_rank, a scale of 1.", above=0, on_resume=MUST_MATCH
    )
    lora_rslora: bool = flag(
        False, "Scale by lora_alpha / sqrt(lora_rank) instead, which keeps updates of large ranks as large.", on_resume=MUST_MATCH
    )
    lora_dropout: float = flag(
        0.0, "Share of an adapter's inputs that are dropped in training. Draws are keyed by token.", minimum=0, below=1, on_resume=SAID
    )
    lora_experts: Literal["und", "gen", "both"] = flag("both", "Experts whose linears get adapters.", on_resume=MUST_MATCH)
    lora_targets: list[str] = flag(
        ["qkv", "proj", "fc1", "fc2"],
        "Linears that get adapters: qkv, proj, fc1, fc2 of the decoder, and connector, vit, vae2llm, llm2vae.",
        on_resume=MUST_MATCH,
    )
    lora_full: list[str] = flag(
        [], "Parts that train in full beside the adapters: und or gen, connector, vae2llm, llm2vae, time_embedder, embedding, "
        "output_layer. Checkpoints then hold them too.", on_resume=MUST_MATCH,
    )  # fmt: skip
    lora_base: str | None = flag(
        None,
        "Folder, or model on a hub, of the weights that adapters belong to, if it has moved since the adapter's checkpoint was written.",
        on_resume=FREE,
    )
