# SPDX-License-Identifier: Apache-2.0
"""Misses rows of the vocabulary that are new to the starting weights and that no text of the data ever uses.

Such a row keeps its random value. It looks trained in every checkpoint and export, until a prompt uses its token.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_bagel import platform
from megatron_bagel.common.wording import shorten
from megatron_bagel.data.loading.loaded_pack import LoadedPack
from megatron_bagel.training.hooks import StepHook
from megatron_bagel.training.resilience.events import EVENTS, EventFile
from megatron_bagel.training.step_result import StepDone

#: Steps after which a row that has not come is missed; in a shorter run, after its last step.
_PATIENCE = 500
_KIND = "unseen_rows"


@dataclass(frozen=True)
class NewRows:
    """The rows that start from seeded values: their tokens by id, and the run that trains them."""

    tokens: Mapping[int, str]
    results_dir: Path
    total_steps: int


class UnseenRows(StepHook):
    """Notes the tokens of this replica's packs. It communicates once, when the rows are due; then rank 0 writes the warning."""

    def __init__(self, rows: NewRows, events: EventFile) -> None:
        self._rows, self._events = rows, events
        self._ids = np.array(sorted(rows.tokens), dtype=np.int64)
        self._seen = np.zeros(len(self._ids), dtype=bool)
        self._steps, self._due, self._said = 0, min(_PATIENCE, rows.total_steps), False

    def start(self) -> None:
        """Stay silent in a run that has said it before."""
        file = self._rows.results_dir / EVENTS
        # Not read as JSON: a killed run may have left half a line.
        said = file.is_file() and re.search(f'"event": "{_KIND}"', file.read_text(encoding="utf-8", errors="replace"))
        self._said = bool(said)

    def packs(self, packs: Sequence[LoadedPack]) -> None:
        """Note the tokens of this replica's texts."""
        for loaded in packs:
            self._seen |= np.isin(self._ids, loaded.pack.text_ids)

    def after_step(self, done: StepDone) -> None:
        """Say which rows no replica has seen, once they are due."""
        # Steps of this process: what came before a restart is not known.
        self._steps += 1
        if self._steps != self._due:
            return
        # Every rank takes part, also one that has not said it: where results_dir is a disk of its own, ranks see different files.
        missing = [self._rows.tokens[int(row)] for row in self._ids[~self._seen_by_all()]]
        if missing and not self._said:
            self._events.write(
                done.step, _KIND,
                f"{len(missing)} of the {len(self._ids)} new rows of the vocabulary have not come in {self._due} steps "
                f"({shorten([repr(token) for token in missing])}): they keep their random values, and a prompt or an answer that uses one "
                "gets noise. Add samples with these tokens, or train with a tokenizer without them",
            )  # fmt: skip

    def _seen_by_all(self) -> np.ndarray:
        """Return the rows that some replica has seen, bool [rows]. Collective, because every rank has the same steps."""
        group = parallel_state.get_data_parallel_group()
        if dist.get_world_size(group) == 1:
            return self._seen
        seen = torch.from_numpy(self._seen.astype(np.int32)).to(platform.device())
        dist.all_reduce(seen, op=dist.ReduceOp.MAX, group=group)
        return seen.cpu().numpy() > 0
