# SPDX-License-Identifier: Apache-2.0
"""Records the original's training: losses and gradients of every case, hidden states, frozen parts, other layer kinds."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tools.record_goldens.data import Batch, read_batch
from tools.record_goldens.files import GoldenFolder
from tools.record_goldens.model import ModelSource
from tools.record_goldens.optimizer import learning_rates, optimizer_case
from tools.record_goldens.original import Original
from tools.record_goldens.parameters import hidden_positions, kept_gradients, two_rank_gradients
from tools.record_goldens.step import Trainer, gradient_stats, gradients, losses, numbers, token_totals, watched

_FREEZE_CASES = ("freeze_und", "freeze_llm", "freeze_vit", "freeze_llm+freeze_vit")
_OTHER_LAYERS = ("Qwen2MoEDecoderLayer", "Qwen2DecoderLayer")


class TrainingRecorder:
    """Records ``train/``. ``results`` becomes ``train/expected.json``."""

    def __init__(self, original: Original, models: ModelSource, folder: GoldenFolder) -> None:
        self.original, self.models, self.folder = original, models, folder
        self.trainer = Trainer(original)
        self.first, self.second = read_batch(folder, "flex_0"), read_batch(folder, "flex_1")
        self.results: dict[str, Any] = {}

    def record(self) -> None:
        """Run every case and write the results."""
        self._one_rank()
        self._two_ranks()
        self._accumulation()
        for name in _FREEZE_CASES:
            self._frozen(name)
        model, autoencoder = self.models.load(timestep_shift=3.0)
        self.results["timestep_shift_3"] = self._losses_only(model, autoencoder)
        for kind in _OTHER_LAYERS:
            self._other_layers(kind)
        for name in ("t2i_only", "vlm_only"):
            self._one_kind(name)
        self._interleaved()
        model, autoencoder = self.models.load()
        model.language_model.init_moe()
        self.results["copy_init_moe"] = self._losses_only(model, autoencoder)
        for name, settings in (
            ("optim_base", {"lr": 1e-3, "clip": 1.0, "warm": 0, "ema": 0.99}),
            ("optim_warmup", {"lr": 1e-3, "clip": 0.5, "warm": 2, "ema": 0.9999}),
        ):
            self.results[name] = optimizer_case(name, settings, self.models, self.trainer, (self.first, self.second), self.folder)
        self.results["padding_leak"] = self._padding_leak()
        self.results["lr_used_at_step"] = learning_rates()
        self.results["flops"] = self._flops(model)
        self.folder.json("train/expected.json", self.results)

    def _one_rank(self) -> None:
        """Record the first batch: losses, hidden states, gradients, the nested masks, FlexAttention, and weighted losses."""
        model, autoencoder = self.models.load()
        with watched(model) as seen:
            done = self.trainer.run(model, autoencoder, self.first, "flex_0")
        (result,), (reweighted,) = losses([done]), losses([done], reweight=True)
        result["loss"].backward()
        ce, mse = present(done.output["ce"]), present(done.output["mse"])
        self.results["flex_0"] = {"losses": numbers(result), "losses_reweighted": numbers(reweighted), **token_totals([done])}
        self.folder.tensors("train/flex_0_expected.safetensors", {
            "ce": ce, "mse": mse, "padded_latent": present(done.latents), **self.trainer.noise["flex_0"], "vit_out": seen["vit_out"],
            "connector_out": seen["connector_out"], "final_hidden": seen["final"],
        })  # fmt: skip
        tokens = hidden_positions(done.inputs, self.models.tokenizer()[1])
        rows = torch.tensor(list(tokens.values()))
        states = {name: value[rows] for name, value in seen.items() if name in ("input", "final") or name.startswith("layer_")}
        self.folder.tensors("train/flex_0_hidden.safetensors", states)
        self.results["hidden_tokens"] = tokens
        self.results["flex_0"]["grads"] = gradient_stats(model)
        found = {name: value.clone() for name, value in gradients(model).items()}
        self.folder.tensors("train/flex_0_grads.safetensors", {name: found[name] for name in kept_gradients(model)})
        self._nested(model, autoencoder, ce, mse, found)
        with self.original.real_flex_attention(), torch.no_grad():
            flex = self.trainer.run(model, autoencoder, self.first, "flex_0").output
        self.results["flex_eager_check"] = {
            "max_abs_diff_ce": largest(present(flex["ce"]) - ce), "max_abs_diff_mse": largest(present(flex["mse"]) - mse),
        }  # fmt: skip
        model.zero_grad(set_to_none=True)
        again = self.trainer.run(model, autoencoder, self.first, "flex_0")
        (weighted,) = losses([again], reweight=True, ce_weight=0.25, mse_weight=1.5)
        weighted["loss"].backward()
        self.results["flex_0_reweight_ce0.25_mse1.5"] = {
            "losses": numbers(weighted), "grads": {"total_norm": gradient_stats(model)["total_norm"]},
        }  # fmt: skip

    def _nested(self, model: Any, autoencoder: Any, ce: Tensor, mse: Tensor, found: dict[str, Tensor]) -> None:
        """Record the first batch under one dense mask per sample, as the original runs without FlexAttention."""
        model.zero_grad(set_to_none=True)
        nested: Batch = {key: value for key, value in self.first.items() if key not in ("split_lens", "attn_modes")}
        nested["sample_lens"] = self.first["sample_lens"][:-1]  # the last one is the padding of FlexAttention
        masks = self.folder.read_tensors("batches/nested_0_masks.safetensors")
        allowed = [masks[f"mask_{number}"] for number in range(len(masks))]
        nested["nested_attention_masks"] = [torch.zeros(mask.shape).masked_fill(mask == 0, float("-inf")) for mask in allowed]
        done = self.trainer.run(model, autoencoder, nested, "flex_0")
        (result,) = losses([done])
        result["loss"].backward()
        self.results["nested_0"] = {
            "losses": numbers(result),
            "max_abs_diff_ce": largest(present(done.output["ce"]) - ce), "max_abs_diff_mse": largest(present(done.output["mse"]) - mse),
            "max_abs_grad_diff": max(largest(value - found[name]) for name, value in gradients(model).items()),
        }  # fmt: skip

    def _two_ranks(self) -> None:
        """Record two ranks with a batch each: losses over both, gradients averaged as FSDP does."""
        model, autoencoder = self.models.load()
        passes = [self.trainer.run(model, autoencoder, batch, name) for batch, name in ((self.first, "flex_0"), (self.second, "flex_1"))]
        one, other = losses(passes)
        ((one["loss"] + other["loss"]) / 2).backward()
        reweighted = [numbers(result) for result in losses(passes, reweight=True)]
        self.results["two_ranks"] = {
            "rank0": numbers(one), "rank1": numbers(other),
            "logged_ce": (float(one["ce"]) + float(other["ce"])) / 2, "logged_mse": (float(one["mse"]) + float(other["mse"])) / 2,
            "reweighted": {"rank0": reweighted[0], "rank1": reweighted[1]}, "grads_averaged": gradient_stats(model), **token_totals(passes),
        }  # fmt: skip
        second = passes[1]
        self.folder.tensors("train/flex_1_expected.safetensors", {
            "ce": present(second.output["ce"]), "mse": present(second.output["mse"]), "padded_latent": present(second.latents),
            **self.trainer.noise["flex_1"],
        })  # fmt: skip
        self.folder.tensors("train/two_rank_grads.safetensors", {name: gradients(model)[name] for name in two_rank_gradients(model)})

    def _accumulation(self) -> None:
        """Record two micro-steps on one rank, each normalised by itself."""
        model, autoencoder = self.models.load()
        micro = []
        for batch, name in ((self.first, "flex_0"), (self.second, "flex_1")):
            (result,) = losses([self.trainer.run(model, autoencoder, batch, name)])
            (result["loss"] / 2).backward()
            micro.append(numbers(result))
        self.results["grad_accum_2"] = {"micro": micro, "total_norm": gradient_stats(model)["total_norm"]}

    def _frozen(self, name: str) -> None:
        """Record a step with parts that the trainer freezes."""
        model, autoencoder = self.models.load(freeze_und=name == "freeze_und")
        for part, module in (("freeze_llm", model.language_model), ("freeze_vit", model.vit_model)):
            if part in name:
                module.requires_grad_(False)
        (result,) = losses([self.trainer.run(model, autoencoder, self.first, "flex_0")])
        result["loss"].backward()
        stats = gradient_stats(model)
        self.results[name] = {
            "losses": numbers(result), "total_norm": stats["total_norm"],
            "nonzero_grad": {key: value for key, value in stats["per_param"].items() if value["norm"] > 0},
            "exactly_zero_grad": [key for key, value in stats["per_param"].items() if value["norm"] == 0],
            "grad_none": stats["grad_none_though_requires_grad"],
        }  # fmt: skip

    def _other_layers(self, kind: str) -> None:
        """Record a step with another layer kind."""
        model, autoencoder = self.models.load(layer_module=kind)
        (result,) = losses([self.trainer.run(model, autoencoder, self.first, "flex_0")])
        result["loss"].backward()
        doubled = [name for name, _ in model.named_parameters() if "moe_gen" in name and (".layers." not in name or ".layers.0." in name)]
        self.results[kind] = {"losses": numbers(result), "total_norm": gradient_stats(model)["total_norm"], "moe_gen_params": doubled}

    def _one_kind(self, name: str) -> None:
        """Record a batch with one kind of data alone."""
        batch = read_batch(self.folder, name)
        model, autoencoder = self.models.load()
        model.config.visual_und, model.config.visual_gen = name == "vlm_only", name == "t2i_only"
        done = self.trainer.run(model, autoencoder, batch, name)
        (result,) = losses([done])
        result["loss"].backward()
        stats = gradient_stats(model)
        self.results[name] = {
            "losses": numbers(result), "total_norm": stats["total_norm"], "sequence_length": batch["sequence_length"],
            "grad_none": stats["grad_none_though_requires_grad"],
        }  # fmt: skip
        kept = {key: value for key, value in done.output.items() if value is not None}
        if done.latents is not None:
            kept |= {"padded_latent": done.latents, **self.trainer.noise[name]}
        self.folder.tensors(f"train/{name}_expected.safetensors", kept)

    def _interleaved(self) -> None:
        """Record the pack of interleaved samples."""
        model, autoencoder = self.models.load()
        done = self.trainer.run(model, autoencoder, read_batch(self.folder, "interleave"), "interleave")
        (result,) = losses([done])
        result["loss"].backward()
        stats = gradient_stats(model)
        norms = {name: value["norm"] for name, value in stats["per_param"].items()}
        self.results["interleave"] = {
            "losses": numbers(result), **token_totals([done]), "total_norm": stats["total_norm"], "grad_norms": norms,
        }  # fmt: skip
        self.folder.tensors("train/interleave_expected.safetensors", {
            "ce": present(done.output["ce"]), "mse": present(done.output["mse"]), "padded_latent": present(done.latents),
            **self.trainer.noise["interleave"],
        })  # fmt: skip

    @torch.no_grad()
    def _losses_only(self, model: Any, autoencoder: Any) -> dict[str, float]:
        (result,) = losses([self.trainer.run(model, autoencoder, self.first, "flex_0")])
        return numbers(result)

    @torch.no_grad()
    def _padding_leak(self) -> dict[str, Any]:
        """Record how far the padding of a pack's images changes the latents of its smallest one."""
        _, autoencoder = self.models.load()
        stride = self.models.settings.ae["downsample"] * self.models.settings.top["latent_patch_size"]
        channels, images = self.models.settings.ae["z_channels"], self.first["padded_images"]
        sizes = [(rows * stride, columns * stride) for rows, columns in self.first["patchified_vae_latent_shapes"]]
        smallest = min(range(len(sizes)), key=lambda number: sizes[number][0] * sizes[number][1])
        height, width = sizes[smallest]
        down = self.models.settings.ae["downsample"]
        image = images[smallest : smallest + 1]
        padded = autoencoder.encoder(image)[:, :channels, : height // down, : width // down]
        own = autoencoder.encoder(image[:, :, :height, :width])[:, :channels]
        return {
            "image": smallest, "own_size": [height, width], "padded_to": list(images.shape[2:]), "latent_mean_abs": float(own.abs().mean()),
            "max_abs_diff": largest(padded - own), "mean_abs_diff": float((padded - own).abs().mean()),
        }  # fmt: skip

    def _flops(self, model: Any) -> dict[str, float]:
        """Record the coefficients of the trainer's MFU, and its work for the first batch."""
        per_token, per_pair = self.original.trainer_function("qwen2_flop_coefficients")(model.language_model.config)
        tokens, squares = self.first["sequence_length"], sum(length * length for length in self.first["sample_lens"])
        return {
            "dense_token_factor": per_token, "attn_factor": per_pair, "flex_0_tokens": tokens, "flex_0_sum_len2": squares,
            "flex_0_flops": per_token * tokens + per_pair * squares,
        }  # fmt: skip


def present(tensor: Tensor | None) -> Tensor:
    """Return a tensor that the batch must have given."""
    if tensor is None:
        raise ValueError("the batch gave no such tensor")
    return tensor


def largest(difference: Tensor) -> float:
    """Return the largest absolute value."""
    return float(difference.abs().max())
