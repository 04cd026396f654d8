# SPDX-License-Identifier: Apache-2.0
"""Load exported folders with the original, strictly, and compute with it what comes after a picture and a question, as JSON.

    python -m tests.servers.original_cpu CHECKOUT OUT.safetensors FOLDER...

It runs in the original's environment (tools/record_goldens/README.md) and builds each model as the original's app.py does. It loads the
weights by the function that app.py calls, ``accelerate.load_checkpoint_and_dispatch``, with ``strict=True``, which app.py leaves out.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from tools.record_goldens.original import Original

QUESTION = "describe the picture"


def picture() -> Image.Image:
    """A picture of one gradient, of a size that no transform changes."""
    row = torch.arange(224).to(torch.uint8)
    return Image.fromarray(torch.stack([row.repeat(224, 1), row.repeat(224, 1).T, row.repeat(224, 1).flip(0)], dim=-1).numpy())


def model_of(original: Original, folder: Path) -> Any:
    """Build the model without weights, from the folder's own settings where app.py fixes those of the released one."""
    from accelerate import init_empty_weights

    package = __import__("modeling.bagel", fromlist=["Bagel"])
    top = json.loads((folder / "config.json").read_text())
    llm = package.Qwen2Config.from_json_file(str(folder / "llm_config.json"))
    vit = package.SiglipVisionConfig.from_json_file(str(folder / "vit_config.json"))
    vit.num_hidden_layers, vit.rope = vit.num_hidden_layers - 1, vit.rope or top.get("vit_rope", False)
    names = ("latent_patch_size", "max_latent_size", "vit_max_num_patch_per_side", "connector_act")
    config = package.BagelConfig(
        visual_gen=True, visual_und=True, llm_config=llm, vit_config=vit, vae_config=SimpleNamespace(**top["vae_config"]),
        **{name: top[name] for name in names},
    )  # fmt: skip
    with init_empty_weights():
        model = package.Bagel(package.Qwen2ForCausalLM(llm), package.SiglipVisionModel(vit), config)
        model.vit_model.vision_model.embeddings.convert_conv2d_to_linear(vit, meta=True)
    return model


def load(model: Any, file: Path) -> dict[str, Any]:
    """Load a file strictly, and return how many tensors it has and which differ from those of the model."""
    from accelerate import load_checkpoint_and_dispatch

    load_checkpoint_and_dispatch(
        model, checkpoint=str(file), device_map={"": "cpu"}, dtype=torch.float32, offload_buffers=True, force_hooks=True, strict=True
    )
    stored, loaded = load_file(file), model.state_dict()
    names = sorted(stored.keys() ^ loaded.keys())
    return {"tensors": len(stored), "names": names, "values": [n for n in stored if not torch.equal(stored[n].float(), loaded[n])]}


def first_logits(original: Original, model: Any, folder: Path) -> torch.Tensor:
    """Return the logits of an answer's first token after a picture and a question."""
    tokenizer, special, _ = original.data_utils.add_special_tokens(original.tokenizer.Qwen2Tokenizer.from_pretrained(str(folder)))
    transform, kept = original.transforms.ImageTransform, []
    inferencer = original.inferencer.InterleaveInferencer(
        model.eval(), None, tokenizer, transform(1024, 224, 16), transform(980, 224, 14), special
    )
    hook = model.language_model.lm_head.register_forward_hook(lambda module, inputs, output: kept.append(output.detach().clone()))
    with original.noise.fresh(0):
        inferencer.interleave_inference([picture(), QUESTION], understanding_output=True, max_think_token_n=1)
    hook.remove()
    return kept[0].reshape(-1)


def main(checkout: Path, out: Path, folders: list[Path]) -> None:
    """Load every folder, write the logits, and print what was loaded."""
    original, report, logits = Original(checkout), {}, {}
    for folder in folders:
        model = model_of(original, folder)
        report[folder.name] = load(model, folder / "ema.safetensors")
        logits[folder.name] = first_logits(original, model, folder)
    save_file(logits, out)
    print(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), [Path(word) for word in sys.argv[3:]])
