"""Training against the recorded numbers of the original: losses, every gradient under its released name, hidden states, freezing.

Every top-level key of ``train/expected.json`` is the name of a recorded batch or has a rule in ``RULES``; any other key fails.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_bagel import platform
from megatron_bagel.checkpoint.hf.load import named_weights
from megatron_bagel.costs.flops import StepWork, mfu_flops
from megatron_bagel.costs.freezing import freeze
from megatron_bagel.layout.mask import PackMask
from megatron_bagel.layout.order import expert_order
from megatron_bagel.model.batch import make_microbatch
from megatron_bagel.training.losses import LossTotals, LossWeights
from tools.golden_cases import MAIN, SECOND, TrainCases
from tools.golden_common import CaseResult, Comparison
from tools.golden_model import GoldenBatch, Parts
from tools.golden_optimizer import learning_rate_case, optimizer_case
from tools.golden_run import compare_gradients, compare_losses, compare_totals, compare_untouched, run

FREEZE_FLAGS = ("freeze_llm", "freeze_vit", "freeze_und")


def train_results(cases: TrainCases) -> Iterator[CaseResult]:
    """Yield one result per key of ``train/expected.json``, in the order of the file."""
    for name, want in cases.expected.items():
        recorded = (cases.goldens / "batches" / f"{name}.json").is_file()
        rule = batch_case if recorded else next((rule for pattern, rule in RULES if re.fullmatch(pattern, name)), None)
        if rule is None:
            yield CaseResult(f"train/{name}", float("nan"), 0.0, False, "a case this checker does not know")
            continue
        check = Comparison(f"train/{name}")
        rule(cases, check, name, want)
        yield check.result()


def batch_case(cases: TrainCases, check: Comparison, name: str, want: dict[str, Any]) -> None:
    """One batch alone: losses, unreduced losses, encoders' outputs, gradients. A batch without images of a kind has no such modules."""
    batch = cases.batch(name)
    pack = batch.pack
    whole = bool(len(pack.vit_positions)) and bool(len(pack.vae_positions))
    parts = cases.parts if whole else cases.model.parts(vision=bool(len(pack.vit_positions)), generation=bool(len(pack.vae_positions)))
    stage = cases.stage(parts, batch)
    outcome = run(parts, [batch], stage, backend=cases.backend)
    compare_losses(check, outcome.shares[0], want["losses"])
    if "losses_reweighted" in want:
        reweighted = LossWeights(ce_loss_reweighting=True)
        again = run(parts, [batch], stage, weights=reweighted, backend=cases.backend, backward=False)
        compare_losses(check, again.shares[0], want["losses_reweighted"])
    compare_totals(check, LossTotals.of([pack]), want)
    if "ce" in batch.expected:
        check.close("ce of each token", outcome.ce[0], batch.expected["ce"])
    if "mse" in batch.expected:
        check.close("mse of each channel", outcome.mse[0], batch.expected["mse"])
    if "padded_latent" in batch.expected:
        check.close("latents", stage.encode([batch.loaded])[0].latents, recorded_latents(batch, parts.arch.latent_patch_size))
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
    tower = parts.tower
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
    [features] = cases.stage(cases.parts, batch).encode([batch.loaded])
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


def nested_case(cases: TrainCases, check: Comparison, name: str, want: dict[str, Any]) -> None:
    """The original's dense mask per sample: equal to ours, and the same losses through the dense oracle."""
    batch = cases.batch(MAIN)
    mask, start = PackMask.of(batch.pack).dense(), 0
    recorded = load_file(cases.goldens / "batches" / f"{name}_masks.safetensors")
    for number, length in enumerate(batch.pack.sample_lens.tolist()):
        own = mask[start : start + length, start : start + length]
        check.same(f"pairs of sample {number} that differ", int((torch.from_numpy(own) != recorded[f"mask_{number}"].bool()).sum()), 0)
        start += length
    check.same("samples", len(recorded), len(batch.pack.sample_lens))
    compare_losses(check, cases.run(cases.parts, MAIN, backend="dense", backward=False).shares[0], want["losses"])
    check.notes.append("by the dense oracle")


def flex_case(cases: TrainCases, check: Comparison, name: str, want: dict[str, Any]) -> None:
    """Recorded is how far the original's own two ways lie apart; here our flex attention meets the recorded losses."""
    outcome = cases.run(cases.parts, MAIN, backend="flex", backward=False)
    batch = cases.batch(MAIN)
    check.close("ce", outcome.ce[0], batch.expected["ce"])
    check.close("mse", outcome.mse[0], batch.expected["mse"])
    check.notes.append("forward by FlexAttention")


def weighted_case(cases: TrainCases, check: Comparison, name: str, want: dict[str, Any]) -> None:
    """Loss weights and CE reweighting, read from the case's name."""
    batch, ce, mse = re.fullmatch(r"(\w+)_reweight_ce([\d.]+)_mse([\d.]+)", name).groups()
    weights = LossWeights(float(ce), float(mse), ce_loss_reweighting=True)
    outcome = cases.run(cases.parts, batch, weights=weights)
    compare_losses(check, outcome.shares[0], want["losses"], weights)
    check.norms("norm of all gradients", outcome.total_norm, want["grads"]["total_norm"])


def two_ranks_case(cases: TrainCases, check: Comparison, name: str, want: dict[str, Any]) -> None:
    """Two replicas: denominators over both, gradients summed; the original multiplies by the ranks and averages."""
    world = want["world_size"]
    for reweighting, recorded in ((True, want["reweighted"]), (False, want)):
        outcome = cases.run(cases.parts, MAIN, SECOND, weights=LossWeights(ce_loss_reweighting=reweighting), backward=not reweighting)
        for rank, shares in enumerate(outcome.shares):
            compare_losses(check, shares, recorded[f"rank{rank}"], scale=world)
    ce, mse = torch.stack(outcome.shares).sum(0)
    check.norms("ce of both", ce, want["logged_ce"])
    check.norms("mse of both", mse, want["logged_mse"])
    compare_totals(check, LossTotals.of(cases.batch(batch).pack for batch in (MAIN, SECOND)), want)
    check.norms("norm of all gradients", outcome.total_norm, want["grads_averaged"]["total_norm"])
    compare_gradients(check, outcome, want["grads_averaged"]["per_param"])
    for parameter, gradient in load_file(cases.goldens / "train" / "two_rank_grads.safetensors").items():
        check.close(f"gradient of {parameter}", outcome.gradients[parameter], gradient)


def accumulation_case(cases: TrainCases, check: Comparison, name: str, want: dict[str, Any]) -> None:
    """Micro-steps normalised one by one, as the original does it (ours are normalised together, as ``two_ranks`` shows)."""
    count = len(want["micro"])
    totals = [LossTotals.of([cases.batch(batch).pack]) for batch in (MAIN, SECOND)]
    outcome = cases.run(cases.parts, MAIN, SECOND, totals=totals, weights=LossWeights(1 / count, 1 / count))
    for shares, recorded in zip(outcome.shares, want["micro"], strict=True):
        compare_losses(check, shares, recorded)
    check.norms("norm of all gradients", outcome.total_norm, want["total_norm"])


def freeze_case(cases: TrainCases, check: Comparison, name: str, want: dict[str, Any]) -> None:
    """Losses unchanged, gradients of what still trains, and nothing else; frozen here means no gradient, in the original zeros."""
    flags = {flag: flag in name.split("+") for flag in FREEZE_FLAGS}
    parts = cases.model.parts(freeze_und=flags["freeze_und"])
    freeze(parts.decoder, parts.tower, **flags)
    outcome = cases.run(parts, MAIN)
    compare_losses(check, outcome.shares[0], want["losses"])
    check.norms("norm of all gradients", outcome.total_norm, want["total_norm"])
    compare_gradients(check, outcome, want["nonzero_grad"])
    frozen = sorted(parameter for parameter, gradient in outcome.gradients.items() if gradient is None)
    check.same("frozen beyond what has no gradient", [p for p in frozen if p in want["nonzero_grad"]], [])
    compare_untouched(check, outcome.gradients, [*want["exactly_zero_grad"], *want["grad_none"]])


def shift_case(cases: TrainCases, check: Comparison, name: str, want: dict[str, float]) -> None:
    """Another ``timestep_shift``, the number in the case's name."""
    arch = replace(cases.parts.arch, timestep_shift=float(name.rsplit("_", 1)[1]))
    parts = Parts(arch, cases.parts.decoder, cases.parts.tower)
    compare_losses(check, cases.run(parts, MAIN, backward=False).shares[0], want)


def kind_case(cases: TrainCases, check: Comparison, name: str, want: dict[str, Any]) -> None:
    """Another layer module with its part of the same weights."""
    parts = cases.model.parts(kind=name)
    outcome = cases.run(parts, MAIN)
    compare_losses(check, outcome.shares[0], want["losses"])
    check.norms("norm of all gradients", outcome.total_norm, want["total_norm"])
    twins = [name for name in parts.weight_map.by_hf if "_moe_gen" in name and (".layers." not in name or ".layers.0." in name)]
    check.same("duplicated weights outside of layers and in layer 0", sorted(twins), sorted(want["moe_gen_params"]))


def copy_case(cases: TrainCases, check: Comparison, name: str, want: dict[str, float]) -> None:
    """Generation weights replaced by the understanding expert's."""
    parts = cases.model.parts()
    parameters = named_weights(parts.modules)
    with torch.no_grad():
        for name in (name for name in parameters if ".gen." in name):
            parameters[name].copy_(parameters[name.replace(".gen.", ".und.")])
    compare_losses(check, cases.run(parts, MAIN, backward=False).shares[0], want)


@torch.no_grad()
def padding_case(cases: TrainCases, check: Comparison, name: str, want: dict[str, Any]) -> None:
    """What encoding padded images changes: the means of one image alone against those among the others."""
    autoencoder, images = cases.model.autoencoder, [one.to(platform.device()) for one in cases.batch(MAIN).loaded.vae_images()]
    image = images[want["image"]]
    alone = autoencoder.encode_many([image])[0][0]
    among = autoencoder.encode_padded(images)[want["image"]][0]
    check.same("size", list(image.shape[1:]), want["own_size"])
    check.same("padded size", [max(one.shape[side] for one in images) for side in (1, 2)], want["padded_to"])
    check.norms("mean absolute value", alone.abs().mean(), want["latent_mean_abs"])
    check.norms("largest difference", (alone - among).abs().max(), want["max_abs_diff"])
    check.norms("mean difference", (alone - among).abs().mean(), want["mean_abs_diff"])


def flops_case(cases: TrainCases, check: Comparison, name: str, want: dict[str, float]) -> None:
    """The original's MFU formula, which counts the padding document's square."""
    llm, batch = cases.model.arch.llm, cases.batch(MAIN)
    work = StepWork(tokens=batch.pack.sequence_length, sum_len_squared=sum(length * length for length in batch.sample_lens))
    check.norms("tokens", work.tokens, want[f"{MAIN}_tokens"])
    check.norms("sum of squares", work.sum_len_squared, want[f"{MAIN}_sum_len2"])
    check.norms("per token", mfu_flops(llm, StepWork(tokens=1)), want["dense_token_factor"])
    check.norms("per pair", mfu_flops(llm, StepWork(sum_len_squared=1)), want["attn_factor"])
    check.norms("all", mfu_flops(llm, work), want[f"{MAIN}_flops"])


RULES: tuple[tuple[str, Callable[[TrainCases, Comparison, str, Any], None]], ...] = (
    (r"hidden_tokens", hidden_case),
    (r"nested_\d+", nested_case),
    (r"flex_eager_check", flex_case),
    (r"\w+_reweight_ce[\d.]+_mse[\d.]+", weighted_case),
    (r"two_ranks", two_ranks_case),
    (r"grad_accum_\d+", accumulation_case),
    (r"freeze_\w+(\+freeze_\w+)*", freeze_case),
    (r"timestep_shift_[\d.]+", shift_case),
    (r"Qwen2\w*DecoderLayer", kind_case),
    (r"copy_init_moe", copy_case),
    (r"padding_leak", padding_case),
    (r"lr_used_at_step", learning_rate_case),
    (r"flops", flops_case),
    (r"optim_\w+", optimizer_case),
)
