# SPDX-License-Identifier: Apache-2.0
"""Generation cases in the goldens' format, of another model size, recorded from this code: the checker reads sizes from files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from megatron_bagel.inference.batch.requests import Observers, Request, answer
from megatron_bagel.inference.core.engine import Engine
from megatron_bagel.inference.core.guidance import Guidance
from megatron_bagel.inference.core.image_sampling import ImageSampling
from megatron_bagel.inference.core.sampling import TextSampling
from tools.golden_infer import EDIT_PROMPT, T2I_PROMPT, TEXT_CASES, RecordedNoise, golden_engine

KWARGS = {"num_timesteps": 4, "cfg_interval": [0.0, 1.0], "timestep_shift": 2.0, "cfg_renorm_min": 0.0, "cfg_text_scale": 4.0}
IMAGE_CASES: dict[str, dict[str, Any]] = {
    "t2i_cfg4_global": {**KWARGS, "cfg_renorm_type": "global", "cfg_img_scale": 1.0, "image_shapes": [24, 40]},
    "edit_text_channel": {**KWARGS, "cfg_renorm_type": "text_channel", "cfg_img_scale": 2.0},
}


def write_recorded_cases(folder: Path, model: Any) -> Path:
    """Write pictures, questions' answers and drawings of ``model`` under ``folder``; needs process groups. Returns ``folder``."""
    images = [Image.fromarray(np.random.default_rng(n).integers(0, 256, (30, 50 - n, 3), dtype=np.uint8)) for n in range(2)]
    (folder / "raw_data/vlm/images").mkdir(parents=True)
    for number, image in enumerate(images):
        image.save(folder / f"raw_data/vlm/images/{number}.png")
    engine, cases, tensors = golden_engine(model), {}, {}
    for name in ("text_only_greedy", "vlm_two_images_greedy"):
        cases[name], tensors[f"{name}.logits"] = _text(engine, name, images)
    for name, kwargs in IMAGE_CASES.items():
        cases[name], found = _picture(engine, kwargs, images[0])
        tensors |= {f"{name}.{key}": value for key, value in found.items()}
    (folder / "infer").mkdir()
    (folder / "infer/infer.json").write_text(json.dumps(cases))
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "infer/infer.safetensors")
    return folder


def _text(engine: Engine, name: str, images: list[Image.Image]) -> tuple[dict[str, Any], torch.Tensor]:
    logits: list[torch.Tensor] = []
    terms = tuple(images[term] if isinstance(term, int) else term for term in TEXT_CASES[name])
    watching = Observers(lambda number, row: logits.append(row), lambda *step: None)
    request, noise = Request(terms, "text"), RecordedNoise(None, ())
    (made,) = answer(engine, [request], [noise], TextSampling(max_length=5), ImageSampling(), watching)
    ids = list(made.text.ids[: len(logits)])
    said = engine.tokenizer.decode(ids).removeprefix(engine.tokenizer.decode([engine.tokenizer.bos]))
    return {"token_ids": ids, "text": said, "logits_argmax": [int(row.argmax()) for row in logits]}, torch.stack(logits)


def _picture(engine: Engine, kwargs: dict[str, Any], image: Image.Image) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    size, draw = kwargs.get("image_shapes"), torch.Generator().manual_seed(5)
    shown = engine.resize(image)
    rows, columns = engine.latent_grid(*(size or (shown.height, shown.width)))
    start = torch.randn(rows * columns, engine.arch.latent_token_dim, generator=draw)
    posterior = [] if size else [torch.randn(engine.posterior_shape(shown), generator=draw) for _ in range(2)]
    steps: list[tuple[float, torch.Tensor, torch.Tensor]] = []
    watching = Observers(lambda *row: None, lambda step, t, x_t, v_t: steps.append((t, x_t, v_t)))
    guidance = Guidance(kwargs["cfg_text_scale"], kwargs["cfg_img_scale"], (0.0, 1.0), 0.0, kwargs["cfg_renorm_type"])
    request = Request((T2I_PROMPT,), size=tuple(size)) if size else Request((image, EDIT_PROMPT))
    noise, sampling = RecordedNoise(start, posterior), ImageSampling(kwargs["num_timesteps"], kwargs["timestep_shift"], guidance)
    (made,) = answer(engine, [request], [noise], TextSampling(max_length=1), sampling, watching)
    times, x_t, v_t = zip(*steps, strict=True)
    case = {
        "kwargs": kwargs, "image_hw": list(made.image.shape[:2]), "timesteps": list(times), "text": [],
        "cfg_text_used": [kwargs["cfg_text_scale"]] * len(times), "cfg_img_used": [kwargs["cfg_img_scale"]] * len(times),
        "x_t_norm": [float(x.norm()) for x in x_t], "v_t_norm": [float(v.norm()) for v in v_t], "final_norm": float(made.latents.norm()),
    }  # fmt: skip
    found = {"init_noise": start, "v_first": v_t[0], "final_latent": made.latents, "image_u8": torch.from_numpy(made.image)}
    return case, found | {f"vae_posterior_noise_{number}": each for number, each in enumerate(posterior)}
