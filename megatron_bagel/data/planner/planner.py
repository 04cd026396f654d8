# SPDX-License-Identifier: Apache-2.0
"""Which samples make which pack: a pure function of (configuration, data, number of earlier packs).

Packs form one endless global sequence that is independent of ranks and workers; a global batch is a slice of it. Every rank runs the
planner and gets the same packs, and a run that resumes with other parallel sizes continues the same sequence. Packs are planned in
blocks (block.py). The state consists of the stream's counters, the waiting samples, and the remaining packs of the current block: at
most a few hundred kilobytes for data of any size.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from megatron_bagel.data.planner.assign import PackPlan
from megatron_bagel.data.planner.block import AGE, MAX_PACKS, Block, BlockSettings, no_candidates, plan_block
from megatron_bagel.data.planner.cost_model import SampleSource
from megatron_bagel.data.planner.mix import SourceRule
from megatron_bagel.data.planner.pack_table import PackTable
from megatron_bagel.data.planner.position import PlannerPosition
from megatron_bagel.data.planner.stream import TOKENS, CandidateStream, Skips

log = logging.getLogger(__name__)

_REMEMBERED_PACKS = 4096  # packs behind the newest whose state is available without planning again
_BLOCKS_PER_SPAN = 16  # blocks at least between two points of a schedule of weights


@dataclass(frozen=True)
class PlannerConfig:
    """Settings of the planner.

    ``max_num_tokens`` is a pack's capacity. A pack is filled in stream order up to ``expected_num_tokens``, and beyond by best fit.
    At least ``window`` candidates stay waiting (the original's ``max_buffer_size``). A larger window fills packs better and moves
    samples further from their position in the stream. Samples longer than ``max_num_tokens_per_sample`` are skipped, counted and
    listed. ``mix`` gives sources, by name, weights that change over steps and a limit of epochs; a step is ``global_batch_size`` packs.
    """

    max_num_tokens: int = 36864
    expected_num_tokens: int = 32768
    max_num_tokens_per_sample: int = 16384
    window: int = 50
    seed: int = 42
    global_batch_size: int = 1
    mix: Mapping[str, SourceRule] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("max_num_tokens", "expected_num_tokens", "max_num_tokens_per_sample", "global_batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} is {getattr(self, name)}; it must be at least 1")
        if self.window < 0:
            raise ValueError(f"--max_buffer_size is {self.window}; it must be 0 or more")


@dataclass(frozen=True)
class _PlannedBlock:
    """A block in the sequence: the number of its first pack, and the stream's counters behind it."""

    first_pack: int
    block: Block
    counters: dict[str, Any]

    @cached_property
    def end(self) -> int:
        return self.first_pack + len(self.block)


def _max_packs(config: PlannerConfig) -> int:
    """Return the packs of the longest block: its weights are those of its first step, so a schedule cuts its spans into several blocks."""
    steps = [step for rule in config.mix.values() for step in rule.span_lengths()]
    return min([MAX_PACKS, *(max(1, step * config.global_batch_size // _BLOCKS_PER_SPAN) for step in steps)])


class Planner:
    """The sequence of packs over ``sources`` (one per dataset group, in the order of the configuration)."""

    def __init__(self, sources: Sequence[SampleSource], config: PlannerConfig) -> None:
        self.config = config
        self.stream = CandidateStream(sources, config.seed, min(config.max_num_tokens_per_sample, config.max_num_tokens), config.mix)
        self._settings = BlockSettings(config.max_num_tokens, config.expected_num_tokens, config.window, config.seed, _max_packs(config))
        self._restart()

    @property
    def skips(self) -> Skips:
        """Return the samples skipped so far."""
        return self.stream.skips

    def skipped(self) -> list[dict[str, Any]]:
        """Return the first thousand skipped samples for a log or a file: group, sample index, epoch, reason and origin."""
        sources = {source.name: source for source in self.stream.sources}
        return [
            {"group": name, "index": index, "epoch": epoch, "reason": reason, "where": sources[name].describe(index)}
            for (name, index, epoch), reason in self.skips.reasons.items()
        ]

    def batch(self, step: int) -> list[PackPlan]:
        """Return the packs of global batch ``step`` (counted from 0), in canonical order."""
        return self.packs(step * self.config.global_batch_size, self.config.global_batch_size)

    def packs(self, first: int, count: int) -> list[PackPlan]:
        """Return packs ``first`` to ``first + count - 1`` of the sequence. A jump ahead plans all packs in between."""
        return self.table(first, count).plans()

    def table(self, first: int, count: int) -> PackTable:
        """Return the same packs as ``packs`` as a table, without an object for each."""
        slices, number = [], first
        while number < first + count:
            planned_block = self._reach(number, number + 1)
            end = min(planned_block.end, first + count)
            slices.append((planned_block.block, number - planned_block.first_pack, end - planned_block.first_pack))
            number = end
        self._packs_made = first + count
        return PackTable.of(first, slices)

    @property
    def packs_made(self) -> int:
        """Return the number of packs made so far: up to the last requested one."""
        return self._packs_made

    def state_dict(self) -> dict[str, Any]:
        """Return the state after the packs made so far: only numbers, strings and lists."""
        return self.state_at(self._packs_made)

    def state_at(self, packs: int) -> dict[str, Any]:
        """Return the state after the first ``packs`` packs, without planning if the planner still remembers that point.

        The loader plans ahead of training, so a checkpoint asks for the state after the packs that were trained on.
        """
        return self.position_at(packs).state()

    def position_at(self, packs: int) -> PlannerPosition:
        """Return the same point as ``state_at`` as arrays."""
        planned_block = self._reach(packs, packs)
        return PlannerPosition.of(packs, planned_block.counters, planned_block.block, packs - planned_block.first_pack)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue after a saved state. Groups are matched by name, so groups may be added, removed or reordered.

        Packs planned before the save stay unchanged, and a changed configuration applies from the next block on. Packs that a removed
        group or a smaller ``max_num_tokens`` makes impossible are taken apart, and their samples packed again.

        Raises:
            ValueError: If a group has changed its size, because its order would not be the interrupted one.
        """
        if state["seed"] != self.config.seed:
            log.warning(
                "--data_seed is %d, but the checkpoint was saved with %d: the order changes, so some samples of the current epoch come "
                "twice and others not at all", self.config.seed, state["seed"],
            )  # fmt: skip
        self.stream.restart()
        numbers = self._matched_groups(state)
        self.stream.draws = state["draws"]
        waiting = [[*pick, age] for pick, age in zip(state["waiting"], state["ages"], strict=True)]
        packs = []
        for planned in state["planned"]:
            known_picks = [[numbers[number], index, epoch] for number, index, epoch in planned if number in numbers]
            rows = self.stream.measure_picks(np.array(known_picks, dtype=np.int64).reshape(-1, 3))
            if len(known_picks) == len(planned) and rows[:, TOKENS].sum() <= self.config.max_num_tokens:
                packs.append(rows)
            else:
                waiting += [[*pick, 0] for pick in planned]
        known_lists = [[numbers[number], index, epoch, age] for number, index, epoch, age in waiting if number in numbers]
        known_waiting = np.array(known_lists, dtype=np.int64).reshape(-1, 4)
        rows = np.concatenate([no_candidates()[:, :AGE], *packs])
        bounds = np.cumsum([0, *map(len, packs)])
        block = Block(rows, bounds, np.column_stack([self.stream.measure_picks(known_waiting[:, :3]), known_waiting[:, 3]]))
        self._begin(_PlannedBlock(state["packs"], block, self._counters(state["blocks"])))

    def _matched_groups(self, state: Mapping[str, Any]) -> dict[int, int]:
        """Return the current numbers of the saved groups by their saved numbers, and set the stream to their positions."""
        saved_numbers = {name: number for number, name in enumerate(state["names"])}
        numbers = {}
        for number, source in enumerate(self.stream.sources):
            if source.name not in saved_numbers or not source.keep_position:
                log.info("dataset group %s starts at the beginning of its order", source.name)
                continue
            saved_number = saved_numbers[source.name]
            if state["sizes"][saved_number] != len(source):
                raise ValueError(
                    f"dataset group {source.name!r} has {len(source)} samples, but the checkpoint was saved with "
                    f"{state['sizes'][saved_number]}; use the same data "
                    "and num_used_data, or set resume_data_status: False for this group to restart its order"
                )
            numbers[saved_number] = number
            self.stream.positions[number] = state["places"][saved_number]
            self.stream.streaks[number] = state["streaks"][saved_number]
            self.stream.skips.counts[number] = state["skipped"][saved_number]
        if removed_names := sorted(set(saved_numbers) - {source.name for source in self.stream.sources}):
            log.warning("the configuration no longer has the dataset groups %s of the checkpoint", ", ".join(removed_names))
        return numbers

    def _restart(self) -> None:
        self.stream.restart()
        empty_block = Block(no_candidates()[:, :AGE], np.zeros(1, dtype=np.int64), no_candidates())
        self._begin(_PlannedBlock(0, empty_block, self._counters(0)))

    def _begin(self, planned_block: _PlannedBlock) -> None:
        """Continue behind ``planned_block``, where the stream now is."""
        self._base = planned_block
        self._blocks = deque([planned_block])
        self._packs_made = planned_block.first_pack

    def _counters(self, blocks: int) -> dict[str, Any]:
        stream = self.stream
        return {
            "blocks": blocks,
            "seed": self.config.seed,
            "names": [source.name for source in stream.sources],
            "sizes": [len(source) for source in stream.sources],
            "draws": stream.draws,
            "places": list(stream.positions),
            "streaks": list(stream.streaks),
            "skipped": list(stream.skips.counts),
        }

    def _reach(self, begin: int, packs: int) -> _PlannedBlock:
        """Return the first block from ``begin`` on whose end is at ``packs`` packs or more; plan as far as needed."""
        if begin < self._blocks[0].first_pack:
            if begin < self._base.first_pack:
                self._restart()
            else:
                self._rewind(self._base)
        while self._blocks[-1].end < packs:
            self._plan_block()
        if self._blocks[-1].first_pack < packs:
            return self._blocks[-1]
        # The block is mostly one of the newest, because workers read slightly ahead of training.
        for position in range(len(self._blocks) - 1, 0, -1):
            if self._blocks[position - 1].end < packs:
                return self._blocks[position]
        return self._blocks[0]

    def _plan_block(self) -> None:
        last_block = self._blocks[-1]
        number = last_block.counters["blocks"]
        self.stream.step = last_block.end / self.config.global_batch_size
        block = plan_block(self.stream, last_block.block.waiting, number, self._settings)
        self._blocks.append(_PlannedBlock(last_block.end, block, self._counters(number + 1)))
        remembered = max(_REMEMBERED_PACKS, 32 * self.config.global_batch_size)
        while self._blocks[1].first_pack < self._blocks[-1].first_pack - remembered:
            self._blocks.popleft()

    def _rewind(self, planned_block: _PlannedBlock) -> None:
        """Reset the stream to its counters behind ``planned_block``; recorded skips stay recorded."""
        counters = planned_block.counters
        self.stream.draws = counters["draws"]
        self.stream.positions, self.stream.streaks = list(counters["places"]), list(counters["streaks"])
        self.stream.skips.counts = list(counters["skipped"])
        self._begin(planned_block)
