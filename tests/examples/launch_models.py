# SPDX-License-Identifier: Apache-2.0
"""Folders that look like the real models to everything that runs before weights are read: their true sizes, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_QWEN: dict[str, Any] = {
    "model_type": "qwen2", "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 1e6, "max_position_embeddings": 32768,
}  # fmt: skip
QWEN_0_5B = _QWEN | {
    "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2,
    "vocab_size": 151936, "tie_word_embeddings": True,
}  # fmt: skip
QWEN_7B = _QWEN | {
    "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
    "vocab_size": 152064, "tie_word_embeddings": False,
}  # fmt: skip
SIGLIP = {
    "model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27,
    "num_attention_heads": 16, "patch_size": 14, "image_size": 980, "num_channels": 3,
}  # fmt: skip


def make_models(folder: Path) -> dict[str, str]:
    """Qwen2.5 in two sizes, SigLIP, FLUX's autoencoder and BAGEL below ``folder``; the variables of the recipes that name them."""
    for name, config in (("qwen0.5b", QWEN_0_5B), ("qwen7b", QWEN_7B), ("siglip", SIGLIP)):
        _write(folder / name / "config.json", config)
    _write(folder / "bagel/llm_config.json", QWEN_7B)
    _write(folder / "bagel/vit_config.json", SIGLIP)
    for path in (folder / "bagel/ae.safetensors", folder / "flux/ae.safetensors", folder / "data.yaml"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return {
        "dataset_config_file": str(folder / "data.yaml"), "model_path": str(folder / "bagel"), "vit_path": str(folder / "siglip"),
        "vae_path": str(folder / "flux/ae.safetensors"),
    }  # fmt: skip


def _write(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
