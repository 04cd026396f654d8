# SPDX-License-Identifier: Apache-2.0
"""One recorded batch alone: losses, encoders' outputs, gradients under their released names, and the hidden states of every layer."""

from __future__ import annotations

from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_bagel import platform
from megatron_bagel.layout.order import expert_order
from megatron_bagel.model.batch import make_microbatch
from megatron_bagel.training.losses import LossTotals, LossWeights
from tools.golden_cases import MAIN, TrainCases
from tools.golden_common import Comparison
from tools.golden_model import GoldenBatch, Parts
from tools.golden_run import compare_gradients, compare_losses, compare_totals, compare_untouched, run


def batch_case(cases: TrainCases, check: Comparison, name: str, want: dict[str, Any]) -> None:
    """One batch alone: losses, unreduced losses, encoders' outputs, gradients. A batch without images of a kind has no such modules."""
    batch = cases.batch(name)
    pack = batch.pack
    whole = bool(len(pack.vit_positions)) and bool(len(pack.vae_positions))
    parts = cases.parts if whole else cases.model.parts(vision=bool(len(pack.vit_positions)), generation=bool(len(pack.vae_positions)))
    image_encoder = cases.image_encoder(parts, batch)
    outcome = run(parts, [batch], image_encoder, backend=cases.backend)
    compare_losses(check, outcome.shares[0], want["losses"])
    if "losses_reweighted" in want:
        reweighted = LossWeights(ce_loss_reweighting=True)
        again = run(parts, [batch], image_encoder, weights=reweighted, backend=cases.backend, backward=False)
        compare_losses(check, again.shares[0], want["losses_reweighted"])
    compare_totals(check, LossTotals.of([pack]), want)
    if "ce" in batch.expected:
        check.close("ce of each token", outcome.ce[0], batch.expected["ce"])
    if "mse" in batch.expected:
        check.close("mse of each channel", outcome.mse[0], batch.expected["mse"])
    if "padded_latent" in batch.expected:
        check.close("latents", image_encoder.encode([batch.loaded])[0].latents, recorded_latents(batch, parts.arch.latent_patch_size))
    compare_vision(check, parts, batch)
    check.same("sequence length", pack.sequence_length, want.get("sequence_length", pack.sequence_length))
    gradients = want.get("grads", want)
    check.norms("norm of all gradients", outcome.total_norm, gradients["total_norm"])
    if "per_param" in gradients or "grad_norms" in gradients:
        compare_gradients(check, outcome, gradients.get("per_param") or gradients["grad_norms"])
    compare_untouched(check, outcome.gradients, want.get("grad_none", ()))
    full = cases.goldens / "train" / f"{name}_grads.safetensors"
    if full.is_file():
        for parameter, gradient in load_file(full).items():
            check.close(f"gradient of {parameter}", outcome.gradients[parameter], gradient)
    if "requires_grad_false" in gradients:
        check.same("tables that never train", sorted(parts.weight_map.tables), sorted(gradients["requires_grad_false"]))


def recorded_latents(batch: GoldenBatch, patch: int) -> Tensor:
    """The recorded latent of each image itself as tokens: (patch row, patch column, channel)."""
    tokens = []
    for latent, (rows, columns) in zip(batch.expected["padded_latent"], batch.pack.latent_shapes.tolist(), strict=True):
        own = latent[:, : rows * patch, : columns * patch].unflatten(2, (columns, patch)).unflatten(1, (rows, patch))
        tokens.append(own.permute(1, 3, 2, 4, 0).reshape(rows * columns, -1))
    return torch.cat(tokens)


@torch.no_grad()
def compare_vision(check: Comparison, parts: Parts, batch: GoldenBatch) -> None:
    """Outputs of the vision transformer and of the connector, where recorded."""
    if "vit_out" not in batch.expected:
        return
    seen: dict[str, Tensor] = {}
    tower = parts.vision
    # Seen from outside, the tower only gives both together with its position table, so the halves are watched.
    hooks = [
        module.register_forward_hook(lambda _module, _inputs, output, key=key: seen.__setitem__(key, output))
        for key, module in (("vit_out", tower.vit_model), ("connector_out", tower.connector))
    ]
    patches, ids = (x.to(platform.device()) for x in (batch.loaded.vit_patches, torch.from_numpy(batch.pack.vit_position_ids)))
    for number, image in enumerate(batch.pack.images_of("vit")):
        first = sum(one.tokens for one in batch.pack.images_of("vit")[:number])
        rows = slice(first, first + image.tokens)
        tower(patches[rows], ids[rows], [image.tokens])
        for key, output in seen.items():
            check.close(f"{key} of image {number}", output, batch.expected[key][rows])
    for hook in hooks:
        hook.remove()


@torch.no_grad()
def hidden_case(cases: TrainCases, check: Comparison, name: str, want: dict[str, int]) -> None:
    """Hidden states after the embedding, after every layer and after the final norms."""
    batch, decoder = cases.batch(MAIN), cases.parts.decoder
    order = expert_order(batch.pack)
    [features] = cases.image_encoder(cases.parts, batch).encode([batch.loaded])
    microbatch = make_microbatch(batch.pack, order, features, device=platform.device())
    states: dict[str, Tensor] = {"input": decoder.embed(microbatch)}
    hooks = [
        layer.register_forward_hook(lambda _m, _i, output, key=f"layer_{number}": states.__setitem__(key, output[0].squeeze(1)))
        for number, layer in enumerate(decoder.decoder.layers)
    ]
    last = decoder.decode(states["input"], microbatch.n_und, microbatch.n_vae, microbatch.position_ids, microbatch.attention)
    for hook in hooks:
        hook.remove()
    states["final"] = decoder.final_norm(last, microbatch.n_und, microbatch.n_vae)
    recorded = load_file(cases.goldens / "train" / f"{MAIN}_hidden.safetensors")
    check.same("recorded states", sorted(recorded), sorted(states))
    for key, tensor in recorded.items():
        check.close(key, states[key][order.slots[list(want.values())]], tensor)
    check.close("all tokens", states["final"][order.slots], batch.expected["final_hidden"])
