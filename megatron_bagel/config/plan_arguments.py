# SPDX-License-Identifier: Apache-2.0
"""Flags of commands, besides those of training that describe the run."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_bagel.config.flag import command_flag as flag


@dataclass
class PrintArguments:
    """Flags of ``python -m megatron_bagel.train`` that print something in place of training."""

    print_config: bool = flag(
        False,
        "Print the resolved configuration as YAML that --config takes, then exit. For another number of ranks, add --dry_run "
        "--fake_world_size N.",
    )


@dataclass
class PlanArguments:
    """Flags of ``python -m megatron_bagel.plan``: model, machine, contents of a pack, assumptions, and form of the answer."""

    model: str | None = flag(
        None,
        "A named size (see --list_models), a folder in BAGEL's released format, or owner/name[@revision] on a hub. Default: the folders of "
        "the training flags.",
    )
    list_models: bool = flag(False, "Print the named sizes and the GPU table, then exit.")
    print_config: bool = flag(False, "Print the resolved training configuration for --gpus ranks as YAML that --config takes, then exit.")
    gpu: str = flag("h100", "GPU type, from the table of --list_models.")
    gpus: int = flag(8, "Number of GPUs.", minimum=1)
    search: bool = flag(False, "List the best parallel plans that fit, instead of planning the given one.")
    best: int = flag(10, "Number of parallel plans that --search lists.", minimum=1)
    json: bool = flag(False, "Print JSON instead of tables.")
    png: str | None = flag(None, "Write a picture of the memory of every pipeline stage to this file.")
    generation_share: float = flag(
        0.6, "Share of a pack's tokens in text-to-image samples. The rest answers questions about images.", minimum=0, maximum=1
    )
    image_size: int = flag(512, "Side of a generated image, in pixels.")
    caption_tokens: int = flag(96, "Tokens of a caption.")
    vit_image_size: int = flag(490, "Side of an image that questions are about, in pixels.")
    answer_tokens: int = flag(192, "Tokens of a question and its answer together. Half of them have a loss.")
    gpu_memory_gib: float = flag(0.0, "Memory of a GPU, in GiB. 0 takes the table's.")
    link_gbs: float = flag(0.0, "GB/s per GPU and direction inside a node. 0 takes the table's.")
    network_gbs: float = flag(0.0, "GB/s per GPU and direction between nodes. 0 takes the table's.")
    gpus_per_node: int = flag(0, "GPUs that share fast links. 0 takes the table's.")
    matmul_share: float = flag(0.6, "Assumed share of the peak that the decoder's matrix products reach.", above=0, maximum=1)
    attention_share: float = flag(0.35, "Assumed share of the peak that attention reaches, on the mask's exact area.", above=0, maximum=1)
    encoder_share: float = flag(0.35, "Assumed share of the peak that ViT and autoencoder reach.", above=0, maximum=1)
    link_share: float = flag(0.75, "Assumed share of the links' rate inside a node.", above=0, maximum=1)
    network_share: float = flag(0.75, "Assumed share of the network's rate.", above=0, maximum=1)
    reserved_gib: float = flag(5.0, "Memory that CUDA, NCCL, kernels and a fragmented allocator take, in GiB.", minimum=0)
    failures_per_gpu_day: float = flag(
        0.0005,
        "Assumed failures of one GPU per day that end the run, with those of its share of host and network. 419 interruptions in 54 days "
        "on 16,384 H100 (Llama 3) are 0.0005.",
        minimum=0,
    )
    restart_minutes: float = flag(10.0, "Assumed time from a failure to the first new step: noticing, new ranks, loading.", minimum=0)
    save_seconds: float = flag(30.0, "Assumed time for which a save stops the training. With async_save only the copy stops it.", above=0)
    straggler_share: float = flag(0.0, "Assumed share of a step that ranks wait for the slowest one.", minimum=0)
