# SPDX-License-Identifier: Apache-2.0
"""Opening models: an HF folder and a training checkpoint give the same engine, and what does not fit is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from megatron_bagel.inference.core.engine import Engine
from megatron_bagel.inference.core.load_engine import LoadOptions, image_transforms, load_engine
from tests.inference.tiny_model import tiny_arch


def copied(folder: Path, out: Path) -> Path:
    return Path(shutil.copytree(folder, out / "model"))


def test_bf16_weights_and_fp32_compute(tiny_folder: Path, single_rank: None) -> None:
    engine = load_engine(tiny_folder, LoadOptions(dtype="bf16"))
    assert engine.dtype is torch.bfloat16
    assert next(engine.autoencoder.parameters()).dtype is torch.float32


def test_training_checkpoint_equals_the_folder(engine: Engine, tiny_folder: Path, tmp_path: Path) -> None:
    from megatron_bagel.checkpoint.dist.saver import Saver
    from megatron_bagel.checkpoint.dist.state import Trained

    modules = {"decoder": engine.decoder, "vision": engine.vision_tower}
    run = {"config": {"model": {"vae_path": str(tiny_folder / "ae.safetensors"), "tokenizer_path": str(tiny_folder)}}}
    Saver(tmp_path).save(3, Trained(modules, engine.arch), run)
    loaded = load_engine(tmp_path)
    theirs = dict(loaded.decoder.named_parameters())
    assert all(torch.equal(p, theirs[name]) for name, p in engine.decoder.named_parameters())
    with pytest.raises(ValueError, match="--weights ema: .* has only model weights"):
        load_engine(tmp_path, LoadOptions(weights="ema"))


def test_checkpoint_without_its_files_asks_for_them(engine: Engine, tmp_path: Path) -> None:
    from megatron_bagel.checkpoint.dist.saver import Saver
    from megatron_bagel.checkpoint.dist.state import Trained

    Saver(tmp_path).save(1, Trained({"decoder": engine.decoder, "vision": engine.vision_tower}, engine.arch), {})
    with pytest.raises(ValueError, match="tokenizer .not recorded. does not exist; give its location with --tokenizer"):
        load_engine(tmp_path / "0000001")


def test_wrong_paths_are_named(tmp_path: Path, tiny_folder: Path, single_rank: None) -> None:
    with pytest.raises(ValueError, match="--model .*nowhere does not exist"):
        load_engine(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="neither llm_config.json .* nor a complete training checkpoint"):
        load_engine(tmp_path)
    with pytest.raises(ValueError, match="has no model.safetensors"):
        load_engine(tiny_folder, LoadOptions(weights="model"))
    with pytest.raises(ValueError, match="--autoencoder .*gone.safetensors is not a file"):
        load_engine(tiny_folder, LoadOptions(autoencoder=str(tmp_path / "gone.safetensors")))


def test_a_missing_tensor_is_refused(tiny_folder: Path, tmp_path: Path, single_rank: None) -> None:
    from safetensors.torch import load_file, save_file

    folder = copied(tiny_folder, tmp_path)
    tensors = load_file(folder / "ema.safetensors")
    del tensors["vae2llm.bias"]
    save_file(tensors, folder / "ema.safetensors")
    with pytest.raises(ValueError, match="vae2llm.bias"):
        load_engine(folder)


def test_table_side_comes_from_the_weights_where_the_config_is_silent(tiny_folder: Path, tmp_path: Path, single_rank: None) -> None:
    folder = copied(tiny_folder, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    del config["max_latent_size"]
    (folder / "config.json").write_text(json.dumps(config))
    assert load_engine(folder).arch.max_latent_size == 8
    assert load_engine(folder, LoadOptions(max_latent_size=16)).arch.max_latent_size == 16


def test_usual_transforms_shrink_to_the_model_and_asked_ones_are_refused() -> None:
    vae, vit = image_transforms(tiny_arch(), None, None)
    assert (vae.max_image_size, vae.image_stride, vit.max_image_size, vit.image_stride) == (64, 8, 56, 14)
    with pytest.raises(ValueError, match="--vae-transform 128 64: .* exceed the 64 that max_latent_size 8 allows"):
        image_transforms(tiny_arch(), (128, 64), None)


def test_ranks_must_be_shared_out_evenly(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match="--tensor-model-parallel-size 2 does not divide the 3 launched"):
        load_engine(tiny_folder, LoadOptions(tensor_parallel=2))


@pytest.mark.parametrize("name", ["ema.safetensors", "ae.safetensors"])
def test_weights_that_are_not_finite_are_refused(tiny_folder: Path, tmp_path: Path, single_rank: None, name: str) -> None:
    """A model of NaN would draw black pictures."""
    from safetensors.torch import load_file, save_file

    folder = copied(tiny_folder, tmp_path)
    tensors = load_file(folder / name)
    broken = max(tensors, key=lambda tensor_name: tensors[tensor_name].numel())
    tensors[broken][-1] = float("nan")
    save_file(tensors, folder / name)
    with pytest.raises(ValueError, match=rf"{name}: tensor {broken} holds NaN or infinite values"):
        load_engine(folder, LoadOptions(check_weights="full"))
