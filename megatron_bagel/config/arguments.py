"""The original's flags, with its names and defaults: what the model is, what it is trained on, how it is trained.

Each field is a command-line flag (in both spellings) and a YAML key. Fields marked "ours" do not exist in the original.
Megatron's settings are in megatron_arguments.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


def flag(default: Any, text: str) -> Any:
    """A dataclass field with its help text; a list default is copied for every instance."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": text})
    return field(default=default, metadata={"help": text})


@dataclass
class ModelArguments:
    """Shape of the model, where its first weights come from, and how often conditions are dropped."""

    model_path: str = flag("hf/BAGEL-7B-MoT", "Folder in BAGEL's released layout; read when finetune_from_hf is True.")
    llm_path: str = flag(
        "hf/Qwen2.5-0.5B-Instruct/", "Qwen2 folder: config.json, weights, tokenizer. Not read when finetune_from_hf is True."
    )
    llm_qk_norm: bool = flag(True, "Normalise queries and keys per head. False gives a plain Qwen2.")
    tie_word_embeddings: bool = flag(False, "Share the token embedding with the output layer: fewer weights, for small models.")
    layer_module: Literal["Qwen2DecoderLayer", "Qwen2MoEDecoderLayer", "Qwen2MoTDecoderLayer"] = flag(
        "Qwen2MoTDecoderLayer", "What exists twice for image generation: everything (MoT), the MLPs (MoE), nothing."
    )
    vae_path: str = flag("flux/vae/ae.safetensors", "Autoencoder weights; an ae_config.json beside them gives another size than FLUX's.")
    vit_path: str = flag("hf/siglip-so400m-14-980-flash-attn2-navit/", "SigLIP folder: config.json and weights of the vision tower.")
    max_latent_size: int = flag(32, "Side of the latent position table, in latent tokens: the largest image. 64 for the released weights.")
    latent_patch_size: int = flag(2, "Latent cells per side of one latent token.")
    vit_patch_size: int = flag(14, "Pixels per side of one ViT patch; must equal the vision tower's own.")
    vit_max_num_patch_per_side: int = flag(70, "Side of the ViT's position grid, in patches: image_size / patch_size of the vision tower.")
    connector_act: str = flag("gelu_pytorch_tanh", "Activation of the connector between vision tower and decoder.")
    interpolate_pos: bool = flag(False, "Spread any image over the whole position grid (nearest cell) instead of its upper left corner.")
    vit_select_layer: int = flag(-2, "Which ViT layer feeds the connector; -1 is the last, -2 drops the last layer.")
    vit_rope: bool = flag(False, "2-D rotary positions inside the ViT, in place of learned ones.")
    text_cond_dropout_prob: float = flag(0.1, "Probability to drop a text condition; makes guidance on text possible.")
    vae_cond_dropout_prob: float = flag(0.3, "Probability to drop a clean VAE image condition.")
    vit_cond_dropout_prob: float = flag(0.3, "Probability to drop a ViT image condition.")
    tokenizer_path: str | None = flag(
        None, "Ours. Tokenizer folder or SentencePiece .model file. Default: that of model_path (finetune_from_hf) or llm_path."
    )
    init_random: bool = flag(
        False, "Ours. Start decoder and vision tower from seeded random weights: llm_path and vit_path need only config.json."
    )
    allow_missing: list[str] = flag(
        [], "Ours. Patterns (such as 'connector.*') of weights that a checkpoint may lack and that keep their seeded initial values."
    )


@dataclass
class DataArguments:
    """Where the samples are and how they fill packs."""

    dataset_config_file: str = flag("data/configs/example.yaml", "YAML of dataset groups with weights and image transforms.")
    prefetch_factor: int = flag(2, "Packs each worker prepares ahead.")
    num_workers: int = flag(4, "Processes per rank that read and decode images; 0 reads in the training process. No influence on results.")
    decode_threads: int = flag(
        2, "Ours. Threads of each such process that decode large images side by side; 0 or 1: none. No influence on results."
    )
    max_num_tokens_per_sample: int = flag(16384, "Longer samples are skipped, counted and listed.")
    max_num_tokens: int = flag(36864, "Capacity of a pack, never exceeded.")
    prefer_buffer_before: int = flag(16384, "In the original, waiting samples go first up to this fill. Here they always do.")
    max_buffer_size: int = flag(50, "How many samples may wait for a pack they fit into: a longer window fills packs better.")
    data_seed: int = flag(42, "Seed of the order of samples.")
    data_root: str | None = flag(None, "Ours. Folder with t2i/, editing/, vlm/ as in the guide, for datasets without paths in the YAML.")
    index_dir: str | None = flag(
        None, "Ours. Folder written by data_tools/build_index.py. Default: index/ in results_dir, built there at the first start."
    )
    max_skipped_share: float = flag(
        0.01, "Ours. Samples that cannot be read are replaced and listed; more than this share of a run (and than ten) end it."
    )
    split: str | None = flag(
        None, 'Ours. Weights of training and validation rows, such as "99,1": one row of every 100 of each dataset is held out.'
    )
    latent_cache: str | None = flag(
        None, "Ours. Folder made by data_tools/cache_latents.py: images of the generation groups are not encoded, and no VAE is loaded."
    )


@dataclass
class TrainingArguments:
    """Schedule, losses, freezing, logs and checkpoints."""

    visual_gen: bool = flag(True, "Train image generation. False for data without it (VLM only).")
    visual_und: bool = flag(True, "Train image understanding. False for data without it (T2I only).")
    results_dir: str = flag("results", "Logs, metrics.jsonl, config.yaml and curves.")
    checkpoint_dir: str = flag("results/checkpoints", "Checkpoints, one folder per saved step.")
    wandb_project: str = flag("bagel", "W&B project. Giving any wandb flag turns W&B on.")
    wandb_name: str = flag("run", "W&B run name.")
    wandb_runid: str = flag("0", "Distinguishes W&B runs of the same name.")
    wandb_resume: Literal["allow", "must", "never", "auto"] = flag("allow", "What W&B does when the run exists.")
    wandb_offline: bool = flag(False, "Keep W&B's records on disk, to send later.")
    use_wandb: bool | None = flag(None, "Ours. Log to W&B. Default: when any other wandb flag is given.")
    global_seed: int = flag(4396, "Seed of initial weights, noise, timesteps and condition dropout.")
    auto_resume: bool = flag(False, "Continue from the newest complete checkpoint in checkpoint_dir, where there is one.")
    resume_from: str | None = flag(None, "Checkpoint or BAGEL folder to start from when auto_resume finds none.")
    resume_model_only: bool = flag(False, "Take only weights from resume_from: step 0, fresh optimizer.")
    finetune_from_ema: bool = flag(False, "With resume_model_only: take the EMA weights for model and EMA alike.")
    finetune_from_hf: bool = flag(False, "Take architecture, tokenizer and autoencoder from model_path.")
    log_every: int = flag(10, "Steps between log lines.")
    eval_every: int = flag(0, "Ours. Steps between evaluations on the rows that --split holds out; 0 never evaluates.")
    eval_samples: int = flag(64, "Ours. Held-out samples of every dataset that the losses are measured on; more are steadier and slower.")
    eval_pictures: int = flag(4, "Ours. Held-out samples of every dataset that are drawn or answered into results_dir/samples; 0 for none.")
    eval_timesteps: int = flag(25, "Ours. Points in time of these pictures; N make N - 1 passes.")
    eval_cfg_text_scale: float = flag(4.0, "Ours. How strongly these pictures are pulled towards their text; 1 halves their cost.")
    eval_cfg_img_scale: float = flag(1.5, "Ours. How strongly edited pictures are pulled towards what they are given; 1 is off.")
    eval_answer_tokens: int = flag(32, "Ours. Most tokens of an answer; each takes a pass.")
    save_every: int = flag(2000, "Steps between checkpoints.")
    async_save: bool = flag(False, "Ours (Megatron's name). Write checkpoints in the background, while training goes on.")
    keep_last: int = flag(0, "Ours. Keep this many of the newest checkpoints and remove older ones; 0 keeps all.")
    keep_every: int = flag(0, "Ours. With keep_last: checkpoints of steps divisible by this stay for good; 0 for none.")
    verify_checkpoint: bool = flag(True, "Ours. Compare the checksums of a checkpoint before it is loaded; reads it once more.")
    export_hf_every: int = flag(
        0, "Ours. Steps between model folders (EMA, released layout) written to hf/ in results_dir from a checkpoint saved then; 0: none."
    )
    total_steps: int = flag(500_000, "Optimizer steps to run.")
    warmup_steps: int = flag(2000, "Steps of linear warm-up.")
    lr_scheduler: Literal["constant", "cosine"] = flag("constant", "Learning rate after warm-up.")
    lr: float = flag(1e-4, "Peak learning rate.")
    min_lr: float = flag(1e-7, "Learning rate at the end of cosine.")
    beta1: float = flag(0.9, "AdamW.")
    beta2: float = flag(0.95, "AdamW.")
    eps: float = flag(1e-15, "AdamW. So small that updates are nearly signs where gradients are tiny.")
    ema: float = flag(0.9999, "Decay of the moving average of the weights.")
    max_grad_norm: float = flag(1.0, "Clip gradients to this global norm; 0 turns clipping off.")
    timestep_shift: float = flag(1.0, "Above 1 moves drawn timesteps towards noise, for large images.")
    mse_weight: float = flag(1.0, "Weight of the image loss.")
    ce_weight: float = flag(1.0, "Weight of the text loss.")
    ce_loss_reweighting: bool = flag(False, "Weigh each text by the inverse square root of its length instead of by its tokens.")
    expected_num_tokens: int = flag(32768, "A pack is filled in stream order up to here, and from here to max_num_tokens by best fit.")
    gradient_accumulation_steps: int = flag(1, "Packs per data-parallel replica and step. Losses are normalised over all of them together.")
    peak_device_tflops: float = flag(0.0, "Peak rate of one device, for MFU; 0 looks it up by device name.")
    num_replicate: int = flag(1, "Replicas of the optimizer state (HYBRID_SHARD): becomes num_distributed_optimizer_instances.")
    num_shard: int = flag(8, "Ranks that share one copy of the optimizer state (HYBRID_SHARD). Without the flag: as many as there are.")
    sharding_strategy: str = flag("HYBRID_SHARD", "FSDP's name for what is sharded: becomes settings of Megatron's distributed optimizer.")
    backward_prefetch: str = flag("BACKWARD_PRE", "FSDP's. Overlap is set by overlap_grad_reduce and overlap_param_gather here.")
    cpu_offload: bool = flag(False, "FSDP's. True is refused: optimizer state is sharded over ranks, not moved to host memory.")
    freeze_llm: bool = flag(False, "Train nothing of the decoder's layers, embeddings and output layer.")
    freeze_vit: bool = flag(False, "Train nothing of the vision tower; its connector still trains.")
    freeze_vae: bool = flag(True, "The autoencoder is never trained; False is refused.")
    freeze_und: bool = flag(False, "Let no gradient reach the understanding expert; the generation expert trains.")
    copy_init_moe: bool = flag(True, "Start the generation expert from the understanding expert's weights.")
    use_flex: bool = flag(False, "FlexAttention on CUDA (False: SDPA). On CPU, where it has no backward pass, SDPA either way.")
    zero_lr_first_step: bool = flag(False, "Ours. The original's warm-up, whose first step has learning rate 0; else it starts at lr / n.")
    vae_encode_padded: bool = flag(
        False, "Ours. The original's encoding: images of a pack padded to one size, so that latents depend on their neighbours."
    )
    vae_encode_bf16: bool = flag(False, "Ours. The original's encoding: the autoencoder under bf16 autocast; else fp32.")
