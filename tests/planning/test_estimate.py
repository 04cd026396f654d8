# SPDX-License-Identifier: Apache-2.0
"""Plans agree with training's accounting, get better where they should, and picture what they say."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_bagel.cli.plan import main
from megatron_bagel.cli.resolve_plan import resolve_plan
from megatron_bagel.config.parser import Config
from megatron_bagel.config.plan_arguments import PlanArguments
from megatron_bagel.costs.flops import StepWork, mfu_flops, utilization, work_flops
from megatron_bagel.planning.activations import Recompute
from megatron_bagel.planning.command import problem_of
from megatron_bagel.planning.estimate import recomputed_flops
from megatron_bagel.planning.models import MODELS, active_parameters, parameters
from megatron_bagel.planning.parallel_plan import make_plan
from megatron_bagel.planning.search import search
from megatron_bagel.planning.workload import Mix, typical_pack

TP, PP, VPP, CP = (
    "tensor_model_parallel_size", "pipeline_model_parallel_size", "virtual_pipeline_model_parallel_size", "context_parallel_size",
)  # fmt: skip
EP = "expert_model_parallel_size"
SMALL = PlanArguments(model="qwen2.5-0.5b-mot", gpus=16)
SEARCH = replace(SMALL, search=True)


def plan_of(wanted: PlanArguments = SMALL, **flags):
    config = Config.from_values({"max_num_tokens": 16384, "global_batch_size": 64, **flags})
    planned = resolve_plan(config, wanted)
    problem = problem_of(planned, wanted)
    return make_plan(planned.inputs_of({}), problem), problem


def test_the_released_model_has_the_released_numbers() -> None:
    """14.607 billion numbers in the files of BAGEL-7B-MoT, two position tables among them."""
    assert parameters(MODELS["bagel-7b-mot"]) == pytest.approx(14.607e9, abs=0.5e6)


def test_a_mixture_in_both_experts_counts_all_experts_and_the_active_ones() -> None:
    """Qwen3-30B-A3B has 30.5 billion parameters of which 3.3 serve a token (its model card); a MoT has its layers twice."""
    arch, llm = MODELS["qwen3-30b-a3b-mot"], MODELS["qwen3-30b-a3b-mot"].llm
    text_alone = replace(arch, llm=replace(llm, layer_module="Qwen2DecoderLayer"), vit=None, autoencoder=None)
    assert parameters(text_alone) == pytest.approx(30.53e9, rel=1e-3)
    assert active_parameters(arch, "und") == pytest.approx(3.35e9, rel=0.01)
    vocabulary = 2 * llm.vocab_size * llm.hidden_size
    assert active_parameters(arch, "gen") == active_parameters(arch, "und") - vocabulary
    assert parameters(arch) == pytest.approx(2 * 30.53e9 - vocabulary, rel=0.01)


def test_a_search_divides_experts_and_their_traffic_is_that_of_the_choices() -> None:
    wanted = PlanArguments(model="qwen3-30b-a3b-mot", gpus=64)
    plan, problem = plan_of(wanted, **{EP: 8, "recompute_granularity": "full"})
    assert "DP64 EP8" in plan.name
    sparse, packs = problem.arch.llm.sparse, plan.sizes.num_microbatches
    tokens = problem.pack.sequence_length * sparse.num_experts_per_tok * packs
    # Three passes of each of 48 layers send each choice's row to its expert and back: forward, again, backward.
    rows = 48 * 3 * 2 * tokens * 2048 * 2
    sent = sum(call.sent for call in plan.calls[0] if call.axis == "expert" and call.payload != "weights of choices")
    assert sent == pytest.approx(rows, rel=1e-3)
    whole, _ = plan_of(wanted, **{"recompute_granularity": "full"})
    experts = 2 * 48 * 128 * 3 * 2048 * 768
    assert whole.memory[0].static.parameters - plan.memory[0].static.parameters == experts - experts // 8
    assert sum(call.sent for call in whole.calls[0] if call.axis == "expert") == 0


@pytest.mark.filterwarnings("ignore")
def test_the_command_plans_experts(capsys: pytest.CaptureFixture) -> None:
    words = ["--model", "qwen2.5-0.5b-mot", "--gpus", "8", "--seq_length", "8192", "--num_experts", "8", "--moe_router_topk", "2"]
    assert main([*words, f"--{EP}", "4"]) == 0
    text = capsys.readouterr().out
    assert "DP8 EP4" in text and "serve a text or ViT token" in text and re.search(r"^expert +\d+\.\d*[1-9]", text, re.MULTILINE)
    assert main([*words, f"--{EP}", "3"]) == 2
    assert "does not divide the 8 ranks of a pipeline stage" in capsys.readouterr().err


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_a_typical_pack_is_full_and_mixed_as_asked(share: float) -> None:
    arch, mix = MODELS["qwen2.5-0.5b-mot"], Mix(share, 512, 96, 490, 192)
    pack = typical_pack(arch, mix, 32768)
    samples = {"vae": 1024 + 2 + 96, "vit": 35 * 35 + 2 + 192}
    assert 32768 - max(samples.values()) < pack.sequence_length <= 32768
    drawn = len(pack.images_of("vae")) * samples["vae"] / pack.sequence_length
    assert drawn == pytest.approx(share, abs=0.05)


def test_mfu_is_what_training_reports_for_this_step_time() -> None:
    plan, problem = plan_of()
    work = StepWork.of(problem.pack)
    work = sum([work] * 63, work)
    assert plan.work == work
    step = plan.estimate.step_time_s
    assert plan.estimate.mfu == utilization(mfu_flops(problem.arch.llm, work), step, 989.0, 16)[1]
    assert plan.estimate.work_mfu == utilization(work_flops(problem.arch, work).total, step, 989.0, 16)[1]


def test_recomputing_everything_is_another_forward_pass() -> None:
    plan, problem = plan_of(recompute_granularity="full")
    flops = work_flops(problem.arch, plan.work)
    assert plan.recomputed == pytest.approx((flops.decoder_linear + flops.decoder_attention) / 3)
    half = recomputed_flops(plan.inputs, plan.work, Recompute("full", "block", 12))
    assert half == pytest.approx(plan.recomputed / 2)
    assert recomputed_flops(plan.inputs, plan.work, Recompute()) == 0


@pytest.mark.parametrize("placement", ["all_ranks", "first_stage"])
def test_encoding_ahead_keeps_latents_and_a_workspace(placement: str) -> None:
    """On every rank that encodes: its share of the latents of one more step, and the autoencoder's workspace beside the activations."""
    flags = {PP: 3, CP: 2, "encoder_placement": placement, "encoder_memory": "step"}
    plain, problem = plan_of(replace(SMALL, gpus=12), **flags)
    early, _ = plan_of(replace(SMALL, gpus=12), overlap_vae_encode=True, **flags)
    tokens = sum(image.tokens for image in problem.pack.images_of("vae")) * plain.sizes.num_microbatches
    shares = [1 / 6] * 3 if placement == "all_ranks" else [1, 0, 1]
    for stage, share, other in zip(plain.memory, shares, early.memory, strict=True):
        latents = round(tokens * share * problem.arch.latent_token_dim * 4)
        assert other.encoders - stage.encoders == (latents + stage.encoding if share else 0)
        assert other.peak - stage.peak == other.encoders - stage.encoders


def test_more_recomputation_keeps_less() -> None:
    plan, _ = plan_of(**{PP: 2})
    for stage in plan.memory:
        kept = list(stage.by_mode.values())
        assert kept[0] > kept[1] > kept[2] and kept[0] > kept[3] > kept[4]


def test_chunks_shrink_the_bubble_and_the_bubble_is_the_formula() -> None:
    plain, _ = plan_of(**{PP: 4})
    interleaved, _ = plan_of(**{PP: 4, VPP: 2})
    packs = plain.sizes.num_microbatches
    assert plain.estimate.bubble == pytest.approx(3 / (packs + 3))
    assert interleaved.estimate.bubble == pytest.approx(3 / (2 * packs + 3))


def test_links_between_nodes_are_slower() -> None:
    """Tensor parallelism over more GPUs than a node has costs more time than its bytes would inside one."""
    near, _ = plan_of(**{TP: 2, "sequence_parallel": True})
    far, _ = plan_of(PlanArguments(model="qwen2.5-0.5b-mot", gpus=16, gpus_per_node=1), **{TP: 2, "sequence_parallel": True})
    assert far.estimate.tensor_s > 5 * near.estimate.tensor_s


def test_search_lists_what_fits_quickest_first() -> None:
    config = Config.from_values({"max_num_tokens": 16384, "global_batch_size": 64})
    planned = resolve_plan(config, SEARCH)
    problem = problem_of(planned, SEARCH)
    found = search(problem, planned.inputs_of)
    assert len(found) > 5 and all(plan.fits for plan in found)
    times = [plan.estimate.step_time_s for plan in found]
    assert times == sorted(times)
    # Any of them can be planned by its flags again.
    best, megatron = found[0], found[0].inputs.megatron
    axes = {name: getattr(megatron, name) for name in (TP, PP, VPP, CP, "sequence_parallel", "recompute_granularity")}
    again, _ = plan_of(**{name: value for name, value in axes.items() if value is not None})
    assert again.estimate == best.estimate


def test_nothing_fits_a_tiny_gpu() -> None:
    config = Config.from_values({"max_num_tokens": 16384, "global_batch_size": 64})
    wanted = PlanArguments(model="qwen2.5-72b-mot", gpus=2, gpu="a100-40gb", search=True)
    planned = resolve_plan(config, wanted)
    with pytest.raises(ValueError, match=r"no parallel sizes let this model fit 2 x A100, .*the nearest is TP2.*Raise --gpus"):
        search(problem_of(planned, wanted), planned.inputs_of)


@pytest.mark.filterwarnings("ignore")
def test_the_command_answers_in_tables_json_and_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    words = ["--model", "qwen2.5-0.5b-mot", "--gpus", "4", "--seq_length", "8192", f"--{PP}", "2", "--global_batch_size", "8"]
    picture = tmp_path / "memory.png"
    assert main([*words, "--png", str(picture)]) == 0
    text = capsys.readouterr().out
    assert "stage 1" in text and "Not measured on any GPU" in text and picture.read_bytes().startswith(b"\x89PNG")
    assert main([*words, "--json"]) == 0
    (plan,) = json.loads(capsys.readouterr().out)["plans"]
    assert plan["layout"]["pipeline"] == 2 and len(plan["stages"]) == 2
    assert plan["peak_bytes"] == max(stage["peak_bytes"] for stage in plan["stages"])


@pytest.mark.parametrize(
    ("target", "reason"),
    [("gone/memory.png", "there is no folder .*gone; make it"), ("", "it is a folder; name a file"), ("/sys/x.png", "cannot be written")],
)
def test_a_picture_that_cannot_be_written_is_refused_before_the_plan(
    target: str, reason: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main(["--model", "no-such-model", "--png", str(tmp_path / target)]) == 2
    assert re.search(f"^megatron_bagel.plan: error: --png .*{reason}", capsys.readouterr().err)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--model", "bagel-8b"], "neither a folder nor a named size"),
        (["--model", "bagel-7b-mot", "--gpu", "h300"], "--gpu h300 is not in the table"),
        (["--model", "bagel-7b-mot", f"--{TP}", "8"], "sizes that work: 1, 2 or 4"),
        (["--model", "bagel-7b-mot", "--gpus", "6", f"--{TP}", "4"], "do not divide the 6 ranks"),
        (["--model", "bagel-7b-mot", "--matmul_share", "1.5"], "--matmul_share is 1.5"),
        (["--model", "bagel-7b-mot", "--image_size", "2048"], "--image_size 2048 is not between"),
        (["--model", "bagel-7b-mot", "--seq_length", "1000"], "holds no sample"),
    ],
)
def test_what_cannot_be_planned_is_refused(words: list[str], complaint: str, capsys: pytest.CaptureFixture) -> None:
    assert main(words) == 2
    assert complaint in capsys.readouterr().err
