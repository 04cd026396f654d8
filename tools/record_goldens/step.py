# SPDX-License-Identifier: Apache-2.0
"""One pass of the original over a recorded batch, its losses as the trainer forms them, and its gradients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tools.record_goldens.data import Batch
from tools.record_goldens.original import NoiseLog, Original, OriginalModel

#: Seeds of the noise of a batch, and of every other.
_NOISE_SEEDS, _OTHER_SEED = {"flex_0": 21, "flex_1": 22}, 23


@dataclass
class Pass:
    """What one batch gave: unreduced losses of the model, weights of its text tokens, its inputs, and its latents."""

    output: dict[str, Tensor | None]
    ce_weights: Tensor | None
    inputs: dict[str, Any]
    latents: Tensor | None


class Trainer:
    """Runs batches. The noise of a batch is drawn once; every later pass gets the same."""

    def __init__(self, original: Original) -> None:
        self._original = original
        self.noise: dict[str, dict[str, Tensor]] = {}

    @property
    def _log(self) -> NoiseLog:
        return self._original.noise

    def run(self, model: OriginalModel, autoencoder: OriginalModel, batch: Batch, name: str) -> Pass:
        """Return one pass over a batch. ``name`` keys its noise."""
        inputs = self._original.datasets.SimpleCustomBatch([dict(batch)]).to_dict()
        inputs.pop("batch_data_indexes")
        weights = inputs.pop("ce_loss_weights", None)
        known = self.noise.get(name) if "padded_images" in inputs else None
        given = None if known is None else [known["vae_posterior_noise"], known["flow_noise"]]
        with self._log.fresh(None if given else _NOISE_SEEDS.get(name, _OTHER_SEED), given) as drawn:
            if "padded_images" in inputs:
                with torch.no_grad():
                    inputs["padded_latent"] = autoencoder.encode(inputs.pop("padded_images"))
            latents = inputs.get("padded_latent")
            output = model(**inputs)
            if name not in self.noise and len(drawn) == 2:
                self.noise[name] = {"vae_posterior_noise": drawn[0], "flow_noise": drawn[1]}
        return Pass(output, weights, inputs, latents)


def losses(passes: Sequence[Pass], reweight: bool = False, ce_weight: float = 1.0, mse_weight: float = 1.0) -> list[dict[str, Tensor]]:
    """Return the losses of each rank: sums over its tokens, times the number of ranks, over the tokens of all ranks."""
    ranks, totals = len(passes), token_totals(passes)
    results = []
    for one in passes:
        ce, mse, result = one.output["ce"], one.output["mse"], {}
        loss: Tensor | float = 0.0
        if ce is not None:
            if reweight and one.ce_weights is not None:
                result["ce"] = (ce * one.ce_weights).sum() * ranks / totals["total_ce_weights"]
            else:
                result["ce"] = ce.sum() * ranks / totals["total_ce_tokens"]
            loss = loss + result["ce"] * ce_weight
        if mse is not None:
            result["mse"] = mse.mean(-1).sum() * ranks / totals["total_mse_tokens"]
            loss = loss + result["mse"] * mse_weight
        results.append({**result, "loss": torch.as_tensor(loss)})
    return results


def token_totals(passes: Sequence[Pass]) -> dict[str, float]:
    """Return the numbers of loss tokens over all ranks."""
    return {
        "total_ce_tokens": sum(len(one.inputs["ce_loss_indexes"]) for one in passes if "ce_loss_indexes" in one.inputs),
        "total_ce_weights": sum(float(one.ce_weights.double().sum()) for one in passes if one.ce_weights is not None),
        "total_mse_tokens": sum(len(one.inputs["mse_loss_indexes"]) for one in passes if "mse_loss_indexes" in one.inputs),
        "world_size": len(passes),
    }


def numbers(result: dict[str, Tensor]) -> dict[str, float]:
    """Return losses as floats."""
    return {name: float(value) for name, value in result.items()}


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Return the gradients that exist."""
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def gradient_stats(model: nn.Module) -> dict[str, Any]:
    """Return norm and sum of every gradient, the norm of all, and the parameters without one."""
    found = gradients(model)
    named = dict(model.named_parameters())
    return {
        "total_norm": float(torch.sqrt(torch.stack([(value.double() ** 2).sum() for value in found.values()]).sum())),
        "per_param": {name: {"norm": float(value.double().norm()), "sum": float(value.double().sum())} for name, value in found.items()},
        "requires_grad_false": [name for name, parameter in named.items() if not parameter.requires_grad],
        "grad_none_though_requires_grad": [name for name, parameter in named.items() if parameter.requires_grad and parameter.grad is None],
    }


@contextmanager
def watched(model: OriginalModel) -> Iterator[dict[str, Tensor]]:
    """Keep the hidden states of every layer within the block, and the outputs of the modules around the decoder."""
    seen: dict[str, Tensor] = {}
    decoder = model.language_model.model

    def keep(name: str) -> Any:
        return lambda module, inputs, output: seen.__setitem__(name, output.detach().clone())

    def keep_input(module: nn.Module, arguments: Any, named: dict[str, Tensor]) -> None:
        seen["input"] = named["packed_sequence"].detach().clone()

    hooks = [layer.register_forward_hook(keep(f"layer_{number}")) for number, layer in enumerate(decoder.layers)]
    hooks += [decoder.register_forward_pre_hook(keep_input, with_kwargs=True), decoder.register_forward_hook(keep("final"))]
    hooks += [model.vit_model.register_forward_hook(keep("vit_out")), model.connector.register_forward_hook(keep("connector_out"))]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()
