# SPDX-License-Identifier: Apache-2.0
"""Presents a plan: tables on the terminal, and a picture of the memory of each stage."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from megatron_bagel.planning.communication import sent_by_axis
from megatron_bagel.planning.goodput import Goodput, Reliability
from megatron_bagel.planning.gpus import GPUS
from megatron_bagel.planning.memory import StageMemory
from megatron_bagel.planning.models import MODELS, parameters
from megatron_bagel.planning.parallel_plan import GIB, ParallelPlan, Problem

#: Lines of the memory table: title -> bytes of a stage.
_MEMORY = {
    "weights": lambda stage: stage.static.weight_bytes,
    "gradients": lambda stage: stage.static.gradient_bytes,
    "optimizer": lambda stage: stage.static.optimizer_bytes,
    "average (EMA)": lambda stage: stage.static.average_bytes,
    "activations": lambda stage: stage.activations,
    "buffers": lambda stage: stage.buffers,
    "encoders": lambda stage: stage.encoders,
    "encoding beyond activations": lambda stage: max(0, stage.encoding - stage.activations),
}


def table(rows: Sequence[Sequence[str]]) -> str:
    """Align the rows in columns, the first to the left and the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    sides = [str.ljust, *[str.rjust] * (len(widths) - 1)]
    lines = ("  ".join(side(cell, width) for side, cell, width in zip(sides, row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def shown_stages(stages: Sequence[StageMemory]) -> list[StageMemory]:
    """Return all stages if there are few, else the first two, the one with the highest peak, and the last."""
    if len(stages) <= 8:
        return list(stages)
    highest = max(stages, key=lambda stage: stage.peak)
    return [stages[number] for number in sorted({0, 1, highest.stage, len(stages) - 1})]


def plan_text(plan: ParallelPlan, problem: Problem) -> str:
    """Return the text of a plan."""
    sizes, work = plan.sizes, plan.work
    head = (
        f"{plan.name} on {problem.gpus} x {problem.gpu.name}; {sizes.global_batch_size} packs per step, {sizes.num_microbatches} per "
        f"replica, {problem.pack.sequence_length} tokens each ({_mix(problem)}); {'bf16' if sizes.bf16 else 'fp32'}, "
        f"attention {sizes.attention_backend}, encoder memory {plan.inputs.megatron.encoder_memory}"
    )
    verdict = (
        f"peak {plan.peak_bytes / GIB:.1f} GiB of {problem.gpu.memory_gib:g} GiB ({problem.assumptions.reserved_gib:g} GiB are reserved): "
        f"{'fits' if plan.fits else 'DOES NOT FIT'}"
    )
    tables = [memory_table(plan, problem), verdict, mode_table(plan), flops_table(plan), traffic_table(plan), time_text(plan, problem)]
    return "\n\n".join([head, *_parameters(plan), *tables, f"tokens per step: {work.tokens:,}"])


def _parameters(plan: ParallelPlan) -> list[str]:
    """Return a line about the parameters of a model with sparse experts, of which a token meets only some."""
    if plan.inputs.arch.llm.sparse is None:
        return []
    billions = {name: count / 1e9 for name, count in plan.parameters.items()}
    return [
        f"{billions['total']:.2f} billion parameters and tables; {billions['active_und']:.2f} serve a text or ViT token and "
        f"{billions['active_gen']:.2f} a VAE token. Memory and traffic assume that routers choose all experts equally often"
    ]


def _mix(problem: Problem) -> str:
    pack = problem.pack
    return f"{len(pack.text_positions)} text, {len(pack.vit_positions)} ViT, {len(pack.vae_positions)} VAE"


def memory_table(plan: ParallelPlan, problem: Problem) -> str:
    """Return a table of the GiB per rank of each stage."""
    stages = shown_stages(plan.memory)
    rows = [["GiB per rank", *(f"stage {stage.stage}" for stage in stages)]]
    rows.append(["parameters, millions", *(f"{stage.static.parameters / 1e6:.1f}" for stage in stages)])
    rows += [[title, *(f"{amount(stage) / GIB:.2f}" for stage in stages)] for title, amount in _MEMORY.items()]
    if any(stage.static.host_bytes for stage in stages):
        rows.append(["in host memory besides", *(f"{stage.static.host_bytes / GIB:.2f}" for stage in stages)])
    rows.append(["peak", *(f"{stage.peak / GIB:.2f}" for stage in stages)])
    rows.append(["share of the GPU", *(f"{stage.peak / GIB / problem.gpu.memory_gib:.0%}" for stage in stages)])
    return table(rows)


def mode_table(plan: ParallelPlan) -> str:
    """Return a table of the activations with each mode of recomputation."""
    stages = shown_stages(plan.memory)
    rows = [["activations, GiB, by recompute", *(f"stage {stage.stage}" for stage in stages)]]
    rows += [[name, *(f"{stage.by_mode[name] / GIB:.2f}" for stage in stages)] for name in stages[0].by_mode]
    return table(rows)


def flops_table(plan: ParallelPlan) -> str:
    """Return a table of the TFLOP per step by part."""
    rows = [["TFLOP per step", ""], *([name.replace("_", " "), f"{value / 1e12:,.1f}"] for name, value in asdict(plan.flops).items())]
    rows.append(["without recomputation", f"{plan.flops.total / 1e12:,.1f}"])
    rows.append(["with recomputation", f"{(plan.flops.total + plan.recomputed) / 1e12:,.1f}"])
    return table(rows)


def traffic_table(plan: ParallelPlan) -> str:
    """Return a table of the GiB that a rank sends per step by axis."""
    stages = [stage.stage for stage in shown_stages(plan.memory)]
    sent = {stage: sent_by_axis(plan.calls[stage]) for stage in stages}
    rows = [["GiB sent per rank and step", *(f"stage {stage}" for stage in stages)]]
    axes = [axis for axis in sent[stages[0]] if axis != "expert" or plan.inputs.arch.llm.sparse is not None]
    rows += [[axis, *(f"{sent[stage][axis] / GIB:.3f}" for stage in stages)] for axis in axes]
    return table(rows)


def time_text(plan: ParallelPlan, problem: Problem) -> str:
    """Return the predicted times and the assumptions of the prediction."""
    estimate, gpu = plan.estimate, problem.gpu
    rows = [["seconds per step (predicted)", ""]]
    seconds = {name: value for name, value in estimate.to_dict().items() if name.endswith("_s") and name != "tokens_per_s"}
    if plan.inputs.arch.llm.sparse is None:
        del seconds["expert_s"]
    rows += [[name.removesuffix("_s").replace("_", " "), f"{value:.3f}"] for name, value in seconds.items()]
    assumptions = ", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in asdict(problem.assumptions).items())
    return "\n".join([
        table(rows),
        f"pipeline bubble {estimate.bubble:.1%}, {estimate.tokens_per_s:,.0f} tokens/s, MFU {estimate.mfu:.1%} by the original's formula, "
        f"{estimate.work_mfu:.1%} by work done",
        f"assumed: {gpu.tflops:g} TFLOP/s, {gpu.link_gbs:g} GB/s inside a node of {gpu.gpus_per_node}, {gpu.network_gbs:g} GB/s between "
        f"nodes ({gpu.source}); {assumptions}. Not measured on any GPU.",
    ])  # fmt: skip


def goodput_text(goodput: Goodput, reliability: Reliability) -> str:
    """Return what failures and saves cost a long run, with the assumptions."""
    if math.isinf(goodput.hours_between_failures):
        return f"without failures saves leave {goodput.ettr:.2%} of the time for training (every {goodput.save_every} steps)"
    return "\n".join([
        f"long runs: a failure every {goodput.hours_between_failures:,.1f} hours; {goodput.ettr:.1%} of the time trains with a save every "
        f"{goodput.save_every} steps, {goodput.best_ettr:.1%} with one every {goodput.best_save_every} steps, which is best",
        f"assumed: {reliability.failures_per_gpu_day:g} failures per GPU and day, {reliability.restart_seconds / 60:g} minutes for a "
        f"restart, {reliability.save_seconds:g} s for a save, {reliability.straggler_share:.0%} of a step waiting for the slowest rank",
    ])  # fmt: skip


def search_text(plans: Sequence[ParallelPlan], total: int, problem: Problem) -> str:
    """Return a table of the best plans, one in each line."""
    rows = [["parallel sizes", "packs/replica", "peak GiB", "bubble", "step s", "tokens/s", "MFU", "work MFU"]]
    rows += [
        [
            plan.name, str(plan.sizes.num_microbatches), f"{plan.peak_bytes / GIB:.1f}", f"{plan.estimate.bubble:.1%}",
            f"{plan.estimate.step_time_s:.2f}", f"{plan.estimate.tokens_per_s:,.0f}",
            f"{plan.estimate.mfu:.1%}", f"{plan.estimate.work_mfu:.1%}",
        ]
        for plan in plans
    ]  # fmt: skip
    first = (
        f"{total} choices of parallel sizes fit {problem.gpus} x {problem.gpu.name}; the fastest by prediction (not measured on any GPU):"
    )
    return "\n".join([first, table(rows)])


def tables_of_names() -> str:
    """Return tables of the named model sizes and the kinds of GPUs."""
    models = [["model", "parameters and tables, billions", "layers", "hidden"]]
    models += [[name, f"{parameters(a) / 1e9:.3f}", str(a.llm.num_hidden_layers), str(a.llm.hidden_size)] for name, a in MODELS.items()]
    gpus = [["gpu", "GiB", "TFLOP/s bf16", "GB/s link", "GB/s network", "source"]]
    for name, gpu in GPUS.items():
        gpus.append([name, *(f"{value:g}" for value in (gpu.memory_gib, gpu.tflops, gpu.link_gbs, gpu.network_gbs)), gpu.source])
    return f"{table(models)}\n\n{table(gpus)}"


def memory_picture(plan: ParallelPlan, problem: Problem, path: str | Path) -> None:
    """Draw the memory of each stage as stacked bars, with a line for the memory of a GPU."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    stages = range(len(plan.memory))
    figure, axes = plt.subplots(figsize=(max(5.0, 0.6 * len(stages) + 3), 4.5))
    bottoms = [0.0] * len(stages)
    for title, amount in _MEMORY.items():
        heights = [amount(stage) / GIB for stage in plan.memory]
        axes.bar(stages, heights, bottom=bottoms, label=title)
        bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
    axes.axhline(problem.gpu.memory_gib, color="black", linestyle="--", label=f"{problem.gpu.name}")
    axes.axhline(problem.memory_bytes / GIB, color="grey", linestyle=":", label="without the reserved memory")
    axes.set(xlabel="pipeline stage", ylabel="GiB per rank", title=plan.name, xticks=list(stages))
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)
