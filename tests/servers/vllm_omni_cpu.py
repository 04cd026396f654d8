# SPDX-License-Identifier: Apache-2.0
"""Run vllm-omni's own BAGEL pipeline on a CPU over an exported folder: what it loads, and the first velocity that it computes.

    python tests/servers/vllm_omni_cpu.py FOLDER OUT.safetensors

It runs in an environment of its own with vllm and vllm-omni 0.30.0, torch 2.13 for CPUs and transformers 5.14, and imports nothing of
this package. vllm-omni has no platform for CPUs and lets others bring one: here with PyTorch's attention, by its own SDPA backend.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import vllm_omni.platforms as platforms
from safetensors.torch import load_file, save_file
from vllm_omni.platforms.interface import UnspecifiedOmniPlatform

HEIGHT, WIDTH, TIME, PROMPT = 64, 96, 0.9, "a photo of a red circle"


class CpuPlatform(UnspecifiedOmniPlatform):
    """One CPU device whose attention is PyTorch's."""

    @classmethod
    def get_diffusion_attn_backend_cls(cls, selected_backend: str | None, head_size: int, allow_trtllm_default: bool = False) -> str:
        """Return the name of the attention backend."""
        return "cpu_attention.CpuBackend"

    @classmethod
    def supports_torch_inductor(cls) -> bool:
        """Return that nothing is compiled."""
        return False

    @classmethod
    def get_device_count(cls) -> int:
        """Return that there is one device."""
        return 1

    @classmethod
    def set_device(cls, device: torch.device) -> None:
        """Do nothing: there is one device."""


platforms._current_omni_platform = CpuPlatform()


def load_pipeline(folder: Path) -> Any:
    """Return vllm-omni's pipeline, built from the folder's configs, in bf16."""
    from vllm.config import DeviceConfig, VllmConfig, set_current_vllm_config
    from vllm_omni.diffusion.config import set_current_diffusion_config
    from vllm_omni.diffusion.data import OmniDiffusionConfig
    from vllm_omni.diffusion.distributed import parallel_state
    from vllm_omni.diffusion.models.bagel.pipeline_bagel import BagelPipeline

    torch.set_default_dtype(torch.bfloat16)
    config = OmniDiffusionConfig(model=str(folder), dtype=torch.bfloat16)
    with set_current_vllm_config(VllmConfig(device_config=DeviceConfig(device="cpu"))), tempfile.TemporaryDirectory() as meeting:
        parallel_state.init_distributed_environment(
            world_size=1, rank=0, local_rank=0, distributed_init_method=f"file://{meeting}/ranks", backend="gloo"
        )
        parallel_state.initialize_model_parallel(backend="gloo")
        with set_current_diffusion_config(config):
            return BagelPipeline(od_config=config)


def load_weights(pipeline: Any, folder: Path) -> dict[str, Any]:
    """Load the files that the folder's index names, and return what was loaded."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    stored = {name: tensor for file in sorted(set(index.values())) for name, tensor in load_file(folder / file).items()}
    loaded = pipeline.load_weights(iter(stored.items()))
    parameters = {name for name, _ in pipeline.named_parameters()}
    return {"stored": len(stored), "parameters": len(parameters), "not_loaded": sorted(parameters - set(loaded))}


def first_velocity(pipeline: Any, noise: torch.Tensor) -> torch.Tensor:
    """Return the velocity of a picture's first step after a prompt, without guidance."""
    from vllm_omni.diffusion.models.bagel.pipeline_bagel import NaiveCache

    bagel = pipeline.bagel
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        text, lengths, positions = bagel.prepare_prompts([0], [0], [PROMPT], pipeline.tokenizer, pipeline.new_token_ids)
        cache = bagel.forward_cache_update_text(NaiveCache(bagel.config.llm_config.num_hidden_layers), **text)
        inputs = bagel.prepare_input(lengths, positions, [(HEIGHT, WIDTH)], pipeline.new_token_ids)
        del inputs["packed_init_noises"]
        times = torch.full((len(noise),), TIME, dtype=torch.bfloat16)
        return bagel.forward_single_branch(noise.bfloat16(), times, past_key_values=cache, **inputs).float()


def main(folder: Path, out: Path) -> None:
    """Load, compute, write the noise and the velocity, and print what was loaded."""
    pipeline = load_pipeline(folder)
    report = load_weights(pipeline, folder)
    tokens = HEIGHT // 16 * (WIDTH // 16)
    noise = torch.randn(tokens, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float32)
    save_file({"noise": noise, "velocity": first_velocity(pipeline, noise).contiguous()}, out)
    print(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
