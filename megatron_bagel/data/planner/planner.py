"""Which samples make which pack: a pure function of (configuration, data, number of packs already made).

Packs form one endless global sequence that knows nothing of ranks or workers; a global batch is a slice of it. Every rank runs
the planner itself and gets the same packs, and a run that resumes on other sizes continues the same sequence. Packs are planned in
blocks (block.py). The state is the stream's counters, the samples that wait, and the packs of the begun block that are still
to come: at most a few hundred kilobytes, whatever the size of the data.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from megatron_bagel.data.planner.assign import PackPlan
from megatron_bagel.data.planner.block import AGE, Block, BlockSettings, no_candidates, picks, plan_block
from megatron_bagel.data.planner.cost_model import COST_UNIT, SampleSource
from megatron_bagel.data.planner.stream import TOKENS, CandidateStream, Skips

log = logging.getLogger(__name__)

_REMEMBERED = 4096  # packs behind the newest, at least, whose state can be asked for without planning anew


@dataclass(frozen=True)
class PlannerConfig:
    """``max_num_tokens`` is a pack's capacity. A pack is filled in stream order up to ``expected_num_tokens``, beyond by best fit.

    ``window`` is how many candidates are left over at least when packs are made (the original's ``max_buffer_size``): more fill packs
    better, and move samples further from their place in the stream. Samples longer than ``max_num_tokens_per_sample`` are skipped,
    counted and listed.
    """

    max_num_tokens: int = 36864
    expected_num_tokens: int = 32768
    max_num_tokens_per_sample: int = 16384
    window: int = 50
    seed: int = 42
    global_batch_size: int = 1

    def __post_init__(self) -> None:
        for name in ("max_num_tokens", "expected_num_tokens", "max_num_tokens_per_sample", "global_batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} is {getattr(self, name)}; it must be at least 1")
        if self.window < 0:
            raise ValueError(f"--max_buffer_size is {self.window}; it must be 0 or more")


@dataclass(frozen=True)
class _Planned:
    """A block in the sequence: its first pack's number, and the stream's counters behind it."""

    first: int
    block: Block
    counters: dict[str, Any]

    @cached_property
    def end(self) -> int:
        return self.first + len(self.block)


class Planner:
    """The sequence of packs over ``sources`` (one per dataset group, in the order of the configuration)."""

    def __init__(self, sources: Sequence[SampleSource], config: PlannerConfig) -> None:
        self.config = config
        self.stream = CandidateStream(sources, config.seed, min(config.max_num_tokens_per_sample, config.max_num_tokens))
        self._settings = BlockSettings(config.max_num_tokens, config.expected_num_tokens, config.window, config.seed)
        self._restart()

    @property
    def skips(self) -> Skips:
        """Samples left out so far."""
        return self.stream.skips

    def skipped(self) -> list[dict[str, Any]]:
        """The first thousand samples left out, for a log or a file: group, sample index, epoch, reason, and where the sample lies."""
        sources = {source.name: source for source in self.stream.sources}
        return [
            {"group": name, "index": index, "epoch": epoch, "reason": reason, "where": sources[name].describe(index)}
            for (name, index, epoch), reason in self.skips.listed.items()
        ]

    def batch(self, step: int) -> list[PackPlan]:
        """The packs of global batch ``step`` (counted from 0), in canonical order."""
        return self.packs(step * self.config.global_batch_size, self.config.global_batch_size)

    def packs(self, first: int, count: int) -> list[PackPlan]:
        """Packs ``first`` to ``first + count - 1`` of the sequence. Asking in order is cheap; a jump is planned through."""
        made = [self._pack(number) for number in range(first, first + count)]
        self._made = first + count
        return made

    @property
    def made(self) -> int:
        """Packs of the sequence that were made so far: up to the last one asked for."""
        return self._made

    def state_dict(self) -> dict[str, Any]:
        """State after the packs made so far: numbers, strings and lists only."""
        return self.state_at(self._made)

    def state_at(self, packs: int) -> dict[str, Any]:
        """State after the first ``packs`` packs, without planning anything where the planner still remembers that point.

        The loader plans ahead of training; a checkpoint asks for the state after the packs that were trained on.
        """
        planned = self._reach(packs, packs)
        block, done = planned.block, packs - planned.first
        bounds = block.bounds[done:]
        return {
            **planned.counters,
            "packs": packs,
            "waiting": picks(block.waiting).tolist(),
            "ages": block.waiting[:, AGE].tolist(),
            "planned": [picks(block.rows[i:j]).tolist() for i, j in zip(bounds[:-1], bounds[1:], strict=True)],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue after a saved state. Groups are matched by name, so groups may be added, removed or reordered.

        Packs that were planned already come as they are; a changed configuration counts from the next block on. Only packs that a
        removed group or a smaller ``max_num_tokens`` makes impossible are taken apart, and their samples packed anew.

        Raises ValueError when a group changed its size: its order would no longer be the one that was interrupted.
        """
        if state["seed"] != self.config.seed:
            log.warning(
                "--data_seed is %d, the checkpoint was taken with %d: orders change under way, so in the epoch that was begun some samples "
                "come twice and some not at all", self.config.seed, state["seed"],
            )  # fmt: skip
        self.stream.restart()
        numbers = self._matched_groups(state)
        self.stream.draws = state["draws"]
        waiting = [[*pick, age] for pick, age in zip(state["waiting"], state["ages"], strict=True)]
        packs = []
        for planned in state["planned"]:
            here = [[numbers[number], index, epoch] for number, index, epoch in planned if number in numbers]
            rows = self.stream.measured(np.array(here, dtype=np.int64).reshape(-1, 3))
            if len(here) == len(planned) and rows[:, TOKENS].sum() <= self.config.max_num_tokens:
                packs.append(rows)
            else:
                waiting += [[*pick, 0] for pick in planned]
        kept = [[numbers[number], index, epoch, age] for number, index, epoch, age in waiting if number in numbers]
        kept = np.array(kept, dtype=np.int64).reshape(-1, 4)
        rows = np.concatenate([no_candidates()[:, :AGE], *packs])
        bounds = np.cumsum([0, *map(len, packs)])
        block = Block(rows, bounds, np.column_stack([self.stream.measured(kept[:, :3]), kept[:, 3]]))
        self._begin(_Planned(state["packs"], block, self._counters(state["blocks"])))

    def _matched_groups(self, state: Mapping[str, Any]) -> dict[int, int]:
        """Where the saved groups stand in this configuration, by their saved numbers; sets the stream to their places."""
        saved = {name: number for number, name in enumerate(state["names"])}
        numbers = {}
        for number, source in enumerate(self.stream.sources):
            if source.name not in saved or not source.keep_position:
                log.info("dataset group %s starts at the beginning of its order", source.name)
                continue
            old = saved[source.name]
            if state["sizes"][old] != len(source):
                raise ValueError(
                    f"dataset group {source.name!r} has {len(source)} samples, the checkpoint was taken with {state['sizes'][old]}; "
                    "use the same data and num_used_data, or set resume_data_status: False for this group to start its order anew"
                )
            numbers[old] = number
            self.stream.places[number] = state["places"][old]
            self.stream.streaks[number] = state["streaks"][old]
            self.stream.skips.counts[number] = state["skipped"][old]
        if gone := sorted(set(saved) - {source.name for source in self.stream.sources}):
            log.warning("dataset groups %s of the checkpoint are not in the configuration any more", ", ".join(gone))
        return numbers

    def _restart(self) -> None:
        self.stream.restart()
        nothing = Block(no_candidates()[:, :AGE], np.zeros(1, dtype=np.int64), no_candidates())
        self._begin(_Planned(0, nothing, self._counters(0)))

    def _begin(self, planned: _Planned) -> None:
        """Continue behind ``planned``, with the stream standing there."""
        self._base = planned
        self._blocks = deque([planned])
        self._made = planned.first

    def _counters(self, blocks: int) -> dict[str, Any]:
        stream = self.stream
        return {
            "blocks": blocks,
            "seed": self.config.seed,
            "names": [source.name for source in stream.sources],
            "sizes": [len(source) for source in stream.sources],
            "draws": stream.draws,
            "places": list(stream.places),
            "streaks": list(stream.streaks),
            "skipped": list(stream.skips.counts),
        }

    def _pack(self, number: int) -> PackPlan:
        """Pack ``number`` of the sequence."""
        planned = self._reach(number, number + 1)
        block, place = planned.block, number - planned.first
        samples = tuple(zip(*picks(block.rows[block.bounds[place] : block.bounds[place + 1]]).T.tolist(), strict=True))
        tokens, cost = block.sums[place]
        return PackPlan(number, samples, tokens, cost / COST_UNIT)

    def _reach(self, begin: int, packs: int) -> _Planned:
        """The first block from ``begin`` on at whose end ``packs`` packs or more are made; plans as far as needed."""
        if begin < self._blocks[0].first:
            if begin < self._base.first:
                self._restart()
            else:
                self._rewind(self._base)
        while self._blocks[-1].end < packs:
            self._plan_block()
        if self._blocks[-1].first < packs:
            return self._blocks[-1]
        # Mostly one of the newest: workers read a little ahead of training.
        for place in range(len(self._blocks) - 1, 0, -1):
            if self._blocks[place - 1].end < packs:
                return self._blocks[place]
        return self._blocks[0]

    def _plan_block(self) -> None:
        last = self._blocks[-1]
        number = last.counters["blocks"]
        block = plan_block(self.stream, last.block.waiting, number, self._settings)
        self._blocks.append(_Planned(last.end, block, self._counters(number + 1)))
        remembered = max(_REMEMBERED, 32 * self.config.global_batch_size)
        while self._blocks[1].first < self._blocks[-1].first - remembered:
            self._blocks.popleft()

    def _rewind(self, planned: _Planned) -> None:
        """Set the stream back to where it stood behind ``planned``; what was listed as skipped stays listed."""
        counters = planned.counters
        self.stream.draws = counters["draws"]
        self.stream.places, self.stream.streaks = list(counters["places"]), list(counters["streaks"])
        self.stream.skips.counts = list(counters["skipped"])
        self._begin(planned)
