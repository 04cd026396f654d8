# SPDX-License-Identifier: Apache-2.0
"""Hugging Face folder -> checkpoint -> Hugging Face folder is the identity, by the tools' own command lines."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_bagel.checkpoint.hf.folder import HFFolder
from megatron_bagel.cli.convert import hf_to_megatron, init_from_pretrained, inspect_checkpoint, megatron_to_hf
from tests.checkpoint.hf.exported import export
from tests.checkpoint.tiny_run import train_and_save
from tests.distributed import run_ranks

ROOT = Path(__file__).resolve().parents[3]


def without_latent_size(source: Path, folder: Path) -> Path:
    """`source` by links, with a config.json that leaves `max_latent_size` out, as the released one does."""
    folder.mkdir()
    for file in source.iterdir():
        if file.name != "config.json":
            (folder / file.name).symlink_to(file)
    top = json.loads((source / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({key: value for key, value in top.items() if key != "max_latent_size"}))
    return folder


@pytest.mark.parametrize("weights", ["ema", "both"])
def test_there_and_back(goldens: Path, tmp_path: Path, weights: str, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "hf"
    source.mkdir()
    for file in (goldens / "hf").iterdir():
        (source / file.name).symlink_to(file)
    if weights == "both":
        (source / "model.safetensors").symlink_to(goldens / "hf" / "ema.safetensors")
    assert hf_to_megatron.main(["--model", str(source), "--output", str(tmp_path / "ckpt"), "--weights", weights]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "ckpt" / "0000000")
    out = tmp_path / "out"
    assert megatron_to_hf.main(["--checkpoint", str(tmp_path / "ckpt"), "--output", str(out), "--weights", weights]) == 0
    recorded = load_file(goldens / "hf" / "ema.safetensors")
    assert (out / "model.safetensors.index.json").is_file() is (weights == "ema"), "an index for servers names one kind"
    for kind in ("ema", "model") if weights == "both" else ("ema",):
        written = load_file(out / f"{kind}.safetensors")
        assert written.keys() == recorded.keys()
        for name, tensor in recorded.items():
            assert written[name].dtype == tensor.dtype
            assert torch.equal(written[name], tensor), name
    assert (out / "ae.safetensors").read_bytes() == (source / "ae.safetensors").read_bytes()
    assert (out / "vocab.json").is_file() and (out / "vit_config.json").is_file()


def test_a_folder_with_model_weights_alone_is_taken(goldens: Path, tmp_path: Path) -> None:
    source = tmp_path / "hf"
    source.mkdir()
    for file in (goldens / "hf").iterdir():
        (source / file.name.replace("ema.safetensors", "model.safetensors")).symlink_to(file)
    assert hf_to_megatron.main(["--model", str(source), "--output", str(tmp_path / "ckpt")]) == 0
    out = tmp_path / "out"
    assert megatron_to_hf.main(["--checkpoint", str(tmp_path / "ckpt"), "--output", str(out), "--weights", "model"]) == 0
    recorded, written = load_file(goldens / "hf" / "ema.safetensors"), load_file(out / "model.safetensors")
    assert written.keys() == recorded.keys() and all(torch.equal(written[name], tensor) for name, tensor in recorded.items())


def test_a_checkpoint_of_the_original_trainer_is_taken(goldens: Path, tmp_path: Path) -> None:
    source, trained, llm, vit = goldens / "hf", tmp_path / "0002000", tmp_path / "llm", tmp_path / "vit"
    for folder in (trained, llm, vit):
        folder.mkdir()
    (trained / "ema_bf16.safetensors").symlink_to(source / "ema.safetensors")
    (llm / "config.json").symlink_to(source / "llm_config.json")
    (vit / "config.json").symlink_to(source / "vit_config.json")
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"):
        (llm / name).symlink_to(source / name)
    paths = ["--llm-path", str(llm), "--vit-path", str(vit), "--weights_name", "ema_bf16.safetensors"]
    assert hf_to_megatron.main(["--model", str(trained), "--output", str(tmp_path / "ckpt"), *paths]) == 0
    out = tmp_path / "out"
    command = ["--checkpoint", str(tmp_path / "ckpt"), "--output", str(out), "--autoencoder", str(source / "ae.safetensors")]
    assert megatron_to_hf.main(command) == 0
    recorded, written = load_file(source / "ema.safetensors"), load_file(out / "ema.safetensors")
    assert written.keys() == recorded.keys() and all(torch.equal(written[name], tensor) for name, tensor in recorded.items())
    assert (out / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()


def test_a_trained_checkpoint_gives_weights_and_averages(tmp_path: Path) -> None:
    [trained] = run_ranks(train_and_save, 1, tmp_path, {}, 2, 0, parallel={})
    command = ["--checkpoint", str(tmp_path), "--output", str(tmp_path / "out"), "--weights", "both", "--dtype", "fp32"]
    assert megatron_to_hf.main(command) == 0
    model, ema = (load_file(tmp_path / "out" / f"{kind}.safetensors") for kind in ("model", "ema"))
    head, mlp = "language_model.lm_head.weight", "language_model.model.layers.1.mlp_moe_gen.down_proj.weight"
    assert torch.equal(model[mlp], trained["decoder.decoder.layers.1.mlp.gen.linear_fc2.weight"])
    assert torch.equal(model[head], trained["decoder.output_layer.weight"])
    assert torch.equal(ema[head], trained["ema.decoder.output_layer.weight"])
    assert not torch.equal(model[head], ema[head])


def test_the_model_card_states_step_losses_and_flags_of_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run_ranks(train_and_save, 1, tmp_path / "checkpoints", {}, 2, 0, parallel={})
    command = ["--checkpoint", str(tmp_path / "checkpoints"), "--output"]
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("".join(json.dumps({"step": step, "ce": 3.5 - step, "mse": None}) + "\n" for step in range(3)))
    with caplog.at_level(logging.INFO):
        assert megatron_to_hf.main([*command, str(tmp_path / "out"), "--weights", "both"]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| training steps | 2 |" in card and "| ce | 2.5 |" in card and "| mse" not in card
    assert any("they need one kind (--weights ema)" in message for message in caplog.messages)
    metrics.write_text("{\n" + metrics.read_text())
    with caplog.at_level(logging.INFO):
        assert megatron_to_hf.main([*command, str(tmp_path / "again"), "--weights", "ema"]) == 0
    assert "| ce |" not in (tmp_path / "again" / "README.md").read_text()
    assert any("line 1" in message and "the model card is written without losses" in message for message in caplog.messages)


@pytest.mark.parametrize("stored", [True, False], ids=["with its head", "without, as exported before"])
def test_a_tied_model_travels_with_its_head(goldens: Path, tmp_path: Path, stored: bool) -> None:
    arch, head, embedding = HFFolder(goldens / "hf").arch, "language_model.lm_head.weight", "language_model.model.embed_tokens.weight"
    source = export(goldens, tmp_path / "hf", arch=replace(arch, llm=replace(arch.llm, tie_word_embeddings=True)))
    recorded = load_file(source / "ema.safetensors")
    if not stored:
        save_file({name: tensor for name, tensor in recorded.items() if name != head}, source / "ema.safetensors")
        (source / "model.safetensors.index.json").unlink()
    assert hf_to_megatron.main(["--model", str(source), "--output", str(tmp_path / "ckpt")]) == 0
    assert megatron_to_hf.main(["--checkpoint", str(tmp_path / "ckpt"), "--output", str(tmp_path / "out")]) == 0
    written = load_file(tmp_path / "out" / "ema.safetensors")
    assert written.keys() == recorded.keys() and all(torch.equal(written[name], tensor) for name, tensor in recorded.items())
    assert torch.equal(written[head], written[embedding])


def test_errors_are_sentences(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert megatron_to_hf.main(["--checkpoint", str(tmp_path / "nowhere"), "--output", str(tmp_path / "out")]) == 2
    assert "does not exist" in capsys.readouterr().err
    assert hf_to_megatron.main(["--model", str(tmp_path / "nowhere"), "--output", str(tmp_path / "out")]) == 2
    assert "nowhere does not exist" in capsys.readouterr().err


def test_parts_a_run_was_trained_without_come_from_another_folder(goldens: Path, tmp_path: Path) -> None:
    source = goldens / "hf"
    top = json.loads((source / "config.json").read_text())
    text_only = tmp_path / "text"
    text_only.mkdir()
    tensors = load_file(source / "ema.safetensors")
    parts = ("vit_", "connector", "time_embedder", "vae2llm", "llm2vae", "latent_pos")
    save_file({name: tensor * 2 for name, tensor in tensors.items() if not name.startswith(parts)}, text_only / "ema.safetensors")
    (text_only / "config.json").write_text(json.dumps({**top, "visual_und": False, "visual_gen": False}))
    (text_only / "llm_config.json").write_text((source / "llm_config.json").read_text())
    assert hf_to_megatron.main(["--model", str(text_only), "--output", str(tmp_path / "ckpt")]) == 0
    out = tmp_path / "out"
    command = ["--checkpoint", str(tmp_path / "ckpt"), "--output", str(out), "--tokenizer", str(source)]
    silent = without_latent_size(source, tmp_path / "silent")
    assert megatron_to_hf.main([*command, "--untrained-from", str(silent), "--shard-size", "300KB"]) == 0
    index = json.loads((out / "ema.safetensors.index.json").read_text())
    files = sorted(out.glob("ema-*.safetensors"))
    assert len(files) == len(set(index["weight_map"].values())) > 2
    written: dict[str, torch.Tensor] = {}
    for file in files:
        assert file.stat().st_size < 400_000
        written |= load_file(file)
    assert written.keys() == tensors.keys() == index["weight_map"].keys()
    for name, tensor in tensors.items():
        assert torch.equal(written[name], tensor if name.startswith(parts) else tensor * 2), name
    assert (out / "ae.safetensors").is_file() and (out / "vit_config.json").is_file()


def test_types_are_kept_on_request_and_the_size_is_said_first(goldens: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert hf_to_megatron.main(["--model", str(goldens / "hf"), "--output", str(tmp_path / "ckpt")]) == 0
    for dtype, expected in (("keep", torch.bfloat16), ("fp32", torch.float32)):
        out = tmp_path / dtype
        caplog.clear()
        with caplog.at_level(logging.INFO):
            assert megatron_to_hf.main(["--checkpoint", str(tmp_path / "ckpt"), "--output", str(out), "--dtype", dtype]) == 0
        written = load_file(out / "ema.safetensors")
        assert written["language_model.lm_head.weight"].dtype == expected
        size = sum(tensor.nbytes for tensor in written.values())
        said = [message for message in caplog.messages if str(out) in message]
        assert said == [f"step 0: writing ema, {size / 1e9:.2f} GB together, to {out}", f"wrote {out} (ema)"]


def test_a_folder_that_does_not_say_its_latent_size_keeps_it_and_a_wrong_one_is_refused(
    goldens: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The released folder's config.json is silent about it; its position table is not."""
    silent, checkpoint = without_latent_size(goldens / "hf", tmp_path / "silent"), tmp_path / "ckpt"
    assert hf_to_megatron.main(["--model", str(silent), "--output", str(checkpoint)]) == 0
    assert megatron_to_hf.main(["--checkpoint", str(checkpoint), "--output", str(tmp_path / "out")]) == 0
    table = "latent_pos_embed.pos_embed"
    assert torch.equal(load_file(tmp_path / "out/ema.safetensors")[table], load_file(silent / "ema.safetensors")[table])
    for folder in (silent, goldens / "hf"):
        command = ["--model", str(folder), "--output", str(tmp_path / "wrong"), "--max-latent-size", "8"]
        assert hf_to_megatron.main(command) == 2
        assert "max_latent_size 16, the side of its position table, but --max-latent-size says 8" in capsys.readouterr().err
    assert not (tmp_path / "wrong").exists()


def test_what_a_folder_lacks_is_refused_or_on_request_seeded(
    goldens: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """A folder without the timestep embedder; all other tensors come through bit for bit."""
    source = tmp_path / "hf"
    source.mkdir()
    for file in (goldens / "hf").iterdir():
        if file.name not in ("ema.safetensors", "model.safetensors"):
            (source / file.name).symlink_to(file)
    whole = load_file(goldens / "hf/ema.safetensors")
    save_file({name: tensor for name, tensor in whole.items() if not name.startswith("time_embedder")}, source / "ema.safetensors")
    convert = ["--model", str(source), "--output", str(tmp_path / "ckpt")]
    assert hf_to_megatron.main(convert) == 2
    assert "lacks 4 tensors this model needs: time_embedder" in capsys.readouterr().err
    with caplog.at_level(logging.INFO):
        assert hf_to_megatron.main([*convert, "--allow-missing", "time_embedder*"]) == 0
    assert any("lacks 4 tensors, which start from seeded values: time_embedder" in message for message in caplog.messages)
    assert megatron_to_hf.main(["--checkpoint", str(tmp_path / "ckpt"), "--output", str(tmp_path / "out"), "--dtype", "keep"]) == 0
    back = load_file(tmp_path / "out/ema.safetensors")
    assert back.keys() == whole.keys()
    for name, tensor in whole.items():
        assert torch.equal(back[name], tensor) != name.startswith("time_embedder"), name


@pytest.mark.parametrize(
    ("tool", "options"),
    [
        (hf_to_megatron, ("--model", "--output", "--weights {ema,model,both}", "--max-latent-size")),
        (megatron_to_hf, ("--weights {ema,model,both}", "--dtype {bf16,fp32,keep}", "--shard-size", "--untrained-from", "--tokenizer")),
        (init_from_pretrained, ("--llm", "--vit", "--vae", "--no-copy-init-moe", "--vit-select-layer", "--allow-missing")),
        (inspect_checkpoint, ("show", "compare", "verify")),
    ],
    ids=lambda value: value.__name__.rsplit(".", 1)[-1] if hasattr(value, "__name__") else "",
)
def test_every_command_explains_itself(tool: ModuleType, options: tuple[str, ...]) -> None:
    """As a person starts it: a file by its path, outside of this folder."""
    script = ROOT / "tools/checkpoint_convert" / Path(tool.__file__).name
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, str(script), "--help"], env=environment, capture_output=True, text=True, check=False, cwd="/")
    assert done.returncode == 0, done.stderr
    assert not [option for option in options if option not in " ".join(done.stdout.split())]


def test_a_checkpoint_is_described_compared_and_verified(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_ranks(train_and_save, 1, tmp_path / "a", {}, 1, 0, parallel={})
    run_ranks(train_and_save, 1, tmp_path / "b", {}, 2, 0, parallel={})
    assert inspect_checkpoint.main(["show", str(tmp_path / "a")]) == 0
    page = capsys.readouterr().out
    for part in ("step 1,", "Qwen2MoTDecoderLayer, 2 layers", "weights: model, ema", "optimizer.state.exp_avg", "megatron_core"):
        assert part in page, page
    assert inspect_checkpoint.main(["show", "--json", str(tmp_path / "a")]) == 0
    described = json.loads(capsys.readouterr().out)
    assert described["tensors"]["output_layer.weight"] == [[40, 32], "float32"]
    assert inspect_checkpoint.main(["compare", str(tmp_path / "a"), str(tmp_path / "a" / "0000001")]) == 0
    assert "all tensors are equal" in capsys.readouterr().out
    assert inspect_checkpoint.main(["compare", "--only", "output_layer", str(tmp_path / "a"), str(tmp_path / "b")]) == 1
    report = capsys.readouterr()
    assert "output_layer.weight: 1280 of 1280 values differ" in report.out and "1 tensors differ" in report.err
    assert inspect_checkpoint.main(["verify", str(tmp_path / "b")]) == 0
