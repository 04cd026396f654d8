# SPDX-License-Identifier: Apache-2.0
"""A complete small training set: the folders of the world, a tokenizer of its texts, model configs, an autoencoder, ``dataset.yaml``."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_bagel.data.keyed_random import keyed_generator
from megatron_bagel.sample_world.assets import AUTOENCODER, TRAIN_CONFIG
from megatron_bagel.sample_world.folders import FolderSpec, write_folders, write_yaml
from megatron_bagel.sample_world.puzzles import draw_puzzle
from megatron_bagel.sample_world.text import captions, draw_edit, questions
from megatron_bagel.sample_world.tokenizer_training import train_tokenizer
from megatron_bagel.sample_world.world import draw_scene

VOCAB_MULTIPLE = 64  # the model's vocabulary is padded to it, as real ones are: it divides by tensor-parallel sizes
TOKENIZER_SCENES = 2000


@dataclass(frozen=True)
class LLMSize:
    """Width and depth of the decoder, and the deviation of its first weights; None for one that suits short trainings of many kinds."""

    hidden: int
    layers: int
    initializer_range: float | None = None


@dataclass(frozen=True)
class ViTSize:
    """Width and depth of the vision transformer, its unused last layer included, and the side of its position grid."""

    hidden: int
    layers: int
    patches_per_side: int


def make_training_set(folder: Path, spec: FolderSpec, vocab_size: int, llm: LLMSize, vit: ViTSize) -> int:
    """Write everything beside ``folder`` and move it into place at the end.

    Args:
        folder: Folder to make; it must not exist, or be empty.
        spec: What the samples are.
        vocab_size: The tokenizer's tokens at most.
        llm: Sizes in ``llm/config.json``.
        vit: Sizes in ``vit/config.json``.

    Returns:
        How many tokens the tokenizer has.

    Raises:
        ValueError: ``folder`` already holds something.
    """
    out = folder.resolve()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{folder} exists and is not empty; remove it or name another folder")
    partial = out.parent / f"{out.name}.partial"
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    dataset = write_folders(spec, partial, out)
    write_yaml(dataset, partial / "dataset.yaml", "Made by make_sample_data.py: groups as in the data guide, and where they lie.")
    tokens = train_tokenizer(world_texts(spec), partial / "tokenizer", vocab_size)
    shutil.copytree(partial / "tokenizer", partial / "llm")
    write_json(partial / "llm/config.json", llm_config(tokens, llm))
    write_json(partial / "vit/config.json", vit_config(vit))
    shutil.copytree(AUTOENCODER, partial / "vae")
    shutil.copyfile(TRAIN_CONFIG, partial / "train.yaml")
    description = dataclasses.asdict(spec)
    description["world"]["held_out"] = sorted(description["world"]["held_out"])
    write_json(partial / "world.json", description)
    if out.exists():
        out.rmdir()
    partial.rename(out)
    return tokens


def world_texts(spec: FolderSpec) -> Iterator[str]:
    """Yield sentences of the world to train the tokenizer on, from scenes of their own, so every word occurs even in tiny data sets."""
    for i in range(TOKENIZER_SCENES):
        rng = keyed_generator(spec.seed, "tokenizer", i)
        scene = edited = draw_scene(spec.world, rng)
        if spec.edit_world != spec.world:
            edited = draw_scene(spec.edit_world, rng)
        yield from captions(scene, spec.world)
        yield from draw_edit(edited, spec.edit_world, rng, spec.edit_kinds).instructions
        for question, answer in questions(scene, spec.world):
            yield question
            yield answer
        if spec.interleaved:
            yield draw_puzzle(scene, spec.world, rng).question


def llm_config(vocab_size: int, size: LLMSize) -> dict[str, Any]:
    """Return a Qwen2 config with heads of 32 channels, two of them per key/value head."""
    heads = max(2, size.hidden // 32)
    return {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "vocab_size": -(-vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE,
        "hidden_size": size.hidden, "intermediate_size": 3 * size.hidden, "num_hidden_layers": size.layers, "num_attention_heads": heads,
        "num_key_value_heads": heads // 2, "hidden_act": "silu", "max_position_embeddings": 4096,
        # The usual 0.02 is for widths of thousands: at small ones hardly any signal would pass at first.
        "initializer_range": size.initializer_range or round(0.7 * size.hidden**-0.5, 3),
        "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "tie_word_embeddings": False,
    }  # fmt: skip


def vit_config(size: ViTSize) -> dict[str, Any]:
    """Return a SigLIP vision config; its image size is what `vit_max_num_patch_per_side` must agree with."""
    return {
        "model_type": "siglip_vision_model", "hidden_size": size.hidden, "intermediate_size": 3 * size.hidden,
        "num_hidden_layers": size.layers, "num_attention_heads": max(1, size.hidden // 32), "num_channels": 3,
        "image_size": 14 * size.patches_per_side, "patch_size": 14,
        "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6, "attention_dropout": 0.0,
    }  # fmt: skip


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file, and make its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")
