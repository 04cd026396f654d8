# SPDX-License-Identifier: Apache-2.0
"""Draws faults: the same seed and number give the same fault, whatever else is drawn."""

from __future__ import annotations

import random
from dataclasses import dataclass

from tests.faults.phases import PHASES

#: How often each kind is drawn, and the share of faults that are one of ``MACHINE`` in its place.
KINDS = {"kill": 7, "damage": 9, "full": 2, "read-only": 1, "stopped": 1, "twins": 1}
MACHINE, MACHINE_SHARE = {"small-shm": 2, "clock": 1}, 0.05  # a clock needs an interpreter of its own, which takes its time
ALL_KINDS = (*KINDS, *MACHINE)
DAMAGES = ("flip", "truncate", "empty")


@dataclass(frozen=True)
class FileKind:
    """Files that can be damaged. ``artefact`` is a field of ``World``, ``pattern`` a glob below it.

    ``silent`` marks files without a checksum: a damaged one may be read as another valid one.
    """

    artefact: str
    pattern: str
    reader: str
    silent: bool = False


FILES = {
    "index-bin": FileKind("index", "**/*.bin", "verify"),
    "index-idx": FileKind("index", "**/*.idx", "verify"),
    "index-arrow": FileKind("index", "**/*.arrow", "verify"),
    "index-manifest": FileKind("index", "manifest.json", "verify", silent=True),
    "index-in-training": FileKind("index", "**/*", "train", silent=True),
    "latents": FileKind("latents", "**/*", "train", silent=True),
    "checkpoint-shard": FileKind("checkpoints", "0000004/*.distcp", "train"),
    "checkpoint-state": FileKind("checkpoints", "0000004/*.json", "train"),
    "checkpoint-contents": FileKind("checkpoints", "0000004/.metadata", "train"),
    "checkpoint-common": FileKind("checkpoints", "0000004/common.pt", "train"),
    "checkpoint-marker": FileKind("checkpoints", "latest_checkpointed_iteration.txt", "train"),
    "exported-checkpoint": FileKind("checkpoints", "0000004/*", "export", silent=True),
    "model-weights": FileKind("model", "*.safetensors", "generate", silent=True),
    "model-settings": FileKind("model", "*config.json", "generate", silent=True),
    "model-tokenizer": FileKind("model", "tokenizer.json", "generate", silent=True),
    "converted-weights": FileKind("model", "ema.safetensors", "convert", silent=True),
    "converted-settings": FileKind("model", "*_config.json", "convert", silent=True),
    "data-settings": FileKind("data", "dataset.yaml", "train", silent=True),
    "data-files": FileKind("data", "**/*.parquet", "build", silent=True),
    "data-lines": FileKind("data", "**/*.jsonl", "build", silent=True),
    "tokenizer": FileKind("data", "tokenizer/*", "build", silent=True),
    "llm-settings": FileKind("data", "llm/config.json", "train", silent=True),
    "vit-settings": FileKind("data", "vit/config.json", "train", silent=True),
}

#: Small files that a run keeps for itself, drawn apart so that earlier draws stay as they were.
RUN_FILES = {
    "run-identity": FileKind("checkpoints", "run.json", "train", silent=True),
    "run-metrics": FileKind("checkpoints", "../metrics.jsonl", "train", silent=True),
    "run-settings": FileKind("checkpoints", "../config.yaml", "train", silent=True),
}
RUN_FILES_SHARE = 0.1
ALL_FILES = FILES | RUN_FILES


@dataclass(frozen=True)
class Fault:
    """One fault. ``where`` is a phase, or a kind of file; ``position`` in [0, 1) a moment, a place in a file, or a size."""

    kind: str
    where: str
    how: str
    position: float
    choice: int

    def __str__(self) -> str:
        return f"{self.kind} {self.where} {self.how} at {self.position:.3f}".replace("  ", " ")


def draw(seed: int, number: int) -> Fault:
    """Return the fault of this number."""
    machine = random.Random(f"machine {seed} {number}")
    if machine.random() < MACHINE_SHARE:
        return Fault(machine.choices(list(MACHINE), list(MACHINE.values()))[0], "train", "", machine.random(), machine.randrange(1 << 30))
    source = random.Random(f"fault {seed} {number}")
    kind = source.choices(list(KINDS), list(KINDS.values()))[0]
    if kind == "damage":
        where, how = source.choice(list(FILES)), source.choice(DAMAGES)
        of_run = random.Random(f"run files {seed} {number}")
        where = of_run.choice(list(RUN_FILES)) if of_run.random() < RUN_FILES_SHARE else where
    elif kind == "kill":
        where, how = source.choice((*PHASES, "save")), ""
    elif kind in ("full", "read-only"):
        where, how = source.choice(PHASES), ""
    else:
        where, how = "train", ""
    return Fault(kind, where, how, source.random(), source.randrange(1 << 30))
