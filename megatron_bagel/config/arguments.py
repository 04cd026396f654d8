# SPDX-License-Identifier: Apache-2.0
"""The original's flags, with its names and defaults: what the model is, what it is trained on, how it is trained.

Each field is a command-line flag (in both spellings) and a YAML key. ``original_flag`` marks those that the original BAGEL has.
Megatron's settings are in megatron_arguments.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_bagel.config.flag import FREE, MUST_MATCH, SAID, flag, megatron_flag, original_flag
from megatron_bagel.config.original_flags import SHARDING_STRATEGIES, as_is, becomes, refused


@dataclass
class ModelArguments:
    """Flags of the model: its shape, the source of its first weights, and the dropout of conditions."""

    model_path: str = original_flag(
        "hf/BAGEL-7B-MoT",
        "Folder in BAGEL's released format, or owner/name[@revision] on a hub. Only read with finetune_from_hf.",
        on_resume=SAID,
    )
    llm_path: str = original_flag(
        "hf/Qwen2.5-0.5B-Instruct/",
        "Qwen2 folder with config.json, weights and tokenizer, or owner/name[@revision] on a hub. Not read with finetune_from_hf.",
        on_resume=FREE,
    )
    llm_qk_norm: bool = original_flag(True, "Normalise queries and keys per head. False gives a plain Qwen2.", on_resume=MUST_MATCH)
    tie_word_embeddings: bool = original_flag(
        False, "Share the token embedding with the output layer. This saves weights, which matters for small models.", on_resume=MUST_MATCH
    )
    layer_module: Literal["Qwen2DecoderLayer", "Qwen2MoEDecoderLayer", "Qwen2MoTDecoderLayer"] = original_flag(
        "Qwen2MoTDecoderLayer",
        "What has a second copy for image generation: the whole layer (MoT), its MLP (MoE), or nothing.",
        on_resume=MUST_MATCH,
    )
    vae_path: str = original_flag(
        "flux/vae/ae.safetensors",
        "Autoencoder weights, or owner/name[@revision] on a hub with an ae.safetensors. If the autoencoder is not FLUX's, put its sizes "
        "beside them in ae_config.json.",
        on_resume=SAID,
    )
    vit_path: str = original_flag(
        "hf/siglip-so400m-14-980-flash-attn2-navit/",
        "SigLIP folder with config.json and the weights of the vision tower, or owner/name[@revision] on a hub.",
        on_resume=FREE,
    )
    max_latent_size: int = original_flag(
        32,
        "Side of the latent position table, in latent tokens. It limits the image size. The released weights use 64.",
        minimum=1,
        on_resume=SAID,
    )
    latent_patch_size: int = original_flag(2, "Side of a latent token, in latent cells.", minimum=1, on_resume=MUST_MATCH)
    vit_patch_size: int = original_flag(
        14, "Side of a ViT patch, in pixels. Must equal the vision tower's.", minimum=1, on_resume=MUST_MATCH
    )
    vit_max_num_patch_per_side: int = original_flag(
        70, "Side of the ViT's position grid, in patches: the vision tower's image_size / patch_size.", minimum=1, on_resume=MUST_MATCH
    )
    connector_act: str = original_flag(
        "gelu_pytorch_tanh", "Activation of the connector between vision tower and decoder.", on_resume=MUST_MATCH
    )
    interpolate_pos: bool = original_flag(
        False, "Spread every image over the whole position grid, by nearest cell. False uses the grid's upper left corner.", on_resume=SAID
    )
    vit_select_layer: int = original_flag(
        -2, "ViT layer that feeds the connector. -1 is the last, -2 the one before it.", on_resume=MUST_MATCH
    )
    vit_rope: bool = original_flag(False, "Use 2-D rotary positions in the ViT instead of learned ones.", on_resume=MUST_MATCH)
    text_cond_dropout_prob: float = original_flag(
        0.1, "Probability of dropping a text condition. Dropping makes guidance on text possible.", minimum=0, maximum=1, on_resume=SAID
    )
    vae_cond_dropout_prob: float = original_flag(
        0.3, "Probability of dropping a clean VAE image condition.", minimum=0, maximum=1, on_resume=SAID
    )
    vit_cond_dropout_prob: float = original_flag(
        0.3, "Probability of dropping a ViT image condition.", minimum=0, maximum=1, on_resume=SAID
    )
    tokenizer_path: str | None = flag(
        None,
        "Tokenizer folder, SentencePiece .model file, or owner/name[@revision] on a hub. Default: model_path with finetune_from_hf, else "
        "llm_path.",
        on_resume=FREE,
    )
    init_random: bool = flag(
        False,
        "Start decoder and vision tower from seeded random weights. llm_path and vit_path then need only config.json.",
        on_resume=FREE,
    )
    grow_vocabulary: bool = flag(
        False,
        "Add rows with seeded values to the vocabulary of a model folder whose tokenizer has more tokens than its table has rows. False "
        "refuses such a folder.",
        on_resume=FREE,
    )
    allow_missing: list[str] = flag(
        [], "Patterns, such as 'connector.*', of weights that a checkpoint may lack. They keep their seeded initial values.", on_resume=FREE
    )


@dataclass
class DataArguments:
    """Flags of the data: where samples are and how they fill packs."""

    dataset_config_file: str = original_flag(
        "data/configs/example.yaml", "YAML file of dataset groups, weights and image transforms.", on_resume=FREE
    )
    prefetch_factor: int = original_flag(2, "Packs that each worker prepares ahead.", minimum=1, on_resume=FREE)
    num_workers: int = original_flag(
        4, "Processes per rank that read and decode images. 0 reads in the training process. Results do not depend on it.", minimum=0,
        compatibility=as_is("0, which fails in the original, reads in the training process"), on_resume=FREE,
    )  # fmt: skip
    decode_threads: int = flag(
        2,
        "Threads per worker that decode large images in parallel. 0 and 1 use none. Results do not depend on it.",
        minimum=0,
        on_resume=FREE,
    )
    max_num_tokens_per_sample: int = original_flag(16384, "Skip longer samples. They are counted and listed.", minimum=1, on_resume=SAID)
    max_num_tokens: int = original_flag(
        36864, "Capacity of a pack. No pack exceeds it.", minimum=1, aliases=("seq_length",),
        compatibility=as_is("a hard limit here"), on_resume=SAID,
    )  # fmt: skip
    prefer_buffer_before: int = original_flag(
        16384, "In the original, waiting samples go first until a pack is this full. Here they always go first.",
        compatibility=becomes("nothing, as waiting samples always go first; the start-up log says so when the flag is given"),
        on_resume=FREE,
    )  # fmt: skip
    max_buffer_size: int = original_flag(
        50, "Number of samples that may wait for a pack with room for them. A larger number fills packs better.", minimum=0,
        compatibility=becomes("the planner's window of waiting samples; none is ever lost"), on_resume=SAID,
    )  # fmt: skip
    data_seed: int = original_flag(42, "Seed of the sample order.", on_resume=SAID)
    data_root: str | None = flag(
        None, "Folder with t2i/, editing/ and vlm/, as in the guide, for datasets without paths in the YAML file.", on_resume=FREE
    )
    index_dir: str | None = flag(
        None, "Folder written by data_tools/build_index.py, or its URL in an object store. Default: results_dir/index, which the first "
        "start builds.", on_resume=FREE,
    )  # fmt: skip
    index_cache_dir: str | None = flag(
        None,
        "Folder on a disk of each machine for shards of an index at a URL. Shards are fetched when they are first used.",
        on_resume=FREE,
    )
    index_cache_bytes: int | None = flag(
        None, "Limit of the bytes that the index takes in --index_cache_dir. Shards that were not used for longest are removed. Default: "
        "no limit.", minimum=1, on_resume=FREE,
    )  # fmt: skip
    max_skipped_share: float = flag(
        0.01, "Share of unreadable samples above which the run ends. Ten are always allowed. Each is replaced and listed.",
        minimum=0, maximum=1, on_resume=FREE,
    )  # fmt: skip
    check_data: Literal["small", "full"] = flag(
        "small", "Checksums that are compared as samples are read: those of texts and of small images, or those of all images and stored "
        "latents ('full'), which takes some percent of the reading time.", on_resume=FREE,
    )  # fmt: skip
    split: str | None = flag(
        None,
        'Weights of training and validation rows. With "99,1", one row in 100 of each dataset is held out for evaluation.',
        on_resume=SAID,
    )
    latent_cache: str | None = flag(
        None,
        "Folder made by data_tools/cache_latents.py. Images of the generation groups are then not encoded, and no VAE is loaded.",
        on_resume=SAID,
    )


@dataclass
class TrainingArguments:
    """Flags of training: schedule, losses, freezing, logs and checkpoints."""

    visual_gen: bool = original_flag(
        True, "Train image generation. Set False for data without it (VLM only).",
        compatibility=as_is("with True, a pack without generation tokens trains too"), on_resume=MUST_MATCH,
    )  # fmt: skip
    visual_und: bool = original_flag(
        True, "Train image understanding. Set False for data without it (T2I only).",
        compatibility=as_is("with True, a pack without understanding tokens trains too"), on_resume=MUST_MATCH,
    )  # fmt: skip
    results_dir: str = original_flag("results", "Folder for logs, metrics.jsonl, config.yaml and curves.", on_resume=FREE)
    checkpoint_dir: str = original_flag(
        "results/checkpoints", "Folder for checkpoints. Each saved step has a folder of its own.", on_resume=FREE
    )
    wandb_project: str = original_flag(
        "bagel", "W&B project. Giving any wandb flag turns W&B on.",
        compatibility=as_is("W&B is on when any wandb flag is given; the original always logs to it"), on_resume=FREE,
    )  # fmt: skip
    wandb_name: str = original_flag("run", "W&B run name.", aliases=("wandb_exp_name",), on_resume=FREE)
    wandb_runid: str = original_flag("0", "ID that distinguishes W&B runs of the same name.", on_resume=FREE)
    wandb_resume: Literal["allow", "must", "never", "auto"] = original_flag("allow", "What W&B does when the run exists.", on_resume=FREE)
    wandb_offline: bool = original_flag(False, "Keep W&B's records on disk, to upload later.", on_resume=FREE)
    use_wandb: bool | None = flag(None, "Log to W&B. Default: True when any other wandb flag is given.", on_resume=FREE)
    global_seed: int = original_flag(
        4396, "Seed of initial weights, noise, timesteps and condition dropout.", aliases=("seed",), on_resume=MUST_MATCH
    )
    auto_resume: bool = original_flag(
        False, "Continue from the newest complete checkpoint in checkpoint_dir, if there is one.", on_resume=FREE
    )
    overwrite_run: bool = flag(
        False, "Move the files of an earlier run in results_dir and checkpoint_dir aside, and start a new run there.", on_resume=FREE
    )
    resume_from: str | None = original_flag(
        None, "Checkpoint, BAGEL folder, or owner/name[@revision] on a hub to start from when auto_resume finds none.",
        compatibility=as_is("a path that does not exist is refused; the original silently trains from scratch"), on_resume=FREE,
    )  # fmt: skip
    resume_model_only: bool = original_flag(
        False, "Take only weights from resume_from. The step count and the optimizer start fresh.", on_resume=FREE
    )
    finetune_from_ema: bool = original_flag(
        False, "With resume_model_only, load the EMA weights into both the model and its EMA.", on_resume=FREE
    )
    weights_name: str | None = flag(
        None,
        "Weight file of the model folder resume_from, if it has another name than ema.safetensors or model.safetensors.",
        on_resume=FREE,
    )
    finetune_from_hf: bool = original_flag(False, "Take architecture, tokenizer and autoencoder from model_path.", on_resume=FREE)
    log_every: int = original_flag(10, "Steps between log lines.", minimum=1, aliases=("log_interval",), on_resume=FREE)
    eval_every: int = flag(0, "Steps between evaluations on the rows that --split holds out. 0 never evaluates.", minimum=0, on_resume=FREE)
    eval_at_start: bool = flag(False, "Evaluate the starting weights too, before the first step. Needs eval_every.", on_resume=FREE)
    eval_samples: int = flag(
        64, "Held-out samples per dataset for the losses. More make the losses less noisy and slower.", minimum=1, on_resume=FREE
    )
    eval_pictures: int = flag(
        4, "Held-out samples per dataset to draw or answer in results_dir/samples. 0 draws none.", minimum=0, on_resume=FREE
    )
    eval_timesteps: int = flag(25, "Timesteps of each evaluation picture. N timesteps take N - 1 passes.", minimum=2, on_resume=FREE)
    eval_cfg_text_scale: float = flag(
        4.0, "Guidance on text for evaluation pictures. 1 turns it off and halves their cost.", minimum=1, on_resume=FREE
    )
    eval_cfg_img_scale: float = flag(
        1.5, "Guidance on the input image for edited evaluation pictures. 1 turns it off.", minimum=1, on_resume=FREE
    )
    eval_answer_tokens: int = flag(32, "Maximum length of an evaluation answer. Each token takes a pass.", minimum=1, on_resume=FREE)
    save_every: int = original_flag(2000, "Steps between checkpoints.", minimum=1, aliases=("save_interval",), on_resume=FREE)
    async_save: bool = megatron_flag(False, "Write checkpoints in the background while training continues.", on_resume=FREE)
    keep_last: int = flag(0, "Keep this many of the newest checkpoints and remove older ones. 0 keeps all.", minimum=0, on_resume=FREE)
    keep_every: int = flag(
        0, "With keep_last, also keep checkpoints of steps divisible by this number. 0 keeps no others.", minimum=0, on_resume=FREE
    )
    verify_checkpoint: bool = flag(True, "Compare a checkpoint's checksums before loading it. This reads it one more time.", on_resume=FREE)
    check_weights: Literal["sampled", "full"] = flag(
        "sampled", "Weights that are loaded must be finite. This checks some thousand values of each tensor, or all of them ('full').",
        on_resume=FREE,
    )  # fmt: skip
    export_hf_every: int = flag(
        0, "Steps between exports to results_dir/hf: EMA weights in the released format, from a checkpoint saved then. 0 never exports.",
        minimum=0, on_resume=FREE,
    )  # fmt: skip
    total_steps: int = original_flag(500_000, "Optimizer steps to run.", minimum=1, aliases=("train_iters",), on_resume=SAID)
    warmup_steps: int = original_flag(2000, "Steps of linear warm-up.", minimum=0, aliases=("lr_warmup_iters",), on_resume=SAID)
    lr_scheduler: Literal["constant", "cosine"] = original_flag(
        "constant", "Learning rate after warm-up.", aliases=("lr_decay_style",), on_resume=SAID
    )
    lr: float = original_flag(1e-4, "Peak learning rate.", minimum=0, on_resume=SAID)
    min_lr: float = original_flag(1e-7, "Learning rate at the end of the cosine schedule.", minimum=0, on_resume=SAID)
    beta1: float = original_flag(0.9, "AdamW's decay of the gradient average.", minimum=0, below=1, aliases=("adam_beta1",), on_resume=SAID)
    beta2: float = original_flag(
        0.95, "AdamW's decay of the squared gradient average.", minimum=0, below=1, aliases=("adam_beta2",), on_resume=SAID
    )
    eps: float = original_flag(
        1e-15,
        "AdamW's epsilon. At 1e-15, updates are nearly signs where gradients are tiny.",
        minimum=0,
        aliases=("adam_eps",),
        on_resume=SAID,
    )
    ema: float = original_flag(
        0.9999, "Decay of the moving average of the weights. auto is 0.9999 with ema_warmup.", minimum=0, maximum=1, on_resume=SAID
    )
    ema_warmup: bool = flag(
        False, "Raise the decay from 0.1 to ema with the steps done: min(ema, (1 + steps) / (10 + steps)). Short runs then keep little of "
        "their starting weights.", on_resume=SAID,
    )  # fmt: skip
    max_grad_norm: float = original_flag(
        1.0, "Clip gradients to this global norm. 0 turns clipping off.", minimum=0, aliases=("clip_grad",), on_resume=SAID
    )
    timestep_shift: float = original_flag(
        1.0, "Values above 1 move timesteps towards noise, which suits large images.", above=0, on_resume=SAID
    )
    mse_weight: float = original_flag(1.0, "Weight of the image loss.", minimum=0, on_resume=SAID)
    ce_weight: float = original_flag(1.0, "Weight of the text loss.", minimum=0, on_resume=SAID)
    ce_loss_reweighting: bool = original_flag(
        False, "Weight each text by 1 / sqrt(length) instead of weighting all tokens equally.", on_resume=SAID
    )
    expected_num_tokens: int = original_flag(
        32768, "Fill packs in stream order up to this many tokens, then by best fit up to max_num_tokens.", minimum=1,
        compatibility=becomes("the fill of a pack in stream order; best fit from the window continues up to max_num_tokens"),
        on_resume=SAID,
    )  # fmt: skip
    gradient_accumulation_steps: int = original_flag(
        1, "Packs per data-parallel replica and step. Losses are normalised over all of them together.", minimum=1,
        compatibility=becomes(
            "packs per replica and step; losses are normalised over the whole global batch, where the original uses the micro-step"
        ), on_resume=FREE,
    )  # fmt: skip
    peak_device_tflops: float = original_flag(
        0.0, "Peak rate of one device, for MFU. 0 looks it up by device name.", minimum=0, on_resume=FREE
    )
    num_replicate: int = original_flag(
        1, "Replicas of the optimizer state (HYBRID_SHARD).", minimum=1,
        compatibility=becomes("num_distributed_optimizer_instances"), on_resume=FREE,
    )  # fmt: skip
    num_shard: int = original_flag(
        8, "Ranks that share one copy of the optimizer state (HYBRID_SHARD). If not given: data-parallel ranks / num_replicate.", minimum=1,
        compatibility=becomes("ranks per optimizer instance; only a given value must fit the number of ranks, the default need not"),
        on_resume=FREE,
    )  # fmt: skip
    sharding_strategy: str = original_flag(
        "HYBRID_SHARD", "FSDP's name for what is sharded. It becomes settings of Megatron's distributed optimizer.",
        choices=tuple(SHARDING_STRATEGIES),
        compatibility=becomes("; ".join(f"{name}: {setting}" for name, setting in SHARDING_STRATEGIES.items())), on_resume=FREE,
    )  # fmt: skip
    backward_prefetch: str = original_flag(
        "BACKWARD_PRE", "A setting of FSDP. Use overlap_grad_reduce and overlap_param_gather to overlap communication.",
        compatibility=refused(
            "any value but BACKWARD_PRE: weights are whole on every rank, so there is nothing to prefetch; "
            "overlap is set by overlap_grad_reduce and overlap_param_gather"
        ), on_resume=FREE,
    )  # fmt: skip
    cpu_offload: bool = original_flag(
        False, "A setting of FSDP. Optimizer state is sharded over ranks instead of moved to host memory.",
        compatibility=refused("True: optimizer state is sharded over ranks (use_distributed_optimizer), not moved to the host"),
        on_resume=FREE,
    )  # fmt: skip
    freeze_llm: bool = original_flag(
        False, "Freeze the decoder's layers, embeddings and output layer.",
        compatibility=as_is("the original cannot run it under its FSDP wrapping"), on_resume=MUST_MATCH,
    )  # fmt: skip
    freeze_vit: bool = original_flag(False, "Freeze the vision tower. Its connector still trains.", on_resume=MUST_MATCH)
    freeze_vae: bool = original_flag(
        True, "Freeze the autoencoder. It is never trained.",
        compatibility=refused("False: the autoencoder is never trained, so that value changes nothing in the original either"),
        on_resume=FREE,
    )  # fmt: skip
    freeze_und: bool = original_flag(False, "Let no gradient reach the understanding expert or the vision tower.", on_resume=MUST_MATCH)
    copy_init_moe: bool = original_flag(True, "Start the generation expert from the understanding expert's weights.", on_resume=FREE)
    use_flex: bool = original_flag(
        False, "Use FlexAttention on CUDA. False uses SDPA there. On CPU, FlexAttention has no backward pass and SDPA always runs.",
        compatibility=becomes("attention_backend: True is flex on CUDA, False is sdpa. On CPU it is sdpa, and the start-up log says so"),
        on_resume=FREE,
    )  # fmt: skip
    zero_lr_first_step: bool = flag(
        False, "Warm up as the original does, with learning rate 0 in the first step. False starts at lr / warmup_steps.", on_resume=SAID
    )
    vae_encode_padded: bool = flag(
        False,
        "Encode as the original does: pad the images of a pack to one size, so that latents depend on the other images.",
        on_resume=SAID,
    )
    vae_encode_bf16: bool = flag(
        False, "Encode as the original does: run the autoencoder under bf16 autocast. False runs it in fp32.", on_resume=SAID
    )
    vae_kernels: Literal["plain", "split_norm", "channels_last", "compiled"] = flag(
        "plain",
        "How the autoencoder encodes. split_norm sums the group norms of one image with the whole GPU; channels_last also runs the "
        "convolutions in that memory format; compiled does both by torch.compile, which the first images wait for. It needs Triton on a "
        "GPU, a C++ compiler on a CPU. Latents differ by rounding.",
        on_resume=SAID,
    )
    vae_batch_pixels: int = flag(
        1048576,
        "Pixels of images of one size that the autoencoder takes together, which bounds its memory. A larger image runs alone.",
        minimum=1,
        on_resume=FREE,
    )
