"""From flags to what a step costs, for a run and for a plan."""

from __future__ import annotations

from megatron_bagel.config.architecture import BagelArch
from megatron_bagel.config.parser import Config
from megatron_bagel.config.resolve import resolve
from megatron_bagel.config.validate import validate_architecture, validate_settings
from megatron_bagel.costs.freezing import FreezeSettings
from megatron_bagel.costs.inputs import CostInputs


def cost_inputs(config: Config, arch: BagelArch, world_size: int, has_gpu: bool = True) -> CostInputs:
    """What a step of the run costs. Raises ValueError, with the flag and what would work, for settings that cannot."""
    validate_settings(config, world_size, has_gpu)
    validate_architecture(config, arch)
    sizes = resolve(config, world_size, has_gpu)
    return CostInputs(arch, config.megatron, sizes, config.data.max_num_tokens, freeze_settings(config))


def freeze_settings(config: Config) -> FreezeSettings:
    """What does not train."""
    training = config.training
    return FreezeSettings(llm=training.freeze_llm, vit=training.freeze_vit, und=training.freeze_und)
