# SPDX-License-Identifier: Apache-2.0
"""The shape of a model, apart from how it is trained: read from the JSON files of a Hugging Face folder, and written back to them.

Everything that builds modules, maps weights or counts FLOPs reads these classes, never the raw JSON. Other packages import them from here.
"""

from megatron_bagel.config.architecture.autoencoder import AutoencoderArch
from megatron_bagel.config.architecture.bagel import BagelArch
from megatron_bagel.config.architecture.config_sources import ConfigSources
from megatron_bagel.config.architecture.llm import LLMArch
from megatron_bagel.config.architecture.sparse import SparseArch
from megatron_bagel.config.architecture.vit import ViTArch

__all__ = ["AutoencoderArch", "BagelArch", "ConfigSources", "LLMArch", "SparseArch", "ViTArch"]
