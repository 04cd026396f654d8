# SPDX-License-Identifier: Apache-2.0
"""The model card, ``README.md`` of an exported folder: what the weights are, and how they were trained.

Nobody but the author can name the licence, so the card says where to put it. It holds no paths: they belong to the machine of the run.
"""

from __future__ import annotations

import json
import re
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
    """What is known of the run; empty if unknown.

    Attributes:
        step: The number of steps.
        flags: Flags by name.
        losses: The last losses by name.
        datasets: Number of samples of each dataset group by name.
        samples: Number of samples that it trained on, repeated ones counted again.
        tokens: Number of their tokens.
        base_models: Models on a hub that it started from, with their commits.
    """

    step: int | None = None
    flags: Mapping[str, Any] = field(default_factory=dict)
    losses: Mapping[str, float] = field(default_factory=dict)
    datasets: Mapping[str, int] = field(default_factory=dict)
    samples: int = 0
    tokens: int = 0
    base_models: Sequence[str] = ()


_FRONT = """---
license: other
license_name: unknown
library_name: megatron_bagel
pipeline_tag: any-to-any
{base_models}---

# Model card

"""
_FORMAT = "This is a model in the format of BAGEL."
_TO_FILL_IN = """ Replace the fields `license` and `license_name` above before you publish it: the licence
follows from the data and from the weights that training started from."""
_TABLE = """

| | |
| --- | --- |
"""
_FRONT_MATTER = re.compile(r"\A---\n(.*?\n)---\n", re.DOTALL)
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
    rows |= _data_rows(facts)
    rows |= {name: f"{value:.6g}" for name, value in facts.losses.items()}
    rows |= {"written by": f"megatron_bagel {__version__}"}
    if problems:
        rows["cannot be served by vllm-omni"] = "; ".join(problems)
    table = "".join(f"| {name} | {value} |\n" for name, value in rows.items())
    flags = "\n".join(f"--{name} {value}" for name, value in published_flags(facts.flags).items())
    repositories = dict.fromkeys(name.split("@")[0] for name in facts.base_models)
    front = _FRONT.format(base_models="".join(["base_model:\n", *(f"- {name}\n" for name in repositories)]) if repositories else "")
    return front + _FORMAT + _TO_FILL_IN + _TABLE + table + (_FLAGS.format(flags=flags) if flags else "")


def with_licence(card: str, identifier: str, name: str | None = None, link: str | None = None) -> str:
    """Return a model card that states a licence, in place of the one that it stated or asked for.

    Raises:
        ValueError: The card does not begin with fields between two lines of ``---``.
    """
    match = _FRONT_MATTER.match(card)
    if match is None:
        raise ValueError("README.md does not begin with fields between two lines of ---, as a model card does; export the model again")
    named = {"license": identifier, "license_name": name, "license_link": link}
    fields = [f"{key}: {json.dumps(value) if key == 'license_name' else value}\n" for key, value in named.items() if value is not None]
    fields += [line for line in match[1].splitlines(keepends=True) if line.split(":")[0] not in named]
    return f"---\n{''.join(fields)}---\n{card[match.end() :].replace(_TO_FILL_IN, '', 1)}"


def _data_rows(facts: CardFacts) -> dict[str, str]:
    """Return the rows that tell what the model was trained on and from."""
    rows: dict[str, str] = {}
    if facts.base_models:
        rows["started from"] = ", ".join(dict.fromkeys(facts.base_models))
    if facts.datasets:
        rows["dataset groups"] = ", ".join(f"{name} ({size:,} samples)" for name, size in facts.datasets.items())
    if facts.samples:
        rows["trained on"] = f"{facts.samples:,} samples, {facts.tokens:,} tokens"
    return rows


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
