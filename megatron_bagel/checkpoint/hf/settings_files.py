# SPDX-License-Identifier: Apache-2.0
"""The JSON files of a model folder that describe it to other programs: model, image processor, end of an answer.

What each program reads is listed in docs/serving.md.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_bagel.common.json_files import read_json
from megatron_bagel.config.architecture import AutoencoderArch, BagelArch

#: The class name by which servers know the model. Earlier exports said "Bagel"; nothing here reads it.
ARCHITECTURE = "BagelForConditionalGeneration"
BOS, EOS, PAD = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
_GENERATION = "generation_config.json"
_BICUBIC = 3  # Pillow's number


def write_configs(out: Path, arch: BagelArch, stored: str) -> None:
    """Write ``config.json`` and the files of its sections; ``stored`` is the type of the weights.

    ``ae_config.json`` is read back here. Other programs know FLUX's autoencoder alone, so only another one needs that file.
    """
    top = {**arch.to_hf(), "architectures": [ARCHITECTURE]}
    top["llm_config"] = {**top["llm_config"], "torch_dtype": stored}
    _write_json(out / "config.json", top)
    _write_json(out / "llm_config.json", top["llm_config"])
    if arch.vit is not None:
        _write_json(out / "vit_config.json", top["vit_config"])
        _write_json(out / "preprocessor_config.json", preprocessor_config(arch))
    if arch.autoencoder is not None:
        _write_json(out / "vae_config.json", arch.autoencoder.to_dict())
        if arch.autoencoder != AutoencoderArch():
            _write_json(out / "ae_config.json", arch.autoencoder.to_dict())


def preprocessor_config(arch: BagelArch) -> dict[str, Any]:
    """Return the settings of transformers' SigLIP image processor.

    Pictures get the side of the position grid: a server reserves ``vit_max_num_patch_per_side`` squared tokens for each. Raises
    ValueError for a model without a vision tower.
    """
    if arch.vit is None:
        raise ValueError("a model without a vision tower has no image processor")
    side = arch.vit.image_size
    if side // arch.vit.patch_size != arch.vit_max_num_patch_per_side:
        side = arch.vit_max_num_patch_per_side * arch.vit.patch_size
    return {
        "image_processor_type": "SiglipImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": side, "width": side},
        "resample": _BICUBIC,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }


def write_generation_config(folder: Path) -> None:
    """Make ``generation_config.json`` name the token that ends an answer, by the tokenizer files of ``folder``.

    A file that came with the tokenizer keeps its other settings: a pretrained model may end with another token.
    """
    ids, path = token_ids(folder), folder / _GENERATION
    if not path.is_file():
        named = {"bos_token_id": ids.get(BOS), "eos_token_id": ids.get(EOS), "pad_token_id": ids.get(PAD, ids.get(EOS))}
        _write_json(path, {"do_sample": False, **{name: number for name, number in named.items() if number is not None}})
        return
    config = read_json(path, "tokenizer")
    ends = config.get("eos_token_id")
    listed = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if EOS in ids and ids[EOS] not in listed:
        _write_json(path, {**config, "eos_token_id": [ids[EOS], *listed] if listed else ids[EOS]})


def token_ids(folder: Path) -> dict[str, int]:
    """Return the ids of all tokens that the JSON files of a tokenizer in ``folder`` name."""
    ids: dict[str, int] = {}
    for name in ("vocab.json", "added_tokens.json"):
        if (folder / name).is_file():
            ids |= read_json(folder / name, "tokenizer")
    if (folder / "tokenizer.json").is_file():
        tokenizer = read_json(folder / "tokenizer.json", "tokenizer")
        vocabulary = tokenizer.get("model", {}).get("vocab", {})
        ids |= vocabulary if isinstance(vocabulary, dict) else {token: number for number, (token, _) in enumerate(vocabulary)}
        ids |= {token["content"]: token["id"] for token in tokenizer.get("added_tokens") or []}
    if (folder / "tokenizer_config.json").is_file():
        added = read_json(folder / "tokenizer_config.json", "tokenizer").get("added_tokens_decoder") or {}
        ids |= {token["content"]: int(number) for number, token in added.items()}
    return ids


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
