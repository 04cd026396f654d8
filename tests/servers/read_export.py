# SPDX-License-Identifier: Apache-2.0
"""Read an exported folder with whatever transformers is installed, and print what it read as JSON. It imports nothing else of ours.

python tests/servers/read_export.py FOLDER
"""

from __future__ import annotations

import json
import sys
from typing import Any

from PIL import Image
from transformers import (
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    Qwen2Config,
    SiglipImageProcessor,
    SiglipVisionConfig,
)


class ServedConfig(PretrainedConfig):
    """What a server registers for this model type."""

    model_type = "bagel"


def read(folder: str) -> dict[str, Any]:
    """Return what each reader found."""
    AutoConfig.register("bagel", ServedConfig)
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    processor = SiglipImageProcessor.from_pretrained(folder, local_files_only=True)
    pixels = processor(Image.new("RGB", (30, 50), (255, 0, 128)), return_tensors="np")["pixel_values"]
    llm, vit = Qwen2Config.from_json_file(f"{folder}/llm_config.json"), SiglipVisionConfig.from_json_file(f"{folder}/vit_config.json")
    return {
        "config": [config.architectures, config.max_latent_size, config.vae_config, config.llm_config["vocab_size"]],
        "tokens": tokenizer("a photo of a red circle<|im_end|>")["input_ids"],
        "end": GenerationConfig.from_pretrained(folder).eos_token_id,
        "pixels": [list(pixels.shape), *(round(float(pixels[0, channel].mean()), 4) for channel in range(3))],
        "llm": [llm.hidden_size, llm.num_hidden_layers, llm.num_key_value_heads, llm.vocab_size],
        "vit": [vit.image_size, vit.patch_size, vit.num_hidden_layers],
    }


if __name__ == "__main__":
    print(json.dumps(read(sys.argv[1])))
