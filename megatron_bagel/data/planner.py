"""Which samples make which pack: a pure function of (configuration, data, number of packs already made).

Packs form one endless global sequence that knows nothing of ranks or workers; a global batch is a slice of it. Every rank runs
the planner itself and gets the same packs, and a run that resumes on other sizes continues the same sequence. The state is the
stream's counters and the window of waiting samples: a few kilobytes.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_bagel.data.counts import COST_UNIT, SampleSource
from megatron_bagel.data.packing import fill
from megatron_bagel.data.planner_deal import PackPlan
from megatron_bagel.data.planner_stream import COLUMNS, COST, EPOCH, INDEX, SOURCE, TOKENS, CandidateStream, Skips

log = logging.getLogger(__name__)

_PATIENCE = 4  # packs in a row that may pass over the oldest waiting sample before one is built around it
_TRIES = 16  # candidates of a mandatory group tried for one pack
_SNAPSHOTS = 256  # global batches whose starting state is kept, so that what the loader planned ahead can be taken back


@dataclass(frozen=True)
class PlannerConfig:
    """``max_num_tokens`` is a pack's capacity. A pack is filled in stream order up to ``expected_num_tokens``, beyond by best fit.

    ``window`` is how many candidates wait at least (the original's ``max_buffer_size``): more fill packs better, and move samples
    further from their place in the stream. Samples longer than ``max_num_tokens_per_sample`` are skipped, counted and listed.
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


class Planner:
    """The sequence of packs over ``sources`` (one per dataset group, in the order of the configuration)."""

    def __init__(self, sources: Sequence[SampleSource], config: PlannerConfig) -> None:
        self.config = config
        self.stream = CandidateStream(sources, config.seed, min(config.max_num_tokens_per_sample, config.max_num_tokens))
        self._mandatory = [number for number, source in enumerate(sources) if source.is_mandatory]
        self._snapshots: OrderedDict[int, dict[str, Any]] = OrderedDict()
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
        self._seek(first)
        self._snapshots[first] = self._capture()
        while len(self._snapshots) > _SNAPSHOTS:
            self._snapshots.popitem(last=False)
        return [self._next_pack() for _ in range(count)]

    @property
    def made(self) -> int:
        """Packs of the sequence made so far."""
        return self._made

    def state_dict(self) -> dict[str, Any]:
        """State after the packs made so far: numbers, strings and lists only."""
        return self.state_at(self._made)

    def state_at(self, packs: int) -> dict[str, Any]:
        """State after the first ``packs`` packs, without moving the planner where it still remembers that point.

        The loader plans ahead of training; a checkpoint asks for the state after the packs that were trained on.
        """
        state = self._snapshots.get(packs)
        if state is None or packs == self._made:
            self._seek(packs)
            state = self._capture()
        return {**state, "waiting": state["waiting"][:, [SOURCE, INDEX, EPOCH]].tolist()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue after a saved state. Groups are matched by name, so groups may be added, removed or reordered.

        Raises ValueError when a group changed its size: its order would no longer be the one that was interrupted.
        """
        if state["seed"] != self.config.seed:
            log.warning(
                "--data_seed is %d, the checkpoint was taken with %d: orders change under way, so in the epoch that was begun some samples "
                "come twice and some not at all", self.config.seed, state["seed"],
            )  # fmt: skip
        self._snapshots.clear()
        self.stream.restart()
        names = [source.name for source in self.stream.sources]
        saved = {name: number for number, name in enumerate(state["names"])}
        numbers = {}  # saved number -> number here
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
        if gone := sorted(set(saved) - set(names)):
            log.warning("dataset groups %s of the checkpoint are not in the configuration any more", ", ".join(gone))
        self.stream.draws = state["draws"]
        kept = [[numbers[old], index, epoch] for old, index, epoch in state["waiting"] if old in numbers]
        self._waiting = self.stream.measured(np.array(kept, dtype=np.int64).reshape(-1, 3))
        self._passed_over = state["passed_over"] if len(kept) == len(state["waiting"]) else 0
        self._made = state["packs"]
        self._base = self._capture()

    def _restart(self) -> None:
        self.stream.restart()
        self._waiting = np.empty((0, COLUMNS), dtype=np.int64)  # oldest first
        self._passed_over = 0
        self._made = 0
        self._base = self._capture()

    def _capture(self) -> dict[str, Any]:
        stream = self.stream
        return {
            "packs": self._made,
            "seed": self.config.seed,
            "names": [source.name for source in stream.sources],
            "sizes": [len(source) for source in stream.sources],
            "draws": stream.draws,
            "places": list(stream.places),
            "streaks": list(stream.streaks),
            "skipped": list(stream.skips.counts),
            "passed_over": self._passed_over,
            "waiting": self._waiting,  # never changed in place, so a capture is cheap
        }

    def _seek(self, made: int) -> None:
        """Bring the planner to the point where ``made`` packs have been made."""
        if made == self._made:
            return
        if made < self._made:
            earlier = [number for number in self._snapshots if number <= made]
            if earlier or self._base["packs"] <= made:
                self._restore(self._snapshots[max(earlier)] if earlier else self._base)
            else:
                self._restart()
        while self._made < made:
            self._next_pack()

    def _restore(self, state: dict[str, Any]) -> None:
        """Back to a state this planner captured itself; what was listed as skipped stays listed."""
        self.stream.draws, self._passed_over, self._made = state["draws"], state["passed_over"], state["packs"]
        self.stream.places, self.stream.streaks = list(state["places"]), list(state["streaks"])
        self.stream.skips.counts = list(state["skipped"])
        self._waiting = state["waiting"]

    def _next_pack(self) -> PackPlan:
        self._refill()
        chosen = self._start_pack()
        room = self.config.max_num_tokens - int(chosen[:, TOKENS].sum())
        used = self.config.max_num_tokens - room
        taken = fill(self._waiting[:, TOKENS], room, max(self.config.expected_num_tokens - used, 0))
        self._passed_over = 0 if not len(self._waiting) or 0 in taken else self._passed_over + 1
        chosen = np.concatenate([chosen, self._waiting[taken]])
        self._waiting = np.delete(self._waiting, taken, axis=0)
        plan = PackPlan(
            number=self._made,
            samples=tuple((int(row[SOURCE]), int(row[INDEX]), int(row[EPOCH])) for row in chosen),
            tokens=int(chosen[:, TOKENS].sum()),
            cost=int(chosen[:, COST].sum()) / COST_UNIT,
        )
        self._made += 1
        return plan

    def _refill(self) -> None:
        """Draw until the window is full and holds two packs' worth of tokens."""
        enough = 2 * self.config.max_num_tokens
        while True:
            count, tokens = len(self._waiting), int(self._waiting[:, TOKENS].sum())
            if count >= max(self.config.window, 1) and tokens >= enough:
                return
            mean = tokens / count if count else self.config.max_num_tokens
            missing = max(self.config.window - count, (enough - tokens) / mean, 1)
            self._waiting = np.concatenate([self._waiting, self.stream.draw(min(int(np.ceil(missing)), 1024))])

    def _start_pack(self) -> np.ndarray:
        """The samples a pack begins with: one of every mandatory group, before them the oldest one where it waited too long.

        A waiting sample that leaves no room for the mandatory ones is skipped and listed.
        """
        nothing = np.empty((0, COLUMNS), dtype=np.int64)
        if self._passed_over >= _PATIENCE:
            anchor, self._waiting = self._waiting[:1], self._waiting[1:]
            self._passed_over = 0
            mandatory = self._mandatory_samples(self.config.max_num_tokens - int(anchor[0, TOKENS]))
            if mandatory is not None:
                return np.concatenate([anchor, mandatory])
            source = self.stream.sources[int(anchor[0, SOURCE])]
            self.stream.skips.add(source.name, anchor, "leaves no room for the mandatory groups")
            self._refill()
        if not self._mandatory:
            return nothing
        for _ in range(_TRIES):
            mandatory = self._mandatory_samples(self.config.max_num_tokens)
            if mandatory is not None:
                return mandatory
        names = ", ".join(self.stream.sources[number].name for number in self._mandatory)
        raise ValueError(
            f"no samples of the mandatory groups {names} found that fit together into --max_num_tokens {self.config.max_num_tokens}; "
            "raise it, or lower --max_num_tokens_per_sample or the image sizes in the dataset configuration"
        )

    def _mandatory_samples(self, room: int) -> np.ndarray | None:
        """One sample of every mandatory group within ``room`` tokens, or None; those that did not fit wait for another pack."""
        chosen = np.empty((0, COLUMNS), dtype=np.int64)
        for number in self._mandatory:
            for _ in range(_TRIES):
                row = self.stream.next_of(number)[None]
                if row[0, TOKENS] <= room:
                    chosen = np.concatenate([chosen, row])
                    room -= int(row[0, TOKENS])
                    break
                self._waiting = np.concatenate([self._waiting, row])
            else:
                self._waiting = np.concatenate([self._waiting, chosen])
                return None
        return chosen
