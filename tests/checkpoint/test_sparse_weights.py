# SPDX-License-Identifier: Apache-2.0
"""Weights of sparse experts: folders through layouts bit for bit, dense folders upcycled, and the names of Qwen3-30B-A3B."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from megatron_bagel.checkpoint.convert import Companions, export_checkpoint, import_folder
from megatron_bagel.checkpoint.dist.load import load_weights_only
from megatron_bagel.checkpoint.dist.saver import Saver
from megatron_bagel.checkpoint.dist.state import Trained
from megatron_bagel.checkpoint.hf.folder import HFFolder
from megatron_bagel.checkpoint.hf.load import load_weights
from megatron_bagel.checkpoint.hf.weight_map import WeightMap
from megatron_bagel.cli.convert import upcycle
from megatron_bagel.config.architecture import BagelArch, LLMArch, SparseArch
from megatron_bagel.config.megatron_arguments import MegatronArguments
from megatron_bagel.config.transformer_config import transformer_config
from megatron_bagel.encoders.vision_tower import VisionTower
from megatron_bagel.model.build import build_decoder
from megatron_bagel.model.positions import sincos_2d
from tests.checkpoint.hf.exported import export
from tests.distributed import run_ranks
from tests.model.test_sparse_experts import single_experts
from tests.training.equal_runs import cases

SPARSE = SparseArch(4, 2, 24, mlp_only_layers=(1,), shared_expert_intermediate_size=8, shared_expert_gate=True)
TP, PP, EP, ETP = (
    "tensor_model_parallel_size", "pipeline_model_parallel_size", "expert_model_parallel_size", "expert_tensor_parallel_size",
)  # fmt: skip
#: Pairs of layouts: the folder goes through both.
LAYOUTS: dict[str, tuple[tuple[int, dict[str, int]], ...]] = {
    "ep2, then tp2 x ep2": ((2, {EP: 2}), (2, {TP: 2, EP: 2, ETP: 1})),
    "pp2 x ep2, then tp2": ((4, {PP: 2, EP: 2}), (2, {TP: 2})),
    "ep4, then tp2 x ep2 x etp2": ((4, {EP: 4}), (4, {TP: 2, EP: 2, ETP: 2})),
}


def through(groups: dict[str, int], arch: BagelArch, there: Path, here: Path) -> None:
    """Load a checkpoint's weights on this layout and save them again."""
    from megatron.core import parallel_state

    sequence = {"sequence_parallel": True} if groups.get(TP, 1) > 1 else {}
    config = transformer_config(arch.llm, MegatronArguments(**{**groups, **sequence}))
    first, last = parallel_state.is_pipeline_first_stage(), parallel_state.is_pipeline_last_stage()
    modules: dict[str, torch.nn.Module] = {"decoder": build_decoder(arch, config, first, last)}
    if first:
        modules["vision"] = VisionTower(arch)
    with torch.no_grad():
        for module in modules.values():
            for parameter in module.parameters():
                parameter.fill_(float("nan"))
    load_weights_only(there, modules, arch, "model")
    Saver(here).save(1, Trained(modules, arch), {})


def sparse_folder(goldens: Path, out: Path) -> Path:
    """The goldens' model with sparse experts and random weights."""
    arch = HFFolder(goldens / "hf").arch
    return export(goldens, out, ("ema",), replace(arch, llm=replace(arch.llm, sparse=SPARSE)))


@pytest.mark.distributed
@pytest.mark.parametrize(("first", "second"), cases(LAYOUTS, "ep2, then tp2 x ep2"))
def test_a_folder_through_two_layouts_is_the_same_bit_for_bit(
    goldens: Path, tmp_path: Path, first: tuple[int, dict[str, int]], second: tuple[int, dict[str, int]]
) -> None:
    source = sparse_folder(goldens, tmp_path / "hf")
    arch, there = HFFolder(source).arch, import_folder(source, tmp_path / "imported")
    assert arch.llm.sparse == SPARSE
    for number, (ranks, groups) in enumerate((first, second)):
        here = tmp_path / str(number)
        run_ranks(through, ranks, groups, arch, there, here, parallel=groups, timeout=300)
        there = here / "0000001"
    companions = Companions(source, source / "ae.safetensors")
    out = export_checkpoint(there, tmp_path / "out", sincos_2d, ("model",), "keep", companions)
    recorded, written = load_file(source / "ema.safetensors"), load_file(out / "model.safetensors")
    assert written.keys() == recorded.keys()
    assert "language_model.model.layers.0.mlp_moe_gen.experts.3.up_proj.weight" in written
    for name, tensor in recorded.items():
        assert torch.equal(written[name], tensor), name


def test_an_upcycled_folder_computes_what_the_dense_one_did(goldens: Path, tmp_path: Path, single_rank: None) -> None:
    out = tmp_path / "sparse"
    flags = ["--num-experts", "3", "--moe-router-topk", "2", "--dense-layers", "1", "--output", str(out)]
    assert upcycle.main(["--model", str(goldens / "hf"), *flags]) == 0
    hidden, results = None, []
    for path in (goldens / "hf", out):
        folder = HFFolder(path)
        arch = folder.arch
        model = build_decoder(arch, transformer_config(arch.llm))
        modules = [model, VisionTower(arch)]
        load_weights(folder.weights(), WeightMap(arch), modules)
        hidden = torch.randn(9, 1, arch.llm.hidden_size, generator=torch.Generator().manual_seed(0)) if hidden is None else hidden
        from tests.model.tiny import EmptyPlan

        with torch.no_grad():
            results.append(model.decode(hidden[:, 0], 5, 4, torch.arange(9), EmptyPlan()))
    assert HFFolder(out).arch.llm.sparse is not None
    torch.testing.assert_close(results[1], results[0], atol=1e-5, rtol=1e-5)
    assert upcycle.main(["--model", str(out), *flags[:-1], str(tmp_path / "again")]) == 2


#: config.json of Qwen/Qwen3-30B-A3B, as published.
QWEN3_30B_A3B: dict[str, Any] = {
    "model_type": "qwen3_moe", "attention_bias": False, "decoder_sparse_step": 1, "head_dim": 128, "hidden_act": "silu",
    "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 6144, "max_position_embeddings": 40960, "mlp_only_layers": [],
    "moe_intermediate_size": 768, "norm_topk_prob": True, "num_attention_heads": 32, "num_experts": 128, "num_experts_per_tok": 8,
    "num_hidden_layers": 48, "num_key_value_heads": 4, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "tie_word_embeddings": False,
    "vocab_size": 151936,
}  # fmt: skip


def test_names_and_shapes_of_qwen3_30b_a3b() -> None:
    """transformers' model without memory has the tensors that the weight map asks of the folder, 30.5 billion numbers."""
    with torch.device("meta"):
        peer = Qwen3MoeForCausalLM(Qwen3MoeConfig(**QWEN3_30B_A3B))
    shapes = {f"language_model.{name}": tuple(value.shape) for name, value in single_experts(dict(peer.state_dict())).items()}
    llm = LLMArch.from_hf(QWEN3_30B_A3B, qk_norm=True)
    assert WeightMap(BagelArch(llm)).hf_shapes() == shapes
    total = sum(torch.Size(shape).numel() for shape in shapes.values())
    assert total == 30_532_122_624
    both = WeightMap(BagelArch(replace(llm, layer_module="Qwen2MoTDecoderLayer"))).hf_shapes()
    assert set(shapes) < set(both) and "language_model.model.layers.47.mlp_moe_gen.experts.127.down_proj.weight" in both
