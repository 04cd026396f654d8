# SPDX-License-Identifier: Apache-2.0
"""The guide's two commands, with tiny folders in place of the real ones: pre-training from a Qwen2 and a SigLIP folder, and
fine-tuning of the model that came out of it."""

from __future__ import annotations

import shutil
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from megatron_bagel.cli import train
from megatron_bagel.cli.convert import megatron_to_hf
from megatron_bagel.cli.resolve_run import sizes_with_notes
from megatron_bagel.config.parser import Config
from megatron_bagel.training.observability.metrics_file import read_history
from tests.distributed import fork
from tests.runs import make_world

pytestmark = pytest.mark.distributed
#: The files that describe a model, in a folder of Hugging Face's or in the released layout.
ARCHITECTURE = ("config.json", "llm_config.json", "vit_config.json", "ae_config.json")
GUIDE_DATA = ["--expected_num_tokens", "256", "--max_num_tokens", "320", "--max_num_tokens_per_sample", "256"]
TINY = ["--vit_max_num_patch_per_side", "10", "--total_steps", "2", "--warmup_steps", "1"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sample world, with pretrained (here: random) weights in Hugging Face's own formats."""
    from transformers import AutoConfig, Qwen2ForCausalLM, SiglipVisionConfig, SiglipVisionModel

    folder = make_world(tmp_path_factory.mktemp("world"))
    torch.manual_seed(0)
    Qwen2ForCausalLM(AutoConfig.from_pretrained(folder / "data/llm")).save_pretrained(folder / "qwen")
    for file in (folder / "data/tokenizer").iterdir():
        shutil.copy(file, folder / "qwen")
    SiglipVisionModel(SiglipVisionConfig.from_pretrained(folder / "data/vit")).save_pretrained(folder / "siglip")
    return folder


def command(arguments: list[str], opened: Path | None = None) -> int | None:
    """Exit code of the program in a process of its own. It lists every file that it opens, once per opening, in the file ``opened``."""

    def main() -> None:
        names: list[str] = []
        if opened is not None:
            sys.addaudithook(lambda event, args: names.append(str(args[0])) if event == "open" else None)
        code = train.main(arguments)
        if opened is not None:
            opened.write_text("\n".join(names))
        raise SystemExit(code)

    process = fork(main)
    process.join(240)
    return process.exitcode


def architecture_reads(opened: Path) -> dict[str, int]:
    """How often each JSON file of an architecture was opened, by its folder and name."""
    files = [Path(name) for name in opened.read_text().splitlines()]
    return dict(Counter(f"{file.parent.name}/{file.name}" for file in files if file.name in ARCHITECTURE))


def test_pretraining_then_fine_tuning_as_in_the_guide(world: Path, tmp_path: Path) -> None:
    pretrain = [
        "--dataset_config_file", str(world / "data/dataset.yaml"), "--llm_path", str(world / "qwen"),
        "--vae_path", str(world / "ae.safetensors"), "--vit_path", str(world / "siglip"),
        "--layer_module", "Qwen2MoTDecoderLayer", "--use_flex", "True",
        "--results_dir", str(tmp_path / "a"), "--checkpoint_dir", str(tmp_path / "a/checkpoints"), "--max_latent_size", "64",
    ]  # fmt: skip
    assert command([*pretrain, *GUIDE_DATA, *TINY, "--num_workers", "1", "--log_every", "1"], tmp_path / "a.txt") == 0
    assert architecture_reads(tmp_path / "a.txt") == {"qwen/config.json": 1, "siglip/config.json": 1, f"{world.name}/ae_config.json": 1}
    assert (tmp_path / "a/index/manifest.json").is_file(), "without --index_dir the index is made below results_dir"
    assert len(read_history(tmp_path / "a/metrics.jsonl")) == 2
    model = tmp_path / "model"
    assert not megatron_to_hf.main(["--checkpoint", str(tmp_path / "a/checkpoints"), "--output", str(model), "--dtype", "fp32"])
    finetune = [
        "--dataset_config_file", str(world / "data/dataset.yaml"), "--model_path", str(model), "--layer_module", "Qwen2MoTDecoderLayer",
        "--max_latent_size", "64", "--resume-from", str(model), "--finetune_from_hf", "True", "--auto_resume", "True",
        "--resume-model-only", "True", "--finetune-from-ema", "True", "--log_every", "1", "--lr", "2e-5", "--num_worker", "1",
        "--results_dir", str(tmp_path / "b"), "--checkpoint_dir", str(tmp_path / "b/checkpoints"),
    ]  # fmt: skip
    assert command([*finetune, *GUIDE_DATA, *TINY], tmp_path / "b.txt") == 0
    assert architecture_reads(tmp_path / "b.txt") == {f"model/{name}": 1 for name in ARCHITECTURE}
    assert len(read_history(tmp_path / "b/metrics.jsonl")) == 2
    assert f"starting from the ema weights of {model}" in (tmp_path / "b/log.txt").read_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--llm_path", "nowhere"], "--llm_path: there is no folder nowhere"),
        (["--vit_path", "nowhere"], "--vit_path: there is no folder nowhere"),
        (["--vae_path", "nowhere/ae.safetensors"], "--vae_path: there is no file nowhere"),
        (["--resume_from", "nowhere"], "--resume_from nowhere"),
        (["--max_latent_size", "2"], "--max_latent_size"),
        (["--vit_max_num_patch_per_side", "9"], "vit_max_num_patch_per_side"),
        (["--max_latent_sizes", "64"], "did you mean --max_latent_size"),
        (["--max_num_tokens_per_sample", "8", "--max_num_tokens", "9", "--expected_num_tokens", "9"], "longer than 8 tokens"),
    ],
)
def test_what_cannot_work_is_refused_at_the_start(
    world: Path, tmp_path: Path, capfd: pytest.CaptureFixture, change: list[str], message: str
) -> None:
    base = [
        "--dataset_config_file", str(world / "data/dataset.yaml"), "--index_dir", str(world / "index"), "--llm_path", str(world / "qwen"),
        "--vae_path", str(world / "ae.safetensors"), "--vit_path", str(world / "siglip"), "--results_dir", str(tmp_path),
        "--checkpoint_dir", str(tmp_path / "checkpoints"), "--num_workers", "0", *GUIDE_DATA, *TINY, "--max_latent_size", "64",
    ]  # fmt: skip
    assert command([*base, *change]) == 2
    assert message in capfd.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--tensor_model_parallel_size", "3"], "= 3 ranks per replica do not divide the 8 ranks of this run"),
        (["--tensor_model_parallel_size", "8"], "attention heads cannot be divided by 8; sizes that work: 1 or 2"),
        (["--pipeline_model_parallel_size", "8"], "2 layers cannot be divided evenly among 8 stages"),
        (["--context_parallel_size", "8", "--cp_comm_type", "a2a"], "cannot be divided by 8; sizes that work: 1"),
        (["--sequence_parallel"], "it needs --tensor_model_parallel_size above 1"),
        (["--global_batch_size", "12"], "is not a multiple of the 8 data-parallel replicas"),
        (["--num_distributed_optimizer_instances", "3"], "do not divide the 8 data-parallel ranks"),
        (["--overlap_param_gather"], "needs --use_distributed_optimizer and --overlap_grad_reduce"),
    ],
)
def test_a_layout_that_cannot_work_is_refused_before_ranks_meet(
    world: Path, tmp_path: Path, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, change: list[str], message: str
) -> None:
    """One of eight ranks, the others of which never come: whoever waited for them would not be refused in time."""
    for name, value in {"WORLD_SIZE": "8", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "9"}.items():
        monkeypatch.setenv(name, value)
    base = [
        "--dataset_config_file", str(world / "data/dataset.yaml"), "--index_dir", str(world / "index"), "--llm_path", str(world / "qwen"),
        "--vae_path", str(world / "ae.safetensors"), "--vit_path", str(world / "siglip"), *GUIDE_DATA, *TINY,
    ]  # fmt: skip
    assert command([*base, *change]) == 2
    assert message in capfd.readouterr().err


def test_streams_that_share_a_hardware_queue_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a run encodes ahead, and nowhere else."""
    early = Config.from_values({"overlap_vae_encode": True})
    for connections, is_named in (("1", True), ("8", False), (None, False)):
        if connections is None:
            monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS")
        else:
            monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", connections)
        notes = [[note for note in sizes_with_notes(early, 1, has_gpu).notes if "MAX_CONNECTIONS" in note] for has_gpu in (True, False)]
        assert [len(found) for found in notes] == [is_named, 0]
        assert not any("MAX_CONNECTIONS" in note for note in sizes_with_notes(Config.from_values({}), 1, True).notes)
