"""What each flag of the original becomes here: honoured, turned into another setting, or refused with the reason.

``ORIGINAL_FLAGS`` is documentation (docs/flags.md is made from it) and the list that tests hold complete; the refusals are
carried out in validate.py, the translations in resolve.py.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from megatron_bagel.config.arguments import DataArguments, ModelArguments, TrainingArguments

#: Megatron's name for a setting -> the original's. Both are accepted; giving both with different values is an error.
ALIASES: dict[str, str] = {
    "train_iters": "total_steps",
    "lr_warmup_iters": "warmup_steps",
    "lr_decay_style": "lr_scheduler",
    "clip_grad": "max_grad_norm",
    "adam_beta1": "beta1",
    "adam_beta2": "beta2",
    "adam_eps": "eps",
    "seed": "global_seed",
    "seq_length": "max_num_tokens",
    "log_interval": "log_every",
    "save_interval": "save_every",
    "wandb_exp_name": "wandb_name",
}

#: Flags that the original does not have: their help begins with the word.
OURS: frozenset[str] = frozenset(
    f.name
    for arguments in (ModelArguments, DataArguments, TrainingArguments)
    for f in fields(arguments)
    if f.metadata["help"].startswith("Ours")
)

#: FSDP sharding strategies -> what they are under Megatron.
SHARDING_STRATEGIES: dict[str, str] = {
    "FULL_SHARD": "distributed optimizer over all data-parallel ranks",
    "SHARD_GRAD_OP": "distributed optimizer over all data-parallel ranks",
    "HYBRID_SHARD": "distributed optimizer in num_replicate groups of ranks",
    "_HYBRID_SHARD_ZERO2": "distributed optimizer in num_replicate groups of ranks",
    "NO_SHARD": "no distributed optimizer: every rank holds the whole optimizer state",
}

Fate = Literal["honoured", "becomes", "refused"]


@dataclass(frozen=True)
class FlagFate:
    """``becomes`` names the setting it turns into; ``refused`` says which values and why."""

    fate: Fate
    text: str = ""


_HONOURED = FlagFate("honoured")

_SPECIAL: dict[str, FlagFate] = {
    "num_workers": FlagFate("honoured", "0, which fails in the original, reads in the training process"),
    "prefer_buffer_before": FlagFate(
        "becomes", "nothing to set: samples that wait always go first here, whatever the fill of the pack; said at start-up when given"
    ),
    "max_buffer_size": FlagFate("becomes", "the planner's window: samples that wait for a pack; none is ever lost"),
    "expected_num_tokens": FlagFate("becomes", "fill of a pack in stream order; beyond it, up to max_num_tokens, best fit from the window"),
    "max_num_tokens": FlagFate("honoured", "a hard limit here; Megatron's seq_length is the same setting"),
    "gradient_accumulation_steps": FlagFate(
        "becomes", "packs per replica and step; losses are normalised over the whole global batch, in the original per micro-step"
    ),
    "sharding_strategy": FlagFate("becomes", "; ".join(f"{name}: {what}" for name, what in SHARDING_STRATEGIES.items())),
    "num_replicate": FlagFate("becomes", "num_distributed_optimizer_instances"),
    "num_shard": FlagFate(
        "becomes", "ranks per optimizer instance; its default of 8 is not a demand, a given value must fit the number of ranks"
    ),
    "backward_prefetch": FlagFate(
        "refused", "any value but BACKWARD_PRE: weights are whole on every rank, so there is nothing to prefetch; "
        "overlap is set by overlap_grad_reduce and overlap_param_gather",
    ),
    "cpu_offload": FlagFate("refused", "True: optimizer state is sharded over ranks (use_distributed_optimizer), not moved to the host"),
    "freeze_vae": FlagFate("refused", "False: the autoencoder is never trained, so that value changes nothing in the original either"),
    "freeze_llm": FlagFate("honoured", "the original cannot run it under its FSDP wrapping"),
    "use_flex": FlagFate("becomes", "attention_backend: True is flex on CUDA, False is sdpa; on CPU sdpa either way, said at start-up"),
    "visual_gen": FlagFate("honoured", "a pack without generation tokens trains too, with True"),
    "visual_und": FlagFate("honoured", "a pack without understanding tokens trains too, with True"),
    "resume_from": FlagFate("honoured", "a path that does not exist is refused; the original then trains from scratch without a word"),
    "wandb_project": FlagFate("honoured", "W&B is on when any wandb flag is given; the original always logs to it"),
}  # fmt: skip

ORIGINAL_FLAGS: dict[str, FlagFate] = {
    f.name: _SPECIAL.get(f.name, _HONOURED)
    for arguments in (ModelArguments, DataArguments, TrainingArguments)
    for f in fields(arguments)
    if f.name not in OURS
}
