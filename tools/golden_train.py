# SPDX-License-Identifier: Apache-2.0
"""Training against the recorded numbers of the original: which case a recorded key is, and the cases that change a setting.

Every top-level key of ``train/expected.json`` is the name of a recorded batch or has a rule in ``RULES``; any other key fails.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from safetensors.torch import load_file

from megatron_bagel import platform
from megatron_bagel.checkpoint.hf.load import named_weights
from megatron_bagel.costs.flops import StepWork, mfu_flops
from megatron_bagel.costs.freezing import FreezeSettings, freeze
from megatron_bagel.data.transforms import ready_images
from megatron_bagel.layout.mask import PackMask
from megatron_bagel.training.losses import LossTotals, LossWeights
from tools.golden_batch import batch_case, hidden_case
from tools.golden_cases import MAIN, SECOND, TrainCases
from tools.golden_common import CaseResult, Comparison, present
from tools.golden_model import Parts
from tools.golden_optimizer import learning_rate_case, optimizer_case
from tools.golden_run import compare_gradients, compare_losses, compare_totals, compare_untouched

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
    batch, ce, mse = present(re.fullmatch(r"(\w+)_reweight_ce([\d.]+)_mse([\d.]+)", name), "loss weights in the case's name").groups()
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
    frozen_parts = FreezeSettings(flags["freeze_llm"], flags["freeze_vit"], flags["freeze_und"])
    freeze(parts.decoder, parts.tower, frozen_parts)
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
    autoencoder, images = cases.model.autoencoder, ready_images(cases.batch(MAIN).loaded.vae_images(), platform.device())
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
