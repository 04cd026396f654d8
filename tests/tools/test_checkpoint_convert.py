"""Hugging Face folder -> checkpoint -> Hugging Face folder is the identity, by the tools' own command lines."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.checkpoint.tiny_run import train_and_save
from tests.distributed import run_ranks
from tools.checkpoint_convert import hf_to_megatron, megatron_to_hf


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
    for kind in ("ema", "model") if weights == "both" else ("ema",):
        written = load_file(out / f"{kind}.safetensors")
        assert written.keys() == recorded.keys()
        for name, tensor in recorded.items():
            assert written[name].dtype == tensor.dtype
            assert torch.equal(written[name], tensor), name
    assert (out / "ae.safetensors").read_bytes() == (source / "ae.safetensors").read_bytes()
    assert (out / "vocab.json").is_file() and (out / "vit_config.json").is_file()


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


def test_errors_are_sentences(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert megatron_to_hf.main(["--checkpoint", str(tmp_path / "nowhere"), "--output", str(tmp_path / "out")]) == 1
    assert "does not exist" in capsys.readouterr().err
    assert hf_to_megatron.main(["--model", str(tmp_path / "nowhere"), "--output", str(tmp_path / "out")]) == 1
    assert "nowhere does not exist" in capsys.readouterr().err
