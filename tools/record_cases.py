# SPDX-License-Identifier: Apache-2.0
"""Lists the runs that record_runs.py records: flags, ranks and stops. They are small enough for two cores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

STEPS, KEPT_STEP = 20, 10

TRAINING_FLAGS: dict[str, object] = {
    "init_random": True,
    "vit_max_num_patch_per_side": 10,
    "max_latent_size": 4,
    "max_num_tokens": 192,
    "expected_num_tokens": 160,
    "max_num_tokens_per_sample": 128,
    "num_workers": 0,
    "lr": 1e-3,
    "warmup_steps": 5,
    "total_steps": STEPS,
    "log_every": 1,
    "save_every": KEPT_STEP,
    "global_batch_size": 4,
    # Gradients of these runs are longer, so clipping is part of what is recorded.
    "max_grad_norm": 0.5,
    "ema": 0.9,
    "auto_resume": True,
}
TP2_SP = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
PP2 = {"pipeline_model_parallel_size": 2}
OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True}
EVALUATION = {
    "split": "75,25",
    "eval_every": STEPS,
    "eval_samples": 4,
    "eval_pictures": 1,
    "eval_timesteps": 3,
    "eval_answer_tokens": 4,
}


@dataclass(frozen=True)
class Case:
    """Describes a run to record.

    Attributes:
        processes: How many ranks it has.
        flags: Flags besides ``TRAINING_FLAGS``.
        stops: Steps at which a process ends and the next one resumes, the last step included.
        latent_cache: Whether it trains from stored latents.
    """

    processes: int
    flags: Mapping[str, object] = field(default_factory=dict)
    stops: tuple[int, ...] = (STEPS,)
    latent_cache: bool = False


CASES = {
    "one-process": Case(1),
    "tp2-sp-pp2": Case(4, {**TP2_SP, **PP2}),
    "pp2-vpp2": Case(2, {**PP2, "virtual_pipeline_model_parallel_size": 2}),
    "cp3": Case(3, {"context_parallel_size": 3}),
    "dp2-overlap": Case(2, OVERLAP),
    "latent-cache": Case(1, latent_cache=True),
    # The numbers of dp2-overlap, interrupted: the two cases of one recording must be equal as well.
    "resume": Case(2, {**OVERLAP, "num_workers": 1}, stops=(KEPT_STEP, STEPS)),
    # Evaluated after the last step only: a run that continues from step 10 then writes everything that is compared.
    "bf16-evaluation": Case(1, {"bf16": True, "lr": 1e-4, **EVALUATION}),
}


def training_arguments(case: Case, world: Path, folder: Path, total_steps: int) -> list[str]:
    """Return the flags of a case's run up to ``total_steps``."""
    flags: dict[str, object] = {
        **TRAINING_FLAGS,
        "llm_path": world / "data/llm",
        "vit_path": world / "data/vit",
        "vae_path": world / "autoencoder/ae.safetensors",
        "dataset_config_file": world / "data/dataset.yaml",
        "index_dir": world / "index",
        "results_dir": folder,
        "checkpoint_dir": folder / "checkpoints",
        **({"latent_cache": world / "latents"} if case.latent_cache else {}),
        **case.flags,
        "total_steps": total_steps,
    }
    return [text for name, value in flags.items() for text in (f"--{name}", str(value))]
