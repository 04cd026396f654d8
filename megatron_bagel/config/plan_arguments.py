"""Flags of ``python -m megatron_bagel.plan`` beside those of training, which describe the run to be planned."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_bagel.config.arguments import flag


@dataclass
class PlanArguments:
    """Model, machine, what a pack is made of, assumptions, and how to answer."""

    model: str | None = flag(
        None, "A named size (see --list_models), or a folder in BAGEL's released layout. Default: the folders that the training flags name."
    )
    list_models: bool = flag(False, "Print the named sizes and the GPU table, and leave.")
    gpu: str = flag("h100", "Kind of GPU, from the table of --list_models.")
    gpus: int = flag(8, "Number of GPUs.")
    search: bool = flag(False, "List the best layouts that fit, instead of planning the one that the flags give.")
    best: int = flag(10, "How many layouts --search lists.")
    json: bool = flag(False, "Print JSON instead of tables.")
    png: str | None = flag(None, "Write a picture of the memory of every pipeline stage to this file.")
    generation_share: float = flag(0.6, "Share of a pack's tokens in text-to-image samples; the rest answers questions about pictures.")
    image_size: int = flag(512, "Side of the generated pictures, in pixels.")
    caption_tokens: int = flag(96, "Tokens of a caption.")
    vit_image_size: int = flag(490, "Side of the pictures that questions are about, in pixels.")
    answer_tokens: int = flag(192, "Tokens of a question and its answer together; half of them have a loss.")
    gpu_memory_gib: float = flag(0.0, "Memory of a GPU; 0: the table's.")
    link_gbs: float = flag(0.0, "GB/s per GPU and direction inside a node; 0: the table's.")
    network_gbs: float = flag(0.0, "GB/s per GPU and direction between nodes; 0: the table's.")
    gpus_per_node: int = flag(0, "GPUs that share fast links; 0: the table's.")
    matmul_share: float = flag(0.6, "Assumed share of the peak that the decoder's matrix products reach.")
    attention_share: float = flag(0.35, "The same for attention, on the mask's exact area.")
    encoder_share: float = flag(0.35, "The same for ViT and autoencoder.")
    link_share: float = flag(0.75, "Assumed share of the links' rate inside a node.")
    network_share: float = flag(0.75, "Assumed share of the network's rate.")
    reserved_gib: float = flag(5.0, "Memory that CUDA, NCCL, kernels and a fragmented allocator take.")
