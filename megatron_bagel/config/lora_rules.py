# SPDX-License-Identifier: Apache-2.0
"""Rules between the flags of adapters and the others."""

from __future__ import annotations

from megatron_bagel.config.lora import EXPERTS, LAYER_TARGETS, OTHER_TARGETS, LoraSettings, lora_settings
from megatron_bagel.config.parser import Config


def check_lora(config: Config) -> None:
    """Check that flags of adapters agree with each other and with what is frozen. Raises ValueError for the first that does not."""
    lora = lora_settings(config.lora)
    if lora is None:
        given = sorted(name for name in config.given if name.startswith("lora_"))
        if given:
            raise ValueError(f"--{given[0]} needs --lora_rank: without it the weights themselves train, and there are no adapters")
        return
    _check_freezing(config, lora)
    if config.model.grow_vocabulary and "embedding" not in lora.full:
        raise ValueError(
            "--grow_vocabulary True gives new tokens random rows, which adapters leave as they are. Let them train: add --lora_full "
            "embedding output_layer"
        )
    _check_full(lora)
    if config.megatron.fp8 is not None:
        raise ValueError(
            f"--lora_rank with --fp8 {config.megatron.fp8}: the factors of adapters have no FP8 products, and the two were never tried "
            "together. Leave one of them out"
        )
    plain = [target for target in lora.targets if target in OTHER_TARGETS]
    if lora.dropout and plain:
        raise ValueError(
            f"--lora_dropout {lora.dropout} with --lora_targets {' '.join(plain)}: its draws are keyed by the tokens of a pack, which only "
            "the decoder's layers know. Set --lora_dropout 0, or leave these targets out"
        )


def _check_freezing(config: Config, lora: LoraSettings) -> None:
    training, layers = config.training, [target for target in lora.targets if target in LAYER_TARGETS]
    experts = EXPERTS[lora.experts]
    if training.freeze_vit and "vit" in lora.targets:
        raise ValueError("--freeze_vit True keeps the vision tower as it is, but --lora_targets vit adapts it; drop one of them")
    if training.freeze_llm and layers:
        raise ValueError(
            f"--freeze_llm True keeps the decoder as it is, but --lora_targets {' '.join(layers)} adapt it; drop --freeze_llm: adapters "
            "freeze the weights that they belong to by themselves"
        )
    if training.freeze_und and layers and "und" in experts:
        raise ValueError(
            f"--freeze_und True lets no gradient reach the understanding expert, so its adapters (--lora_experts {lora.experts}) would "
            "never train; take --lora_experts gen, or drop --freeze_und"
        )
    tower = [target for target in ("connector", "vit") if target in lora.targets]
    if training.freeze_und and tower:
        raise ValueError(
            f"--freeze_und True lets no gradient reach the vision tower, so --lora_targets {' '.join(tower)} would never train"
        )
    frozen_parts = {"und": training.freeze_und or training.freeze_llm, "gen": training.freeze_llm, "connector": training.freeze_und}
    contradicted = [part for part in lora.full if frozen_parts.get(part)]
    if contradicted:
        raise ValueError(f"--lora_full {' '.join(contradicted)} trains what a freeze flag keeps as it is; drop one of them")


def _check_full(lora: LoraSettings) -> None:
    """Check that nothing has adapters and trains in full too."""
    layers = any(target in LAYER_TARGETS for target in lora.targets)
    twice = [part for part in lora.full if part in lora.targets or (layers and part in EXPERTS[lora.experts])]
    if twice:
        raise ValueError(
            f"--lora_full {' '.join(twice)}: this part has adapters too (--lora_experts {lora.experts}, --lora_targets "
            f"{' '.join(lora.targets)}); it either trains in full or by adapters"
        )
