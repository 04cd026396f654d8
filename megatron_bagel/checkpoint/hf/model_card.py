# SPDX-License-Identifier: Apache-2.0
"""The model card, ``README.md`` of an exported folder: what the weights are, and how they were trained.

Nobody but the author can name the licence, so the card says where to put it. It holds no paths: they belong to the machine of the run.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_bagel import __version__
from megatron_bagel.config.architecture import BagelArch
from megatron_bagel.config.flag import default_of
from megatron_bagel.config.paths import PATHS
from megatron_bagel.config.sections import SETTINGS

_KINDS = {"ema": "averages of the trained weights", "model": "the trained weights themselves"}
_UNPUBLISHED = (*PATHS, "use_wandb", "wandb_project", "wandb_name", "wandb_runid", "wandb_resume", "wandb_offline")


@dataclass(frozen=True)
class CardFacts:
    """What is known of the run: its last ``step``, the ``flags`` by name and the last ``losses`` by name; empty if unknown."""

    step: int | None = None
    flags: Mapping[str, Any] = field(default_factory=dict)
    losses: Mapping[str, float] = field(default_factory=dict)


_HEAD = """---
license: other
license_name: unknown
library_name: megatron_bagel
pipeline_tag: any-to-any
---

# Model card

This is a model in the format of BAGEL. Replace the fields `license` and `license_name` above before you publish it: the licence
follows from the data and from the weights that training started from.

| | |
| --- | --- |
"""
_FLAGS = """
## Flags of the run

Flags with their default values, and paths, are left out.

```
{flags}
```
"""


def card_text(arch: BagelArch, kinds: Collection[str], problems: Sequence[str], facts: CardFacts) -> str:
    """Return the model card of a folder with these ``kinds`` of weights; ``problems`` keep servers from loading it."""
    rows = {"weights": ", ".join(f"`{kind}`: {_KINDS[kind]}" for kind in kinds), "model": _model(arch)}
    if facts.step is not None:
        rows["training steps"] = str(facts.step)
    rows |= {name: f"{value:.6g}" for name, value in facts.losses.items()}
    rows |= {"written by": f"megatron_bagel {__version__}"}
    if problems:
        rows["cannot be served by vllm-omni"] = "; ".join(problems)
    table = "".join(f"| {name} | {value} |\n" for name, value in rows.items())
    flags = "\n".join(f"--{name} {value}" for name, value in published_flags(facts.flags).items())
    return _HEAD + table + (_FLAGS.format(flags=flags) if flags else "")


def _model(arch: BagelArch) -> str:
    llm = arch.llm
    parts = [f"{llm.num_hidden_layers} {llm.layer_module} of width {llm.hidden_size}", f"vocabulary of {llm.vocab_size}"]
    if arch.vit is not None:
        parts.append(f"vision tower of {arch.n_vit_layers} layers")
    if arch.autoencoder is not None:
        parts.append(f"images of up to {arch.max_latent_size * arch.vae_token_pixels} pixels per side")
    return ", ".join(parts)


def published_flags(flags: Mapping[str, Any]) -> dict[str, Any]:
    """Return the flags that differ from their defaults, without paths and names of accounts."""
    changed = {name: value for name, value in flags.items() if name in SETTINGS and value != default_of(SETTINGS[name])}
    return {name: value for name, value in sorted(changed.items()) if name not in _UNPUBLISHED}
