# SPDX-License-Identifier: Apache-2.0
"""Runs that train adapters: the same on every layout, exact after a resume, and nothing but adapters changes or is kept."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_bagel.assembly.opened_model import OpenOptions, open_model
from megatron_bagel.checkpoint.convert_adapter import export_adapter, import_adapter, merge_adapter
from megatron_bagel.checkpoint.dist.adapter_reader import read_adapter
from megatron_bagel.checkpoint.dist.stored_adapter import identify
from megatron_bagel.checkpoint.dist.tensor_reader import CheckpointWeights
from megatron_bagel.checkpoint.hf.adapter_map import AdapterMap
from megatron_bagel.checkpoint.hf.folder import HFFolder
from megatron_bagel.checkpoint.hf.load import check_against, named_weights
from megatron_bagel.checkpoint.hf.weight_map import WeightMap
from megatron_bagel.cli.resolve_run import new_tokens
from megatron_bagel.config.parser import Config
from megatron_bagel.costs.memory import MemoryModel
from megatron_bagel.model.positions import sincos_2d
from megatron_bagel.planning.activations import ActivationModel, Recompute
from megatron_bagel.planning.rank_tokens import rank_tokens
from megatron_bagel.training.loop import train
from megatron_bagel.training.optim.optimizer import leaf_optimizers
from megatron_bagel.training.setup import set_up as setup
from tests.checkpoint.parameter_tree import model_like
from tests.costs.test_memory import held
from tests.distributed import run_ranks
from tests.planning.test_activations import kept_bytes
from tests.planning.test_dry_run import dry_runs
from tests.runs import numbers, open_run, resolved, run, run_config
from tests.training.equal_runs import CP, PP, SETTINGS, SP_TP2, TP, VPP, Result, assert_equal, cases, stored_tensors, trained, world_of

pytestmark = pytest.mark.distributed

LORA = {"lora_rank": 4, "lora_alpha": 8.0, "lr": 1e-2, "lora_targets": ["qkv,proj", "fc1", "fc2", "connector", "vit", "vae2llm", "llm2vae"]}
DROPOUT = {**LORA, "lora_targets": ["qkv", "proj", "fc1", "fc2"], "lora_dropout": 0.1, "lora_experts": "both"}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sample data, and a base: the checkpoint of one step of a run of all weights."""
    world = world_of(tmp_path_factory.mktemp("world"), num_attention_heads=4, num_key_value_heads=2, vocab_size=447)
    run(run_config(world, world / "base", **{**SETTINGS, "total_steps": 1, "save_every": 1, "eps": 1e-6}))
    return world


def from_base(world: Path, flags: dict[str, Any]) -> dict[str, Any]:
    return {"resume_from": str(world / "base/checkpoints/0000001"), "resume_model_only": True, "init_random": False, **flags}


@pytest.fixture(scope="module")
def reference(world: Path) -> Any:
    return trained(world, world / "reference", 1, from_base(world, LORA))


def assert_losses(ours: Result, theirs: Result) -> None:
    """Loss, cross entropy and flow loss of every step to 1e-6.

    With the epsilon of ``SETTINGS``. At 1e-15 AdamW makes a full update of a gradient that only rounding keeps from zero, and rounding
    differs between layouts.
    """
    for left, right in zip(ours[0], theirs[0], strict=True):
        assert left[1:4] == pytest.approx(right[1:4], rel=1e-6), left[0]


LAYOUTS = {
    "tp2-sp-pp2": (4, {**SP_TP2, PP: 2}),
    "tp2": (2, {TP: 2}),
    "tp4-two-kv-heads": (4, {TP: 4}),
    "pp2-vpp2-recompute": (2, {PP: 2, VPP: 2, "recompute_granularity": "full"}),
    "cp2-dp2": (4, {CP: 2}),
    "dp2-whole-optimizer": (2, {"use_distributed_optimizer": False}),
    "tp2-cp2-whole-optimizer": (4, {**SP_TP2, CP: 2, "use_distributed_optimizer": False}),
    "tp2-sp-pp2-cp2": (8, {**SP_TP2, PP: 2, CP: 2}),
    "first-stage-encoders": (2, {PP: 2, "encoder_placement": "first_stage"}),
}


@pytest.mark.parametrize(("ranks", "flags"), cases(LAYOUTS, "tp2-sp-pp2"))
def test_adapters_are_equal_on_every_layout(world: Path, tmp_path: Path, reference: Any, ranks: int, flags: dict[str, Any]) -> None:
    result = trained(world, tmp_path, ranks, from_base(world, {**LORA, **flags}))
    if not flags.get("use_distributed_optimizer", True):
        # Only the distributed optimizer keeps main weights of fp32 parameters, which are the weights themselves.
        main, weights = "optimizer.state.param.", reference[1]
        assert all(torch.equal(weights[name], weights[name.removeprefix(main)]) for name in weights if name.startswith(main))
        reference = (reference[0], {name: weight for name, weight in weights.items() if not name.startswith(main)})
    assert_equal(result, reference)
    assert_losses(result, reference)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["Qwen2MoEDecoderLayer", "Qwen2DecoderLayer"])
def test_the_other_layer_kinds_are_equal_on_layouts_too(world: Path, tmp_path: Path, kind: str) -> None:
    """With a larger epsilon. AdamW divides the rounding of a gradient of nearly zero, about 1e-9, by it.

    At 1e-6 one weight of the MoE kind (a ``lora_B`` of layer 1) ended 2.2e-5 apart, above the limit of 2e-5, with losses within 3e-8.
    At 1e-5 no weight of either kind was more than 5e-6 apart.
    """
    start = {**SETTINGS, "layer_module": kind, "total_steps": 1, "save_every": 1}
    run(run_config(world, tmp_path / "base", **start))
    flags = {**from_base(world, {**LORA, "layer_module": kind, "eps": 1e-5}), "resume_from": str(tmp_path / "base/checkpoints/0000001")}
    one = trained(world, tmp_path / "one", 1, flags)
    result = trained(world, tmp_path / "four", 4, {**flags, **SP_TP2, PP: 2})
    assert_equal(result, one)
    assert_losses(result, one)


def test_a_checkpoint_holds_adapters_and_their_state_alone(reference: Any) -> None:
    names = set(reference[1])
    assert any(name.startswith("ema.decoder.layers.0.self_attention.gen.linear_qkv.lora_A") for name in names)
    assert all("lora_A" in name or "lora_B" in name for name in names)
    assert torch.count_nonzero(reference[1]["decoder.layers.1.mlp.und.linear_fc2.lora_B.weight"])


def test_adapters_go_to_peft_files_and_back_and_merge(world: Path, tmp_path: Path, reference: Any) -> None:
    """The merged folder passes the strict loading of the released format and holds what ``--adapter`` computes from the base."""
    checkpoint, base = world / "reference/checkpoints/0000003", world / "base/checkpoints/0000001"
    export_adapter(checkpoint, tmp_path / "peft", "model")
    imported = import_adapter(tmp_path / "peft", base, tmp_path / "imported", "model")
    for name, tensor in stored_tensors(imported).items():
        torch.testing.assert_close(tensor, reference[1][name], atol=0, rtol=0)
    merge_adapter(tmp_path / "peft", base, tmp_path / "merged", sincos_2d, dtype="fp32")
    merged = HFFolder(tmp_path / "merged")
    weight_map, reader = WeightMap(merged.arch), merged.weights("ema")
    assert not check_against(reader, weight_map).missing
    weights, changed = CheckpointWeights(base), read_adapter(tmp_path / "peft")
    for name, entry in weight_map.entries.items():
        expected = entry.fuse([changed.changed(hf, part) for hf, part in zip(entry.hf, entry.unfuse(weights.model(name)), strict=True)])
        assert torch.equal(entry.fuse([reader.get(hf) for hf in entry.hf]), expected[: entry.shape[0]]), name
    assert len(changed.changes) == len(
        {hf for entry in AdapterMap(merged.arch, changed.settings(merged.arch)).bases.values() for hf in entry.hf}
    )

    with pytest.raises(ValueError, match="belongs to the model weights.*its base any more"):
        merge_adapter(tmp_path / "peft", tmp_path / "merged", tmp_path / "twice", sincos_2d)
    (tmp_path / "peft/base.json").unlink()
    with pytest.raises(ValueError, match="merging it twice"):
        merge_adapter(tmp_path / "peft", tmp_path / "merged", tmp_path / "twice", sincos_2d)
    with pytest.raises(ValueError, match="holds the adapters of"):
        identify(checkpoint, "model")


def test_a_checkpoint_of_adapters_opens_as_a_model(world: Path, reference: Any) -> None:
    """Its base and its adapter, named or found by itself, give the same model."""
    base, checkpoint = world / "base/checkpoints/0000001", world / "reference/checkpoints/0000003"
    opened = [
        open_model(checkpoint, OpenOptions(weights="model")),
        open_model(base, OpenOptions(weights="model", adapter=str(checkpoint), adapter_weights="model")),
    ]
    modules = [model_like(WeightMap(model.arch)) for model in opened]
    for model, parts in zip(opened, modules, strict=True):
        model.fill(parts)
    for left, right in zip(*(named_weights(parts).values() for parts in modules), strict=True):
        assert torch.equal(left, right)
    with pytest.raises(ValueError, match="already"):
        open_model(checkpoint, OpenOptions(adapter=str(checkpoint)))
    with pytest.raises(ValueError, match="neither a PEFT folder"):
        open_model(base, OpenOptions(adapter=str(world / "data")))


def _base_after_training(config: Config) -> tuple[float, int, int]:
    run = open_run(config)
    parameters = {name: p for part in run.trained.modules.values() for name, p in part.named_parameters()}
    before = {name: p.detach().clone() for name, p in parameters.items() if not p.requires_grad}
    train(run)
    run.loader.close()
    assert all(torch.equal(parameters[name], tensor) for name, tensor in before.items())
    assert all("lora_" in name for name in parameters.keys() - before.keys())
    trained_elements = sum(p.numel() for p in parameters.values() if p.requires_grad)
    main = [weight for leaf in leaf_optimizers(run.trainable.optimizer) for weight in leaf.get_parameters()]
    buffers = sum(buffer.grad_data.numel() for part in run.trainable.wrapped for buffer in part.buffers)
    return run.trainable.ema.local_bytes() / trained_elements, sum(p.numel() for p in main) - trained_elements, buffers - trained_elements


def test_the_base_is_unchanged_and_takes_no_memory_of_training(world: Path, tmp_path: Path) -> None:
    config = run_config(world, tmp_path, **from_base(world, {**SETTINGS, **LORA, "total_steps": 2}))
    average, main, padding = run_ranks(_base_after_training, 1, config)[0]
    assert average == 4 and main == 0 and 0 <= padding < 64 * 200


MEMORY = {
    "one": (1, {}),
    "tp2-pp2-bf16": (4, {**SP_TP2, PP: 2, "bf16": True, "lora_full": ["time_embedder"]}),
    "dp2-und-freezing": (2, {"lora_experts": "gen", "lora_targets": ["qkv", "fc2"], "freeze_und": True}),
}


@pytest.mark.parametrize(("ranks", "flags"), cases(MEMORY, "one"))
def test_plans_predict_the_memory_of_adapters(world: Path, tmp_path: Path, ranks: int, flags: dict[str, Any]) -> None:
    """Bytes between steps to 1 %, and what a forward pass keeps to 2 %. A dry run, which is in bf16, builds exactly what is held."""
    config = run_config(world, tmp_path, ranks, **from_base(world, {**LORA, "global_batch_size": 4, **flags}))
    costs, memories = resolved(config, ranks).costs, run_ranks(held, ranks, config)
    for stage, found in memories:
        assert found == pytest.approx(asdict(MemoryModel(costs).rank(stage)), rel=0.01)
    if "bf16" in flags:
        for (*_, built), (_, found) in zip(dry_runs(config, ranks, tmp_path), memories, strict=True):
            assert built == {name: found[name] for name in built}
    model = ActivationModel(costs)
    for stage, (cp_rank, pack), found in run_ranks(kept_bytes, ranks, config):
        megatron = config.megatron
        slots = config.data.max_num_tokens if megatron.pipeline_model_parallel_size > 1 else None
        tokens = rank_tokens(pack, cp_rank, 1, slots, megatron.tensor_model_parallel_size if megatron.sequence_parallel else 1, False)
        assert found == pytest.approx(model.microbatch(stage, tokens, Recompute()), rel=0.02)


REFUSED = {
    "adapters in FP8": ({"fp8": "hybrid"}, "Leave one of them out"),
    "rank 0": ({"lora_rank": 0}, "lora_rank is 0"),
    "no such target": ({"lora_targets": ["qkv", "q_proj"]}, "q_proj.*choose from qkv, proj, fc1, fc2, connector, vit, vae2llm, llm2vae"),
    "frozen vision tower": ({"freeze_vit": True}, "--freeze_vit True keeps the vision tower.*--lora_targets vit"),
    "frozen expert": ({"freeze_und": True, "lora_targets": ["qkv"]}, "take --lora_experts gen"),
    "adapted and full": ({"lora_full": ["gen"]}, "either trains in full or by adapters"),
    "dropout outside the layers": ({"lora_dropout": 0.1}, "--lora_dropout 0.1 with --lora_targets connector vit"),
    "no base": ({"resume_from": None, "resume_model_only": False}, "give the folder or checkpoint"),
    "new tokens whose rows would not train": ({"grow_vocabulary": True}, "add --lora_full embedding output_layer"),
    "shared linears": ({"layer_module": "Qwen2DecoderLayer", "lora_experts": "und"}, "both experts share qkv and proj"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_work_is_refused_with_the_reason(world: Path, tmp_path: Path, name: str) -> None:
    flags, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        run_config(world, tmp_path, **from_base(world, {**LORA, **flags}))


@pytest.mark.slow
def test_dropout_and_resume_on_another_layout(world: Path, tmp_path: Path) -> None:
    """Dropout draws the same on two stages with recomputation as in one process, before and after a resume."""
    one = trained(world, tmp_path / "one", 1, from_base(world, DROPOUT))
    flags = from_base(world, {**SETTINGS, **DROPOUT, PP: 2, "recompute_granularity": "full", "total_steps": 1})
    run(run_config(world, tmp_path / "two", 2, **flags), 2)
    again = run(run_config(world, tmp_path / "two", **{**flags, PP: 1, "recompute_granularity": None, "total_steps": 3}))
    for left, right in zip(numbers(again), one[0], strict=True):
        assert left == pytest.approx(right, rel=1e-5)
    plain = trained(world, tmp_path / "plain", 1, from_base(world, {**DROPOUT, "lora_dropout": 0.0}))
    assert plain[0][1][1] != pytest.approx(one[0][1][1], rel=1e-6)
    stored = stored_tensors(tmp_path / "two/checkpoints/0000003")
    for name, tensor in one[1].items():
        torch.testing.assert_close(stored[name], tensor, atol=2e-5, rtol=1e-4)


def _execute_with_new_tokens(config: Config, ranks: int, tokens: dict[int, str]) -> None:
    started = replace(resolved(config, ranks), new_tokens=tokens)
    setup.execute(started)


def test_new_rows_that_no_text_uses_are_said_once(world: Path, tmp_path: Path) -> None:
    """Every sample has an image or an end; no text has the last token of a vocabulary that pads past the tokenizer's."""
    config = run_config(world, tmp_path, 2, **from_base(world, {**SETTINGS, **LORA, "total_steps": 2}))
    run_ = resolved(config)
    arch = replace(run_.arch, llm=replace(run_.arch.llm, vocab_size=len(run_.tokenizer) - 2))
    found = new_tokens(config, run_.tokenizer, arch)
    assert list(found) == [len(run_.tokenizer) - 2, len(run_.tokenizer) - 1] and new_tokens(config, run_.tokenizer, run_.arch) == {}
    fresh = replace(config, model=replace(config.model, init_random=True), training=replace(config.training, resume_from=None))
    assert new_tokens(fresh, run_.tokenizer, arch) == {}
    tokens = {run_.tokenizer.bos: "<|im_start|>", run_.arch.llm.vocab_size - 1: "<never>"}
    run_ranks(_execute_with_new_tokens, 2, config, 2, tokens, timeout=240)
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    (said,) = [event for event in events if event["event"] == "unseen_rows"]
    assert said["step"] == 1 and said["text"].startswith("1 of the 2 new rows of the vocabulary have not come in 2 steps ('<never>')")
