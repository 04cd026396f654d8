# SPDX-License-Identifier: Apache-2.0
"""Generation against the recorded cases of the original: every logit, latent, cache entry and pixel, with its own noise."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from megatron_bagel.data.transforms import TransformArgs, decode_rgb, output_size
from megatron_bagel.inference.batch.requests import Observers, Request, answer
from megatron_bagel.inference.core.context import Context, GuidedContext
from megatron_bagel.inference.core.engine import Engine
from megatron_bagel.inference.core.guidance import Guidance, time_grid
from megatron_bagel.inference.core.image import generate_latents
from megatron_bagel.inference.core.image_sampling import ImageSampling
from megatron_bagel.inference.core.sampling import TextSampling
from tools.golden_common import CaseResult, Comparison, present

# What the recorded cases were asked; the files hold the answers and the settings, not the questions.
T2I_PROMPT = "a photo of a red circle on a green background."
EDIT_PROMPT = "make the square blue"
TEXT_CASES: dict[str, tuple[str | int, ...]] = {
    "text_only_greedy": ("describe the picture",),
    "vlm_greedy": (0, "what is shown in the image?"),
    "vlm_two_images_greedy": (0, "and", 1, "what is different?"),
    "vlm_think_greedy": (0, "how many shapes are there?"),
}
VAE_SIDES, VIT_SIDES = (48, 32), (56, 28)


class RecordedNoise:
    """The noise the original drew in a case, in its order."""

    def __init__(self, initial: Tensor | None, posterior: Sequence[Tensor]) -> None:
        self._initial = initial
        self._posterior = list(posterior)

    def initial(self, shape: tuple[int, ...]) -> Tensor:
        if self._initial is None or tuple(self._initial.shape) != tuple(shape):
            raise ValueError(f"the case has no recorded start noise of shape {list(shape)}")
        return self._initial

    def posterior(self, shape: tuple[int, ...]) -> Tensor:
        return self._posterior.pop(0).reshape(shape)

    def text(self) -> np.random.Generator:
        return np.random.default_rng(0)  # never read: recorded texts are greedy


@dataclass
class _Trace:
    """Observers that keep what they see."""

    logits: list[Tensor] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    x_t: list[Tensor] = field(default_factory=list)
    v_t: list[Tensor] = field(default_factory=list)

    def observers(self) -> Observers:
        return Observers(lambda number, logits: self.logits.append(logits), self._step)

    def _step(self, step: int, t: float, x_t: Tensor, v_t: Tensor) -> None:
        self.times.append(t)
        self.x_t.append(x_t)
        self.v_t.append(v_t)


def golden_engine(model: Any) -> Engine:
    """The recorded cases' image transforms around ``model``: an ``Engine``, or anything with its module attributes."""
    arch = model.arch
    return Engine(
        model.decoder,
        model.vision_tower,
        model.autoencoder,
        model.tokenizer,
        arch,
        TransformArgs(*VAE_SIDES, arch.vae_token_pixels),
        TransformArgs(*VIT_SIDES, arch.vit.patch_size),
    )


def run_infer_cases(goldens: Path, model: Any) -> list[CaseResult]:
    """Every case of ``infer/infer.json``; the TaylorSeer approximation is reported as not covered.

    ``model`` is fp32 and has ``decoder``, ``vision_tower``, ``autoencoder``, ``tokenizer`` and ``arch``.
    """
    cases = json.loads((goldens / "infer" / "infer.json").read_text(encoding="utf-8"))
    tensors = load_file(goldens / "infer" / "infer.safetensors")
    images = [decode_rgb((goldens / "raw_data" / "vlm" / "images" / f"{i}.png").read_bytes()) for i in range(2)]
    engine = golden_engine(model)
    results = []
    for name, case in cases.items():
        if "taylorseer" in name:
            results.append(CaseResult(f"infer/{name}", 0.0, 0.0, True, "not covered: TaylorSeer is not implemented"))
        elif name in TEXT_CASES:
            results.append(text_case(engine, name, case, tensors, images))
        elif name == "context":
            results.append(context_case(engine, case, tensors, images))
        elif name == "batch2":
            results.append(batch_case(engine, case, tensors))
        elif "kwargs" in case:
            results.append(image_case(engine, name, case, tensors, images))
        else:
            results.append(CaseResult(f"infer/{name}", float("nan"), 0.0, False, "a case this checker does not know"))
    return results


def text_case(engine: Engine, name: str, case: dict[str, Any], tensors: dict[str, Tensor], images: Sequence[Image.Image]) -> CaseResult:
    """Greedy text: all logits, the chosen ids, the decoded text."""
    trace, count = _Trace(), len(case["token_ids"])
    terms = tuple(images[term] if isinstance(term, int) else term for term in TEXT_CASES[name])
    system = case.get("system_prompt_ids")
    request = Request(terms, "text", think=system is not None, system_prompt=system)
    # One token more than recorded: the original also computes the logits after the last token it keeps.
    sampling = TextSampling(max_length=count + 1)
    (made,) = answer(engine, [request], [RecordedNoise(None, ())], sampling, ImageSampling(), trace.observers())
    text = present(made.text, "text")
    check = Comparison(f"infer/{name}")
    check.same("token ids", list(text.ids[:count]), case["token_ids"])
    check.close("logits", torch.stack(trace.logits), tensors[f"{name}.logits"])
    check.same("argmax", [int(row.argmax()) for row in trace.logits], case["logits_argmax"])
    opening, closing = (engine.tokenizer.decode([i]) for i in (engine.tokenizer.bos, engine.tokenizer.eos))
    check.same("text", engine.tokenizer.decode(text.ids[:count]).split(closing)[0].split(opening)[1], case["text"])
    return check.result()


def image_case(engine: Engine, name: str, case: dict[str, Any], tensors: dict[str, Tensor], images: Sequence[Image.Image]) -> CaseResult:
    """A drawn or edited picture: times, scales, norms of every step, first velocity, last latents, pixels."""
    kwargs, trace = case["kwargs"], _Trace()
    guidance = _guidance(kwargs, kwargs["cfg_renorm_type"], kwargs["cfg_renorm_min"])
    sampling = ImageSampling(kwargs["num_timesteps"], kwargs["timestep_shift"], guidance)
    think = bool(kwargs.get("think"))
    terms, size = ((T2I_PROMPT,), tuple(kwargs["image_shapes"])) if "image_shapes" in kwargs else ((images[0], EDIT_PROMPT), None)
    request = Request(terms, "image", think, case.get("system_prompt_ids"), size)
    posterior = [tensors[key] for key in sorted(tensors) if key.startswith(f"{name}.vae_posterior_noise_")]
    noise = RecordedNoise(tensors[f"{name}.init_noise"], posterior)
    text = TextSampling(max_length=kwargs.get("max_think_token_n", 1))
    result = answer(engine, [request], [noise], text, sampling, trace.observers())[0]
    check = Comparison(f"infer/{name}")
    check.norms("timesteps", trace.times, case["timesteps"])
    scales = [guidance.scales_at(t) for t in trace.times]
    check.same("text scales", [s[0] for s in scales], case["cfg_text_used"])
    check.same("image scales", [s[1] for s in scales], case["cfg_img_used"])
    check.norms("norms of x_t", [x.norm() for x in trace.x_t], case["x_t_norm"])
    check.norms("norms of v_t", [v.norm() for v in trace.v_t], case["v_t_norm"])
    check.close("first velocity", trace.v_t[0], tensors[f"{name}.v_first"])
    check.close("last latents", result.latents, tensors[f"{name}.final_latent"])
    check.norms("norm of the last latents", present(result.latents, "latents").norm(), case["final_norm"])
    check.levels("pixels", result.image, tensors[f"{name}.image_u8"])
    check.same("picture size", list(present(result.image, "picture").shape[:2]), case["image_hw"])
    check.same("texts", [present(result.thought, "thought").text] if think else [], case["text"])
    return check.result()


def context_case(engine: Engine, case: dict[str, Any], tensors: dict[str, Tensor], images: Sequence[Image.Image]) -> CaseResult:
    """Keys and values after an image read both ways and a text; [tokens, kv_heads, head_dim] of the recorded layers."""
    image = engine.resize(images[0])
    check = Comparison("infer/context")
    check.same("resized image", list(image.size), case["resized_wh"])
    with torch.no_grad():
        contexts = engine.add_latents([Context()], [image], [tensors["context.vae_posterior_noise"][0]])
        contexts = engine.add_features(contexts, [image])
        (context,) = engine.add_text(contexts, [engine.tokenizer.encode(EDIT_PROMPT)])
    check.same("cached tokens", [context.length], case["kv_lens"])
    check.same("next position", [context.position], case["ropes"])
    for key in sorted(k for k in tensors if k.startswith(("context.k", "context.v")) and k[9:].isdigit()):
        cache = context.caches[int(key[9:]) + 1]
        # Ours keeps an image's border tokens before its latents, the original around them; as a set of pairs they are equal.
        got = cache.keys if key[8] == "k" else cache.values
        check.close(key, got[sequence_order(engine, image)], tensors[key])
    return check.result()


def sequence_order(engine: Engine, image: Image.Image) -> list[int]:
    """Cache rows of [image by VAE, image by ViT, text] in sequence order, as a list of row numbers for ``context_case``."""
    rows, columns = engine.latent_grid(*reversed(image.size))
    latents = rows * columns
    total = latents + 2 + _vit_tokens(engine, image) + 2 + len(engine.tokenizer.encode(EDIT_PROMPT)) + 2
    return [0, *range(2, latents + 2), 1, *range(latents + 2, total)]


def batch_case(engine: Engine, case: dict[str, Any], tensors: dict[str, Tensor]) -> CaseResult:
    """Two prompts in one call, whose global norm couples them in the original, and the first of them alone."""
    guidance = Guidance(case["cfg_text_scale"], 1.0, tuple(case["cfg_interval"]), 0.0, case["renorm"])
    sampling = ImageSampling(case["num_timesteps"], case["timestep_shift"], guidance, couple_batch=True)
    prompts = [engine.tokenizer.encode(prompt) for prompt in case["prompts"]]
    with torch.no_grad():
        mains = engine.add_text([Context() for _ in prompts], prompts)
    contexts = [GuidedContext(main, Context(), main) for main in mains]
    grid = engine.latent_grid(*case["image_hw"])
    noise = list(tensors["batch2.init_noise"].split(grid[0] * grid[1]))
    both = generate_latents(engine, contexts, [grid] * 2, noise, sampling)
    alone = generate_latents(engine, contexts[:1], [grid], noise[:1], sampling)
    check = Comparison("infer/batch2")
    check.norms("timesteps", time_grid(case["num_timesteps"], case["timestep_shift"])[0], 1.0)
    for number, latents in enumerate(both):
        check.close(f"latents of prompt {number}", latents, tensors[f"batch2.latent_{number}"])
    check.close("latents of prompt 0 alone", alone[0], tensors["batch1.latent_0"])
    return check.result()


def _vit_tokens(engine: Engine, image: Image.Image) -> int:
    width, height = output_size(engine.vit_transform, *image.size)
    patch = present(engine.arch.vit, "ViT").patch_size
    return (width // patch) * (height // patch)


def _guidance(kwargs: dict[str, Any], renorm_type: str, renorm_min: float) -> Guidance:
    return Guidance(kwargs["cfg_text_scale"], kwargs["cfg_img_scale"], tuple(kwargs["cfg_interval"]), renorm_min, renorm_type)
