# SPDX-License-Identifier: Apache-2.0
"""Flags that name models on a hub do what the folders do, on one rank and on several, and records keep the commit."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, Qwen2ForCausalLM

from megatron_bagel.checkpoint.convert_adapter import merge_adapter
from megatron_bagel.checkpoint.hf.folder import HFFolder
from megatron_bagel.cli.convert import megatron_to_hf
from megatron_bagel.model.positions import sincos_2d
from megatron_bagel.training.observability.metrics_file import read_history
from tests.hub_server import Hub, running_hub
from tests.runs import make_world, run, run_config

#: Prints the paths that settings become, and the record of the run.
DRIVER = """
import json, sys
from megatron_bagel.cli.hub_models import with_hub_folders
from megatron_bagel.config.parser import Config, parse_config

config = with_hub_folders(parse_config(sys.argv[1:]))
record = config.to_record()
again = Config.from_dict(record).model.model_path
print(json.dumps([record["model"], record["training"]["resume_from"], record["lora"]["lora_base"], record["typed"], again]))
"""


def test_settings_become_folders_and_the_record_keeps_commits(goldens: Path, tmp_path: Path) -> None:
    with running_hub() as hub:
        commit = hub.add("owner/bagel", goldens / "hf")
        hub.requests.clear()
        words = ["--finetune_from_hf", "True", "--model_path", "owner/bagel", "--resume_from", "owner/bagel@main", "--resume_model_only",
                 "True", "--finetune_from_ema", "True", "--llm_path", "owner/not-read", "--vae_path", "not/read@v1",
                 "--lora_base", "owner/bagel@main"]  # fmt: skip
        command = [sys.executable, "-c", DRIVER, *words]
        done = subprocess.run(command, env=hub.environment(tmp_path / "cache"), capture_output=True, text=True, timeout=400)
        assert done.returncode == 0, done.stderr
        model, resume_from, base, typed, again = json.loads(done.stdout.splitlines()[-1])
        folder = tmp_path / f"cache/hub/models--owner--bagel/snapshots/{commit}"
        assert Path(model["model_path"]) == Path(resume_from) == Path(base) == folder and again == str(folder)
        assert typed["model_path"] == typed["resume_from"] == typed["lora_base"] == f"owner/bagel@{commit}"
        assert typed["llm_path"] == "owner/not-read"
        assert {"ae.safetensors", "ema.safetensors"} < set(hub.downloads()) and "model.safetensors" not in hub.downloads()
        shutil.rmtree(tmp_path / "cache")
        lost = subprocess.run([*command, "--allow_missing", "x.*"], env=hub.environment(tmp_path / "other"), capture_output=True, text=True)
        assert lost.returncode == 0 and f"other/hub/models--owner--bagel/snapshots/{commit}" in lost.stdout


#: Merges an adapter, makes sparse experts, and finds the files of generation, all by names; prints exit codes and paths.
NAMED = """
import json, sys
from megatron_bagel.cli.convert import adapter, upcycle
from megatron_bagel.inference.core.load_engine import LoadOptions, _on_this_machine

out, base = sys.argv[1], "owner/bagel"
codes = [
    adapter.main(["merge", "--adapter", "owner/adapter", "--base", base, "--output", f"{out}/merged"]),
    upcycle.main(["--model", base, "--output", f"{out}/sparse", "--num-experts", "2", "--moe-router-topk", "1"]),
    adapter.main(["merge", "--adapter", "owner/bagel", "--base", base, "--output", f"{out}/none"]),
]
path, options = _on_this_machine(base, LoadOptions(adapter="owner/adapter@main", autoencoder=base))
print(json.dumps([codes, str(path), options.adapter, options.autoencoder]))
"""


def peft_folder(folder: Path) -> Path:
    """Write an adapter of one weight of the goldens' model in PEFT's format."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    name = "base_model.model.language_model.model.layers.0.self_attn.o_proj.lora_"
    factors = {f"{name}A.weight": torch.randn(2, 128, generator=generator), f"{name}B.weight": torch.randn(128, 2, generator=generator)}
    save_file(factors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4}))
    return folder


@pytest.mark.slow
def test_adapters_and_other_models_of_converters_are_named_too(goldens: Path, tmp_path: Path) -> None:
    folder = peft_folder(tmp_path / "adapter")
    with running_hub() as hub:
        hub.add("owner/bagel", goldens / "hf")
        hub.add("owner/adapter", folder)
        environment = hub.environment(tmp_path / "cache")
        done = subprocess.run([sys.executable, "-c", NAMED, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=400)
        assert done.returncode == 0, done.stderr
        codes, model, adapter, autoencoder = json.loads(done.stdout.splitlines()[-1])
    assert codes == [0, 0, 2] and "--adapter: owner/bagel has no adapter_model weights in safetensors; it has ae.safetensors" in done.stderr
    assert {path.name for path in Path(adapter).iterdir()} == {path.name for path in folder.iterdir()}
    assert Path(autoencoder) == Path(model) / "ae.safetensors" and Path(autoencoder).is_file()
    merge_adapter(folder, goldens / "hf", tmp_path / "by_folder", sincos_2d)
    by_name, by_folder = (load_file(tmp_path / name / "ema.safetensors") for name in ("merged", "by_folder"))
    assert by_name.keys() == by_folder.keys() and all(torch.equal(by_name[name], tensor) for name, tensor in by_folder.items())
    released = load_file(goldens / "hf/ema.safetensors")
    assert [name for name in released if not torch.equal(released[name], by_name[name])] == [
        "language_model.model.layers.0.self_attn.o_proj.weight"
    ]
    assert HFFolder(tmp_path / "sparse").arch.llm.sparse is not None


def _command(hub: Hub, cache: Path, words: list[str], ranks: int = 0) -> subprocess.CompletedProcess[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)] if ranks else []
    environment = {**hub.environment(cache), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *launcher, *words], env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.distributed
def test_every_command_takes_a_name(tmp_path: Path) -> None:
    """Training on two ranks, generation, conversion both ways and a plan, by the name of an exported model."""
    world = make_world(tmp_path / "world")
    run(run_config(world, tmp_path / "first", total_steps=2))
    model = tmp_path / "model"
    export = ["--checkpoint", str(tmp_path / "first/checkpoints"), "--output", str(model), "--weights", "both", "--dtype", "fp32"]
    assert megatron_to_hf.main(export) == 0
    start = {"finetune_from_hf": True, "resume_model_only": True, "init_random": False, "total_steps": 2, "global_batch_size": 2}
    config = run_config(world, tmp_path / "folder", 2, model_path=str(model), resume_from=str(model), **start)
    by_folder = run(config, 2)
    with running_hub() as hub:
        commit = hub.add("owner/small", model)
        hub.delay = 1.0
        settings = {**start, "model_path": "owner/small", "resume_from": "owner/small@main", "results_dir": str(tmp_path / "name"),
                    "checkpoint_dir": str(tmp_path / "name/checkpoints")}  # fmt: skip
        values = {name: config.value_of(name) for name in config.given} | settings
        words = [word for name, value in values.items() for word in (f"--{name}", str(value))]
        hub.requests.clear()
        trained = _command(hub, tmp_path / "cache", ["-m", "megatron_bagel.train", *words], ranks=2)
        assert sorted(hub.downloads()) == sorted(set(hub.downloads())), "one rank downloads"
        hub.delay = 0.0
        by_name = read_history(tmp_path / "name/metrics.jsonl")
        assert [[step[name] for name in ("loss", "ce", "mse")] for step in by_name] == [
            [step[name] for name in ("loss", "ce", "mse")] for step in by_folder
        ]
        assert f"--model_path owner/small is commit {commit}" in trained.stderr

        back = tmp_path / "back"
        to_hf = ["-m", "megatron_bagel", "convert", "megatron-to-hf", "--checkpoint", str(tmp_path / "name/checkpoints")]
        # On a machine with an empty cache the tokenizer and the autoencoder of the run come from the hub again.
        shutil.rmtree(tmp_path / "cache")
        _command(hub, tmp_path / "cache", [*to_hf, "--output", str(back)])
        assert "- owner/small\n" in (back / "README.md").read_text() and (back / "ae.safetensors").is_file()
        imported = ["-m", "megatron_bagel", "convert", "hf-to-megatron", "--model", "owner/small", "--output", str(tmp_path / "imported")]
        _command(hub, tmp_path / "cache", imported)
        pictures = {}
        for name in ("owner/small", str(model), str(tmp_path / "imported")):
            out = tmp_path / f"pictures{len(pictures)}"
            draw = [
                "-m",
                "megatron_bagel.generate",
                "--model",
                name,
                "--prompt",
                "a red circle",
                "--image-size",
                "16x16",
                "--out",
                str(out),
            ]
            _command(hub, tmp_path / "cache", [*draw, "--num-timesteps", "3"])
            pictures[name] = (out / "00000.png").read_bytes()
        assert len(set(pictures.values())) == 1
        hub.requests.clear()
        small = ["--gpus", "8", "--vit_image_size", "28", "--image_size", "32"]
        plan = _command(hub, tmp_path / "plans", ["-m", "megatron_bagel", "plan", "--model", "owner/small", *small, "--json"])
        assert json.loads(plan.stdout) and not [file for file in hub.downloads() if file.endswith(".safetensors")]


@pytest.mark.slow
@pytest.mark.distributed
def test_pretrained_parts_come_from_a_hub(tmp_path: Path) -> None:
    world = make_world(tmp_path / "world")
    torch.manual_seed(0)
    Qwen2ForCausalLM(AutoConfig.from_pretrained(world / "data/llm")).save_pretrained(tmp_path / "qwen")
    for file in (world / "data/tokenizer").iterdir():
        shutil.copy(file, tmp_path / "qwen")
    with running_hub() as hub:
        hub.add("owner/qwen", tmp_path / "qwen")
        init = ["-m", "megatron_bagel", "convert", "init", "--vae", str(world / "ae.safetensors"), "--max-latent-size", "4"]
        _command(hub, tmp_path / "cache", [*init, "--llm", "owner/qwen", "--output", str(tmp_path / "by_name")])
        _command(hub, tmp_path / "cache", [*init, "--llm", str(tmp_path / "qwen"), "--output", str(tmp_path / "by_folder")])
        compare = ["-m", "megatron_bagel", "convert", "inspect", "compare", str(tmp_path / "by_name"), str(tmp_path / "by_folder")]
        assert "all tensors are equal" in _command(hub, tmp_path / "cache", compare).stdout
