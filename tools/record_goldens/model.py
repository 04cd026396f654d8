# SPDX-License-Identifier: Apache-2.0
"""A model of the original with seeded random weights, of any size, and its folder in the released layout."""

from __future__ import annotations

import json
import math
import shutil
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tools.record_goldens.files import GoldenFolder
from tools.record_goldens.original import Original, OriginalModel

TOKENIZER_FILES = ("vocab.json", "merges.txt", "tokenizer_config.json", "tokenizer.json")
#: Texts whose tokens a set keeps: words, digits, letters outside ASCII, a special token inside of a text.
_ENCODED = (
    "a photo of a red circle on a green background.", "make the square blue, 42 héllo!", "a  b\n\nc's <|im_end|>x", " ", "what's 123?",
    "describe the picture",
)  # fmt: skip
#: The two sine-cosine tables are made, not trained.
_TABLE = "pos_embed"


@dataclass(frozen=True)
class ModelSettings:
    """The sizes of a model as its folder states them: decoder, vision tower, autoencoder, and what joins them."""

    llm: dict[str, Any]
    vit: dict[str, Any]
    ae: dict[str, Any]
    top: dict[str, Any]

    @classmethod
    def of_folder(cls, folder: Path, overrides: dict[str, Any]) -> ModelSettings:
        """Read a set's model folder. ``overrides`` maps ``llm.hidden_size`` and the like to other values."""
        read = {
            name: json.loads((folder / f"{name}.json").read_text(encoding="utf-8")) for name in ("llm_config", "vit_config", "tiny_extra")
        }
        parts = {"llm": read["llm_config"], "vit": read["vit_config"], "ae": read["tiny_extra"]["ae"], "top": read["tiny_extra"]["top"]}
        for key, value in overrides.items():
            part, _, name = key.partition(".")
            if part not in parts or name not in parts[part]:
                known = ", ".join(f"{part}.{name}" for part in parts for name in parts[part])
                raise ValueError(f"--set {key}: there is no such setting; there are {known}")
            parts[part][name] = value
        return cls(**parts)


class ModelSource:
    """Builds models of the original with one set of weights: that of ``hf/`` in the set's folder."""

    def __init__(self, original: Original, settings: ModelSettings, folder: GoldenFolder) -> None:
        self.original, self.settings, self.folder = original, settings, folder
        self.hf = folder.root / "hf"

    def record(self, seed: int, template: Path) -> None:
        """Write ``hf/`` with weights of ``seed`` and the tokenizer of ``template``, and the names, shapes and tokens of the set."""
        self.hf.mkdir(parents=True, exist_ok=True)
        for name in TOKENIZER_FILES:
            shutil.copyfile(template / "hf" / name, self.hf / name)
        tokenizer, special, added = self.tokenizer()
        model, autoencoder = self._empty()
        fill(model, seed)
        fill(autoencoder, seed + 1)
        with torch.no_grad():  # ids past the tokenizer's length are padding, and must never be the likeliest
            padding = model.language_model.lm_head.weight[len(tokenizer) :]
            padding.copy_(_rounded(0.05 * padding))
        self._write_configs()
        weights = {name: value if name.endswith(_TABLE) else value.to(torch.bfloat16) for name, value in model.state_dict().items()}
        self.folder.tensors("hf/ema.safetensors", weights, {"format": "pt"})
        self.folder.tensors("hf/ae.safetensors", autoencoder.state_dict())
        trains = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        self.folder.json("names_shapes.json", {
            "model": {name: [list(value.shape), str(value.dtype), trains[name]] for name, value in model.state_dict().items()},
            "autoencoder": {name: list(value.shape) for name, value in autoencoder.state_dict().items()},
        })  # fmt: skip
        self.folder.json("tokenizer_golden.json", {
            "new_token_ids": special, "num_new_tokens": added, "len_tokenizer": len(tokenizer),
            "samples": {text: tokenizer.encode(text) for text in _ENCODED},
        })  # fmt: skip

    def tokenizer(self) -> tuple[Any, dict[str, int], int]:
        """Return the set's tokenizer with the original's special tokens, their ids, and how many were new."""
        return self.original.data_utils.add_special_tokens(self.original.tokenizer.Qwen2Tokenizer.from_pretrained(str(self.hf)))

    def load(
        self, layer_module: str = "", freeze_und: bool = False, timestep_shift: float | None = None
    ) -> tuple[OriginalModel, OriginalModel]:
        """Return model and autoencoder with the set's weights, in fp32. Another layer module takes the weights that it has names for."""
        model, autoencoder = self._empty(layer_module, freeze_und, timestep_shift)
        weights = {
            name: value.float() for name, value in self.folder.read_tensors("hf/ema.safetensors").items() if not name.endswith(_TABLE)
        }
        model.load_state_dict(weights, strict=False)
        autoencoder.load_state_dict(self.folder.read_tensors("hf/ae.safetensors"))
        return model.train(), autoencoder.eval()

    def _empty(
        self, layer_module: str = "", freeze_und: bool = False, timestep_shift: float | None = None
    ) -> tuple[OriginalModel, OriginalModel]:
        """Return model and autoencoder as the trainer builds them, in fp32, with the original's own initial values."""
        package = __import__("modeling.bagel", fromlist=["Bagel"])
        names = {key: value for key, value in self.settings.llm.items() if key not in ("architectures", "model_type")}
        llm = package.Qwen2Config(**names)
        llm.layer_module = layer_module or self.settings.llm["layer_module"]
        llm.qk_norm, llm.tie_word_embeddings, llm.freeze_und = True, False, freeze_und
        vit = package.SiglipVisionConfig(**{key: value for key, value in self.settings.vit.items() if key != "model_type"})
        vit.num_hidden_layers -= 1  # the trainer leaves out the last layer (vit_select_layer -2)
        vit.rope = False
        parameters = self.original.autoencoder.AutoEncoderParams(**self.settings.ae)
        top = dict(self.settings.top) if timestep_shift is None else {**self.settings.top, "timestep_shift": timestep_shift}
        config = package.BagelConfig(visual_gen=True, visual_und=True, llm_config=llm, vit_config=vit, vae_config=parameters, **top)
        model = package.Bagel(package.Qwen2ForCausalLM(llm), package.SiglipVisionModel(vit), config).float()
        model.vit_model.vision_model.embeddings.convert_conv2d_to_linear(vit)
        autoencoder = self.original.autoencoder.AutoEncoder(parameters).float()
        for parameter in autoencoder.parameters():
            parameter.requires_grad = False
        return model, autoencoder.eval()

    def _write_configs(self) -> None:
        settings = deepcopy(self.settings)
        self.folder.json("hf/llm_config.json", settings.llm)
        self.folder.json("hf/vit_config.json", settings.vit)
        note = "tiny stand-in values; the reference hard-codes the autoencoder's and takes the rest from CLI flags"
        self.folder.json("hf/tiny_extra.json", {"ae": settings.ae, "top": settings.top, "note": note})
        self.folder.json("hf/config.json", {
            "model_type": "bagel", "architectures": ["Bagel"], "visual_gen": True, "visual_und": True, "llm_config": settings.llm,
            "vit_config": settings.vit, "vae_config": {"z_channels": settings.ae["z_channels"], "downsample": settings.ae["downsample"]},
            **settings.top,
        })  # fmt: skip


@torch.no_grad()
def fill(module: nn.Module, seed: int) -> None:
    """Give every trained parameter values of its own that bf16 holds exactly, in the order of their names.

    Norms are near 1, biases small, embeddings and head large enough that argmax has a margin, and matrices keep the scale of their inputs.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(module.named_parameters()):
        if name.endswith(_TABLE):
            continue
        noise = torch.randn(parameter.shape, generator=generator)
        if "norm" in name and name.endswith("weight"):
            values = 1 + 0.1 * noise
        elif name.endswith("bias"):
            values = 0.05 * noise
        elif "embed_tokens" in name or "position_embedding" in name:
            values = 0.3 * noise
        elif "lm_head" in name:
            values = 0.6 * noise / math.sqrt(parameter.shape[1])
        else:
            values = 0.8 * noise / math.sqrt(parameter[0].numel())
        parameter.copy_(_rounded(values))


def _rounded(values: Tensor) -> Tensor:
    return values.to(torch.bfloat16).float()
