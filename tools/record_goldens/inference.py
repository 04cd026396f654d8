# SPDX-License-Identifier: Apache-2.0
"""Records the original's generation through its own inferencer: answers, pictures, edits, the cache, and two prompts in one call."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tools.record_goldens.files import GoldenFolder
from tools.record_goldens.generation_cases import EDIT, EDIT_CASES, PICTURE_CASES, PROMPT, TEXT_CASES
from tools.record_goldens.model import ModelSource
from tools.record_goldens.original import Original

_TEXT_SEED, _PICTURE_SEED, _BATCH_SEED = 5, 6, 9
_SECOND_PROMPT = "two small circles"


class InferenceRecorder:
    """Records ``infer/``."""

    def __init__(self, original: Original, models: ModelSource, folder: GoldenFolder) -> None:
        self.original, self.models, self.folder = original, models, folder
        self.model, autoencoder = models.load()
        self.model.eval()
        self.tokenizer, self.special, _ = models.tokenizer()
        transform = original.transforms.ImageTransform
        self.for_vae = transform(48, 32, 16)
        self.inferencer = original.inferencer.InterleaveInferencer(
            self.model, autoencoder, self.tokenizer, self.for_vae, transform(56, 28, 14), self.special
        )
        self.results: dict[str, Any] = {}
        self.tensors: dict[str, Tensor] = {}

    def record(self) -> None:
        """Run every case and write the results."""
        for name, (inputs, tokens, think) in TEXT_CASES.items():
            self._text(name, [self._opened(entry) for entry in inputs], tokens, think)
        for name, settings in PICTURE_CASES.items():
            self._picture(name, [PROMPT], settings)
        for name, settings in EDIT_CASES.items():
            self._picture(name, [self._image(0), EDIT], settings)
        self._approximated()
        # The approximation leaves its marks on the model, so the rest gets a new one.
        self.model, _ = self.models.load()
        self.model.eval()
        self.inferencer.model = self.model
        self._context()
        self._two_prompts()
        self.folder.tensors("infer/infer.safetensors", self.tensors)
        self.folder.json("infer/infer.json", self.results)

    def _image(self, number: int) -> Image.Image:
        return Image.open(self.folder.root / f"raw_data/vlm/images/{number}.png")

    def _opened(self, entry: str | int) -> Any:
        return self._image(entry) if isinstance(entry, int) else entry

    def _text(self, name: str, inputs: list[Any], tokens: int, think: bool) -> None:
        """Record the most likely answer: its tokens, the logits, and the margin of every choice."""
        logits: list[Tensor] = []
        chosen: list[Tensor] = []
        generate = self.model.generate_text

        def kept(*args: Any, **kwargs: Any) -> Tensor:
            chosen.append(generate(*args, **kwargs))
            return chosen[-1]

        hook = self.model.language_model.lm_head.register_forward_hook(lambda module, ins, output: logits.append(output.detach().clone()))
        self.model.generate_text = kept
        try:
            with self.original.noise.fresh(_TEXT_SEED):
                text = self.inferencer.interleave_inference(
                    inputs, think=think, understanding_output=True, do_sample=False, max_think_token_n=tokens
                )[0]  # fmt: skip
        except IndexError as error:  # the original crashes when it chooses a row that pads the vocabulary
            text = f"<error {error!r}>"
        finally:
            del self.model.generate_text
            hook.remove()
        best = [step[0].sort(descending=True).values for step in logits]
        self.results[name] = {
            "token_ids": chosen[0][:, 0].tolist(), "text": text, "logits_argmax": [int(step.argmax(-1)) for step in logits],
            "top1_minus_top2": [float(step[0] - step[1]) for step in best],
        }  # fmt: skip
        if think:
            self.results[name]["system_prompt_ids"] = self.tokenizer.encode(self.original.inferencer.VLM_THINK_SYSTEM_PROMPT)
        self.tensors[f"{name}.logits"] = torch.cat(logits)

    def _picture(self, name: str, inputs: list[Any], settings: dict[str, Any]) -> None:
        """Record a picture: its noise, the guidance and the velocities of its steps, its latent and its pixels."""
        steps: list[dict[str, Any]] = []
        latents: list[tuple[Tensor, Any]] = []
        flow, decode = self.model._forward_flow, self.inferencer.decode_image

        def watched_flow(**kwargs: Any) -> Tensor:
            velocity = flow(**kwargs)
            steps.append({
                "x_t": kwargs["x_t"].clone(), "v": velocity.clone(), "t": float(kwargs["timestep"][0]), "text": kwargs["cfg_text_scale"],
                "image": kwargs["cfg_img_scale"],
            })  # fmt: skip
            return velocity

        def watched_decode(latent: Tensor, shape: Any) -> Any:
            latents.append((latent, shape))
            return decode(latent, shape)

        self.model._forward_flow, self.inferencer.decode_image = watched_flow, watched_decode
        try:
            with self.original.noise.fresh(_PICTURE_SEED) as drawn:
                outputs = self.inferencer.interleave_inference(inputs, **settings)
        finally:
            del self.model._forward_flow, self.inferencer.decode_image
        *posteriors, initial = drawn
        self.tensors |= {f"{name}.vae_posterior_noise_{number}": noise for number, noise in enumerate(posteriors)}
        self.tensors |= {
            f"{name}.init_noise": initial, f"{name}.v_first": steps[0]["v"], f"{name}.final_latent": latents[0][0],
            f"{name}.image_u8": torch.from_numpy(np.array(outputs[-1])).contiguous(),
        }  # fmt: skip
        self.results[name] = {
            "kwargs": dict(settings), "image_hw": list(latents[0][1]), "timesteps": [step["t"] for step in steps],
            "cfg_text_used": [step["text"] for step in steps], "cfg_img_used": [step["image"] for step in steps],
            "x_t_norm": [float(step["x_t"].norm()) for step in steps], "v_t_norm": [float(step["v"].norm()) for step in steps],
            "final_norm": float(latents[0][0].norm()), "text": [output for output in outputs if isinstance(output, str)],
        }  # fmt: skip
        if settings.get("think"):
            self.results[name]["system_prompt_ids"] = self.tokenizer.encode(self.original.inferencer.GEN_THINK_SYSTEM_PROMPT)

    def _approximated(self) -> None:
        """Record the approximation of steps, and the same picture without it afterwards, which the original may not survive."""
        plain = PICTURE_CASES["t2i_nocfg"]
        self._picture("t2i_taylorseer", [PROMPT], {**plain, "cfg_text_scale": 4.0, "num_timesteps": 14, "enable_taylorseer": True})
        name = "t2i_nocfg_after_taylorseer"
        try:
            self._picture(name, [PROMPT], plain)
            apart = self.tensors[f"{name}.final_latent"] - self.tensors["t2i_nocfg.final_latent"]
            self.results[name]["max_abs_diff_vs_t2i_nocfg"] = float(apart.abs().max())
        except (AttributeError, KeyError, TypeError, RuntimeError) as error:  # what the original raised is what is recorded
            self.results[name] = {"error": repr(error)[:300]}
        self.tensors = {key: value for key, value in self.tensors.items() if not key.startswith(name)}

    def _context(self) -> None:
        """Record the cache of the first and the last layer after an image and an instruction."""
        context = self.inferencer.init_gen_context()
        with self.original.noise.fresh(_PICTURE_SEED) as drawn:
            image = self.for_vae.resize_transform(self.original.data_utils.pil_img2rgb(self._image(0)))
            context = self.inferencer.update_context_text(EDIT, self.inferencer.update_context_image(image, context))
        self.results["context"] = {"kv_lens": context["kv_lens"], "ropes": context["ropes"], "resized_wh": list(image.size)}
        cache = context["past_key_values"]
        for layer in (0, self.models.settings.llm["num_hidden_layers"] - 1):
            self.tensors |= {f"context.k{layer}": cache.key_cache[layer], f"context.v{layer}": cache.value_cache[layer]}
        self.tensors["context.vae_posterior_noise"] = drawn[0]

    def _two_prompts(self) -> None:
        """Record two prompts in one call, which global renormalisation couples, and the first of them alone."""
        noise, both = self._together([PROMPT, _SECOND_PROMPT])
        tokens = len(noise) // 2
        _, alone = self._together([PROMPT], noise[:tokens])
        self.tensors |= {"batch2.init_noise": noise, "batch2.latent_0": both[0], "batch2.latent_1": both[1], "batch1.latent_0": alone[0]}
        self.results["batch2"] = {
            "prompts": [PROMPT, _SECOND_PROMPT], "image_hw": [32, 32], "num_timesteps": 4, "cfg_text_scale": 4.0, "cfg_interval": [0, 1],
            "timestep_shift": 3.0, "renorm": "global",
            "max_abs_diff_of_sample0_alone_vs_in_batch": float((both[0] - alone[0]).abs().max()),
        }  # fmt: skip

    def _together(self, prompts: list[str], noise: Tensor | None = None) -> tuple[Tensor, Any]:
        """Return the noise and the latents of prompts that are drawn in one call of the model."""
        model, count, sizes = self.model, len(prompts), [(32, 32)] * len(prompts)
        layers, cache_of = self.models.settings.llm["num_hidden_layers"], self.original.decoder.NaiveCache
        texts, lengths, ropes = model.prepare_prompts([0] * count, [0] * count, prompts, self.tokenizer, self.special)
        cache = model.forward_cache_update_text(cache_of(layers), **texts)
        torch.manual_seed(_BATCH_SEED)
        inputs = model.prepare_vae_latent(lengths, ropes, sizes, self.special)
        if noise is not None:
            inputs["packed_init_noises"] = noise
        plain = model.prepare_vae_latent_cfg([0] * count, [0] * count, sizes)
        guidance = {
            "cfg_text_packed_position_ids": plain["cfg_packed_position_ids"], "cfg_text_key_values_lens": plain["cfg_key_values_lens"],
            "cfg_text_packed_query_indexes": plain["cfg_packed_query_indexes"],
            "cfg_text_packed_key_value_indexes": plain["cfg_packed_key_value_indexes"],
        }  # fmt: skip
        latents = model.generate_image(
            past_key_values=cache, num_timesteps=4, cfg_text_scale=4.0, cfg_interval=[0, 1.0], cfg_renorm_min=0.0, timestep_shift=3.0,
            cfg_text_past_key_values=cache_of(layers), **guidance, **inputs,
        )  # fmt: skip
        return inputs["packed_init_noises"], latents
